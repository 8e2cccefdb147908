"""The main job from nothing, with proof: `make demo`.

A real daemon process serves a pool file in a temporary directory. Over iSCSI, a vdisk gets real
data; a snapshot and a clone of it are made; the clone is written to, and split from its backing
store while clients read and write and verify; the backing store is released and deleted; the pool
is checked, and every byte is compared. No root, and no client but our own initiator.

Exit 0 when all of it held, 1 with what went wrong.
"""

import argparse
import asyncio
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.table import Table

from daemon.admin.client import ControlClient
from daemon.admin.progress import progress_view
from daemon.iscsi.initiator import Initiator
from daemon.process.units import format_size, parse_size
from daemon.targets.names import TARGET_PREFIX
from protocol.control import methods
from protocol.control.definition import Method, Result
from protocol.control.limits import BLOCK_BYTES
from protocol.control.rows import Split

MIB: Final = 1 << 20
PIECE_BYTES: Final = MIB
PIECES_IN_FLIGHT: Final = 8
CLONE_WRITES: Final = 2000
WORKERS: Final = 8
# So slow that the progress can be watched; without a ceiling this split takes a fraction of a
# second.
SPLIT_RATE_BYTES: Final = 48 * MIB
STOP_SECONDS_MAX: Final = 30.0

console = Console(highlight=False, soft_wrap=True)


class DemoFailed(Exception):
    """Something did not hold; the message says what."""


class DaemonProcess:
    """The daemon as a process of its own."""

    def __init__(self, directory: Path, pool_size_bytes: int) -> None:
        self.pool_path = directory / "pool"
        self.control_path = directory / "control.sock"
        self.log_path = directory / "log"
        self._arguments = [
            "--pool",
            str(self.pool_path),
            "--pool-size",
            str(pool_size_bytes),
            "--iscsi",
            "127.0.0.1:0",
        ]
        self._arguments += ["--control", str(self.control_path), "--log-format", "json"]
        self._process: subprocess.Popen[str] | None = None
        self.host, self.port = "", 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def start(self) -> None:
        """Start, and wait until it says where it listens."""
        with self.log_path.open("a") as log:
            command = [
                sys.executable,
                "-c",
                "from daemon.cli import main; main()",
                "serve",
                *self._arguments,
            ]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        ready = self._process.stdout.readline().strip()
        if not ready.startswith("cleaved ready: iscsi "):
            raise DemoFailed(f"the daemon did not start: {ready!r}\n{self.log_path.read_text()}")
        host, _, port = (
            ready.removeprefix("cleaved ready: iscsi ").partition(",")[0].rpartition(":")
        )
        self.host, self.port = host, int(port)
        console.print(f"  {ready}")

    def stop(self) -> None:
        """SIGTERM, and an exit status of 0."""
        process, self._process = self._process, None
        assert process is not None
        process.terminate()
        status = process.wait(STOP_SECONDS_MAX)
        assert process.stdout is not None
        process.stdout.close()
        if status != 0:
            raise DemoFailed(
                f"the daemon stopped with exit status {status}\n{self.log_path.read_text()}"
            )

    def call(self, call: Method[Result]) -> Result:
        """One call of the control socket."""
        with ControlClient(str(self.control_path)) as client:
            return client.call(call)

    async def connect(self, vdisk: str) -> Initiator:
        """An iSCSI session with a vdisk."""
        return await Initiator.connect(self.host, self.port, TARGET_PREFIX + vdisk)


