"""Times that must not grow with size: snapshot and clone of a 16 TiB vdisk, and opening a pool with
100 GiB allocated.

    python -m tests.load.bench_store [--scattered 8192] [--allocated-gib 100] [--parts create,open]

For the open time, the bench writes 100 GiB through the store's own write path (volume, allocation,
pointer blocks, consistency points) onto a device that drops the payload of data blocks and keeps
everything else: the metadata on disk is that of a pool with 100 GiB of data.
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from asyncio import Future
from collections.abc import Sequence
from pathlib import Path

import uvloop

from daemon.admin.client import ControlClient
from daemon.iscsi.initiator import Initiator
from storage.device import Buffer
from storage.device.file import FileDevice
from storage.pool import Pool
from tests.daemon.programs import Daemon
from tests.load.measuring import machine, median, percentile, table

TIB = 1 << 40
GIB = 1 << 30
DISK_BYTES = 16 * TIB
ROUNDS = 20
WRITE_BYTES = 1 << 18
MARK = b"payload that the bench's device drops" + bytes(27)
IN_FLIGHT = 64


# --- Create ---------------------------------------------------------------------------------------


class Timer:
    """Latencies in milliseconds, by operation."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, list[float]] = {}

    def call(self, what: str, control: ControlClient, method: str, **params: object) -> None:
        started = time.perf_counter()
        control.call(method, **params)
        self.milliseconds.setdefault(what, []).append((time.perf_counter() - started) * 1e3)


def snapshots_and_clones(timer: Timer, control: ControlClient, vdisk: str, what: str) -> None:
    for number in range(ROUNDS):
        timer.call(
            f"snapshot of {what}", control, "snapshot.create", snapshots=[f"{vdisk}@s{number}"]
        )
        timer.call(
            f"clone of {what}",
            control,
            "clone.create",
            snapshot=f"{vdisk}@s{number}",
            name=f"{vdisk}.c{number}",
        )