class Report:
    """What took how long, for the summary."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def add(self, what: str, figure: str) -> None:
        """A line of the summary, shown at once too."""
        self.rows.append((what, figure))
        console.print(f"  {what}: [bold]{figure}[/bold]")

    @contextmanager
    def milliseconds(self, what: str) -> Iterator[None]:
        """Time a step."""
        begun = time.perf_counter()
        yield
        self.add(what, f"{(time.perf_counter() - begun) * 1000:.1f} ms")

    @contextmanager
    def rate(self, what: str, size_bytes: int) -> Iterator[None]:
        """Time a transfer."""
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self.add(
            what,
            f"{format_size(size_bytes)} in {seconds:.1f} s ({format_size(size_bytes / seconds)}/s)",
        )


async def in_flight(jobs: Iterator[Awaitable[None]], count: int) -> None:
    """Carry out all jobs, ``count`` at a time. The first error ends it."""

    async def worker() -> None:
        for job in jobs:
            await job

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(worker())


def seeded_data(seed: str, size_bytes: int) -> bytearray:
    """Data that no compression and no zero detection can shorten, the same for each seed."""
    generator = random.Random(seed)
    data = bytearray()
    while len(data) < size_bytes:
        data += generator.randbytes(PIECE_BYTES)
    return data


async def write_all(disk: Initiator, data: bytearray) -> None:
    """Write a whole image, and flush it."""
    view = memoryview(data)
    jobs = (disk.write(at, view[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES))
    await in_flight(jobs, PIECES_IN_FLIGHT)
    await disk.flush()


async def verify_all(disk: Initiator, expected: bytearray, what: str) -> None:
    """Read a whole image, and compare every byte."""
    view = memoryview(expected)

    async def verify(at: int) -> None:
        if await disk.read(at, PIECE_BYTES) != view[at : at + PIECE_BYTES]:
            raise DemoFailed(f"{what}: bytes {at} to {at + PIECE_BYTES} are not what was written")

    await in_flight((verify(at) for at in range(0, len(expected), PIECE_BYTES)), PIECES_IN_FLIGHT)


async def write_blocks(disk: Initiator, expected: bytearray, seed: str, count: int) -> None:
    """Write single blocks all over an image, and note them in ``expected``."""
    generator = random.Random(seed)

    async def write() -> None:
        at = generator.randrange(len(expected) // BLOCK_BYTES) * BLOCK_BYTES
        data = generator.randbytes(BLOCK_BYTES)
        expected[at : at + BLOCK_BYTES] = data
        await disk.write(at, data)

    # One at a time: two writes of one block in flight would leave open which came last.
    await in_flight((write() for _ in range(count)), 1)


class Load:
    """Clients that read, write and verify a disk until told to stop. Each worker has blocks of its
    own, so that it knows what they hold.
    """

    def __init__(self, disk: Initiator, expected: bytearray) -> None:
        self._disk = disk
        self._expected = expected
        self._stopping = False
        self.reads = 0
        self.writes = 0

    def stop(self) -> None:
        """Let each worker end after its current step."""
        self._stopping = True

    async def work(self, number: int) -> None:
        """Read and compare, then write, over and over. Raises DemoFailed."""
        generator = random.Random(f"worker {number}")
        blocks = len(self._expected) // BLOCK_BYTES // WORKERS
        while not self._stopping:
            at = (generator.randrange(blocks) * WORKERS + number) * BLOCK_BYTES
            if await self._disk.read(at, BLOCK_BYTES) != self._expected[at : at + BLOCK_BYTES]:
                raise DemoFailed(
                    f"during the split, block {at // BLOCK_BYTES} is not what was written"
                )
            data = generator.randbytes(BLOCK_BYTES)
            await self._disk.write(at, data)
            self._expected[at : at + BLOCK_BYTES] = data
            self.reads += 1
            self.writes += 1


def watch_split(daemon: DaemonProcess, name: str) -> Split:
    """Start a split and show its progress to the end. Blocking: runs in a thread while the clients
    work.
    """
    with ControlClient(str(daemon.control_path)) as client, progress_view(name) as view:
        client.call(methods.Subscribe(events=[methods.SPLIT_PROGRESS]))
        split = client.call(methods.SplitStart(name=name, rate_max_bytes=SPLIT_RATE_BYTES))
        while split.state == "running":
            update = client.event(1.0)
            show = methods.SplitShow(name=name)
            split = update if isinstance(update, Split) else client.call(show)
            view.update(split)
    if split.state != "done":
        raise DemoFailed(f"the split of {name} is {split.state}: {split.reason}")
    return split


async def split_under_load(
    daemon: DaemonProcess, disk: Initiator, expected: bytearray, report: Report
) -> None:
    """Split the clone while clients read, write and verify."""
    load = Load(disk, expected)
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(WORKERS):
            group.create_task(load.work(number))
        split = await asyncio.to_thread(watch_split, daemon, "web1")
        load.stop()
    seconds = time.perf_counter() - begun
    report.add(
        "split, copy mode",
        f"{split.blocks_copied} blocks in {seconds:.1f} s (ceiling"
        f" {format_size(SPLIT_RATE_BYTES)}/s)",
    )
    report.add("client I/O meanwhile", f"{load.reads} reads and {load.writes} writes, all verified")


async def wait_for_space(daemon: DaemonProcess, used_bytes_max: int) -> int:
    """Wait until the background reclaim has brought the used space down; what is used then."""
    for _ in range(200):
        used = daemon.call(methods.PoolShow()).used_bytes
        if used <= used_bytes_max:
            return used
        await asyncio.sleep(0.1)
    raise DemoFailed(
        f"after the snapshot was deleted {format_size(used)} stay in use, above"
        f" {format_size(used_bytes_max)}"
    )


def check_pool(daemon: DaemonProcess, when: str, report: Report) -> None:
    """The pool's own check, with all checksums."""
    found = daemon.call(methods.PoolCheck(verify_data=True))
    if not found.ok:
        raise DemoFailed(f"pool check {when}: " + "; ".join(found.errors))
    report.add(f"pool check {when}", "clean")


async def clone_and_split(daemon: DaemonProcess, golden: bytearray, report: Report) -> bytearray:
    """The middle of the demo: snapshot, clone, split, release. Gives what the clone must hold at
    the end.
    """
    with report.milliseconds("snapshot golden@v1"):
        daemon.call(methods.SnapshotCreate(snapshots=["golden@v1"]))
    with report.milliseconds("clone web1 of golden@v1"):
        daemon.call(methods.CloneCreate(snapshot="golden@v1", name="web1"))
    web1 = bytearray(golden)
    async with await daemon.connect("web1") as clone, await daemon.connect("golden") as disk:
        console.print("[bold]Writing to the clone and to its origin: neither sees the other[/bold]")
        await write_blocks(clone, web1, "clone", CLONE_WRITES)
        await write_blocks(disk, golden, "origin", CLONE_WRITES)
        with report.rate("clone read and verified before the split", len(web1)):
            await verify_all(clone, web1, "the clone before the split")
        console.print(
            "[bold]Splitting the clone from its backing store, while clients read and write[/bold]"
        )
        await split_under_load(daemon, clone, web1, report)
        with report.rate("clone read and verified after the split", len(web1)):
            await verify_all(clone, web1, "the clone after the split")
        await verify_all(disk, golden, "the origin after the split")
    if daemon.call(methods.VdiskShow(name="web1")).backing is not None:
        raise DemoFailed("the clone still has a backing store after its split")
    daemon.call(methods.SnapshotDelete(snapshot="golden@v1"))
    report.add("backing store", "released and deleted")
    return web1


async def demonstrate(daemon: DaemonProcess, size_bytes: int, report: Report) -> None:
    """All steps, in order. Raises DemoFailed or what the steps raise."""
    console.print(f"[bold]Writing {format_size(size_bytes)} to vdisk golden over iSCSI[/bold]")
    daemon.call(methods.VdiskCreate(name="golden", size_bytes=size_bytes))
    golden = seeded_data("golden", size_bytes)
    async with await daemon.connect("golden") as disk:
        with report.rate("written over iSCSI", size_bytes):
            await write_all(disk, golden)
    console.print("[bold]Snapshot and clone[/bold]")
    web1 = await clone_and_split(daemon, golden, report)
    # Two whole images, and a sixteenth for pointer blocks, maps and what the last consistency
    # points hold.
    used = await wait_for_space(daemon, 2 * size_bytes + size_bytes // 16 + 32 * MIB)
    report.add("space in use by both vdisks", format_size(used))
    check_pool(daemon, "after the split", report)
    console.print("[bold]Restarting the daemon, and reading everything again[/bold]")
    daemon.stop()
    daemon.start()
    for name, expected in (("golden", golden), ("web1", web1)):
        async with await daemon.connect(name) as disk:
            await verify_all(disk, expected, f"{name} after the restart")
    report.add("every byte after a restart", f"{format_size(2 * size_bytes)} verified")
    daemon.stop()


def run(size_bytes: int) -> int:
    """The whole demo; its exit status."""
    begun = time.perf_counter()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="cleaved-demo-") as name:
        free_bytes = shutil.disk_usage(name).free
        if free_bytes < 4 * size_bytes:
            needed = f"{format_size(free_bytes)} free, {format_size(4 * size_bytes)} are needed"
            console.print(f"[red]{name} has {needed}; set TMPDIR, or --size[/red]")
            return 1
        console.print(f"[bold]Starting the daemon on an embedded pool in {name}[/bold]")
        try:
            with DaemonProcess(Path(name), 8 * size_bytes) as daemon:
                asyncio.run(demonstrate(daemon, size_bytes, report))
        except Exception as error:  # noqa: BLE001 -- whatever it is, the demo failed, and says how
            _explain(error, Path(name) / "log")
            return 1
    summary = Table(title="What was shown", show_header=False)
    for row in report.rows:
        summary.add_row(*row)
    console.print(summary)
    console.print(f"[green]All of it held.[/green] {time.perf_counter() - begun:.0f} s in all.")
    return 0


def _explain(error: Exception, log_path: Path) -> None:
    causes: list[BaseException] = [error]
    while isinstance(causes[-1], BaseExceptionGroup):
        causes.append(causes[-1].exceptions[0])
    console.print(
        f"[red]The demo failed:[/red] {type(causes[-1]).__name__}: {causes[-1]}", markup=True
    )
    if log_path.exists():
        lines = log_path.read_text().splitlines()[-20:]
        console.print("The daemon's log ends with:", *lines, sep="\n  ", markup=False)


def main() -> None:
    """Entry point of `make demo`."""
    parser = argparse.ArgumentParser(
        prog="python -m daemon.demo",
        description="The main job of cleaved from nothing, with proof.",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        default=256 * MIB,
        help="data on the vdisk, a multiple of 1MiB (default: 256MiB)",
    )
    size_bytes: int = parser.parse_args().size
    if size_bytes < MIB or size_bytes % MIB:
        parser.error(
            f"--size: {size_bytes} bytes are no multiple of 1MiB; write for instance 256MiB"
        )
    sys.exit(run(size_bytes))


if __name__ == "__main__":
    main()