async def write_scattered(daemon: Daemon, vdisk: str, count: int, seed: int) -> None:
    """Write random blocks across the disk: nearly every one has a level-1 and a level-2 block of
    its own.
    """
    host, _, port = daemon.portal.rpartition(":")
    generator = random.Random(seed)
    block = os.urandom(4096)
    async with await Initiator.connect(
        host, int(port), f"iqn.2026-01.io.cleaved:{vdisk}"
    ) as initiator:
        for _ in range(0, count, IN_FLIGHT):
            offsets = [generator.randrange(DISK_BYTES // 4096) * 4096 for _ in range(IN_FLIGHT)]
            await asyncio.gather(*(initiator.write(offset, block) for offset in offsets))


async def create(directory: Path, scattered: int) -> None:
    timer = Timer()
    async with Daemon(directory, pool_size="16GiB") as daemon:
        with ControlClient(str(daemon.control_path)) as control:
            for name in ("empty", "written", "busy"):
                timer.call(
                    "create of a 16 TiB vdisk",
                    control,
                    "vdisk.create",
                    name=name,
                    size_bytes=DISK_BYTES,
                )
            snapshots_and_clones(timer, control, "empty", "an empty 16 TiB vdisk")
            await write_scattered(daemon, "written", scattered, 1)
            control.call("snapshot.create", snapshots=["written@settled"])
            snapshots_and_clones(
                timer, control, "written", f"one with {scattered} scattered blocks"
            )
            for number in range(ROUNDS // 2):
                await write_scattered(daemon, "busy", 2048, number)
                timer.call(
                    "snapshot right after 2048 scattered writes",
                    control,
                    "snapshot.create",
                    snapshots=[f"busy@s{number}"],
                )
    print("### Creation through the control socket\n")
    rows = [
        (what, len(all_), f"{median(all_):.1f}", f"{percentile(all_, 95):.1f}", f"{max(all_):.1f}")
        for what, all_ in timer.milliseconds.items()
    ]
    print(table(("what", "count", "median ms", "p95 ms", "max ms"), rows) + "\n")


# --- Open -----------------------------------------------------------------------------------------


class PayloadDropped(FileDevice):
    """A file device that drops writes which begin with MARK."""

    __slots__ = ()

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        return _is_payload(buffers) or super().try_writev(buffers, offset_bytes, length_bytes)

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> "Future[None]":
        if not _is_payload(buffers):
            return super().writev(buffers, offset_bytes)
        done: Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


def _is_payload(buffers: Sequence[Buffer]) -> bool:
    return memoryview(buffers[0])[: len(MARK)] == MARK


async def allocate(path: Path, allocated_bytes: int) -> None:
    """Create a pool and write ``allocated_bytes`` to one vdisk."""
    await asyncio.to_thread(Pool.create, str(path), allocated_bytes + (allocated_bytes >> 4) + GIB)
    device = PayloadDropped(str(path), os.open(path, os.O_RDWR))
    pool = await Pool.open_on(device)
    await pool.vdisk_create("large", allocated_bytes)
    volume = pool.volume("large")
    data = (MARK + os.urandom(4096 - len(MARK))) * (WRITE_BYTES // 4096)
    ended = asyncio.Event()
    failures: list[Exception] = []

    def done(error: Exception | None) -> None:
        if error is not None:
            failures.append(error)
        ended.set()

    for offset in range(0, allocated_bytes, WRITE_BYTES):
        ended.clear()
        volume.write(offset, data, False, done)
        volume.settle()
        await ended.wait()
        if not offset & (16 << 20) - 1:
            await asyncio.sleep(0)  # lets consistency points run
    assert not failures, failures[0]
    await pool.close()


def forget_cached(path: Path) -> None:
    """Make the kernel drop the file's pages, so that the next open reads from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


async def open_times(directory: Path, allocated_bytes: int) -> None:
    path = directory / "pool"
    started = time.perf_counter()
    await allocate(path, allocated_bytes)
    written_seconds = time.perf_counter() - started
    times: dict[str, list[float]] = {}
    for _ in range(5):
        forget_cached(path)
        started = time.perf_counter()
        pool = await Pool.open(str(path))
        times.setdefault("open, nothing cached", []).append(time.perf_counter() - started)
        used = pool.show()["used_bytes"]
        await pool.close()
        started = time.perf_counter()
        pool = await Pool.open(str(path))
        times.setdefault("open, cached", []).append(time.perf_counter() - started)
        await pool.close()
        forget_cached(path)
        daemon = Daemon(directory)
        started = time.perf_counter()
        await daemon.start()
        times.setdefault("daemon, from exec to its ready line, nothing cached", []).append(
            time.perf_counter() - started
        )
        await daemon.stop()
    print(
        f"### Opening a pool with {used / GIB:.1f} GiB allocated"
        f" ({path.stat().st_blocks * 512 / GIB:.2f} GiB of metadata on disk, written in"
        f" {written_seconds:.0f} s)\n"
    )
    rows = [
        (what, f"{median(all_) * 1e3:.1f}", f"{max(all_) * 1e3:.1f}")
        for what, all_ in times.items()
    ]
    print(table(("what", "median ms", "max ms"), rows) + "\n")


async def run(parts: list[str], directory: Path, scattered: int, allocated_bytes: int) -> None:
    print(f"{machine()}\n")
    for part in parts:
        with tempfile.TemporaryDirectory(dir=directory) as where:
            await (
                create(Path(where), scattered)
                if part == "create"
                else open_times(Path(where), allocated_bytes)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--scattered", type=int, default=8192, help="blocks written all over the 16 TiB"
    )
    parser.add_argument("--allocated-gib", type=int, default=100)
    parser.add_argument("--parts", default="create,open")
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        uvloop.run(
            run(
                options.parts.split(","),
                Path(directory),
                options.scattered,
                options.allocated_gib * GIB,
            )
        )


if __name__ == "__main__":
    main()
