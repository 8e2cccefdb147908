"""Duration of event loop turns while background work runs (design section 6, invariant 8: never
above 5 ms).

    python -m tests.load.bench_stalls [--disk-mib 2048] [--vdisks 20000] [--late-ms 5]

A callback that reschedules itself measures each turn by wall clock and by the processor time of the
event loop thread. A turn that is late only by wall clock was waiting (another process had the
processor, or a system call blocked). A turn that is late by both is our own computing. A second
thread samples the event loop's stack whenever the callback is late, and reports where it was.
"""

import argparse
import asyncio
import collections
import random
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Awaitable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import uvloop

from daemon.process.runtime import tune_memory, tune_start
from storage.pool import Pool
from tests.load.measuring import machine, table, warm_memory

WATCH_SECONDS = 0.0005
BLOCK_BYTES = 4096
CHUNK_BYTES = 1 << 18
# Number of stack frames shown, innermost last.
FRAMES = 3


class Turns:
    """Measurements of the turns of one step, in seconds."""

    def __init__(self) -> None:
        self.count = 0
        self.longest = 0.0
        self.longest_processor = 0.0
        self.late = 0
        self.late_processor = 0
        self.where: collections.Counter[str] = collections.Counter()


class Probe:
    """Measures the turns of the running loop. Use as a context."""

    def __init__(self, late_seconds: float) -> None:
        self._late_seconds = late_seconds
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._beat_at = time.perf_counter()
        self._running = True
        self._turns = Turns()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Probe":  # noqa: PYI034 -- never subclassed
        self._beat_at, self._beat_processor = time.perf_counter(), time.thread_time()
        self._loop.call_soon(self._beat)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._running = False
        self._watcher.join()

    def _beat(self) -> None:
        """Run once per turn. It allocates nothing that lasts, so that the probe causes no garbage
        collections.
        """
        now, processor, turns = time.perf_counter(), time.thread_time(), self._turns
        passed, computed = now - self._beat_at, processor - self._beat_processor
        self._beat_at, self._beat_processor = now, processor
        turns.count += 1
        turns.longest = max(turns.longest, passed)
        turns.longest_processor = max(turns.longest_processor, computed)
        turns.late += passed > self._late_seconds
        turns.late_processor += computed > self._late_seconds
        if self._running:
            self._loop.call_soon(self._beat)

    def _watch(self) -> None:
        seen = 0.0
        while self._running:
            time.sleep(WATCH_SECONDS)
            at = self._beat_at
            if at != seen and time.perf_counter() - at > self._late_seconds:
                seen = at
                self._turns.where[_stack(self._thread_id)] += 1

    async def measure(self, step: Awaitable[object]) -> Turns:
        """Return the turns during ``step``; earlier turns do not count."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self._turns = Turns()
        await step
        return self._turns


def _stack(thread_id: int) -> str:
    frame = sys._current_frames().get(thread_id)
    frames = traceback.extract_stack(frame)[-FRAMES:] if frame is not None else []
    return " > ".join(f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in frames)


class Scenario:
    """The work whose turns are measured."""

    def __init__(self, pool: Pool, disk_bytes: int, vdisks: int) -> None:
        self._pool = pool
        self._disk_bytes = disk_bytes
        self._vdisks = vdisks
        self._random = random.Random(1)
        self._data = self._random.randbytes(CHUNK_BYTES)

    def _random_offsets(self, count: int) -> Iterator[int]:
        """Yield the offsets one by one: building a list of them would itself be a late turn."""
        return (
            self._random.randrange(self._disk_bytes // BLOCK_BYTES) * BLOCK_BYTES
            for _ in range(count)
        )

    async def _write(self, name: str, offsets: Iterable[int], length: int, at_once: int) -> None:
        """Write pieces, ``at_once`` per wake-up, as a listener does."""
        volume = self._pool.volume(name)
        rest = iter(offsets)
        while batch := list(islice(rest, at_once)):
            ended: list[asyncio.Future[None]] = []
            for offset in batch:
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                ended.append(future)
                start = self._random.randrange(CHUNK_BYTES - length + 1)
                volume.write(
                    offset,
                    memoryview(self._data)[start : start + length],
                    False,
                    partial(_settle, future),
                )
            volume.settle()
            await asyncio.gather(*ended)

    async def fill(self) -> None:
        await self._pool.vdisk_create("golden", self._disk_bytes)
        await self._write("golden", range(0, self._disk_bytes, CHUNK_BYTES), CHUNK_BYTES, 1)

    async def random_writes(self) -> None:
        offsets = self._random_offsets(200_000)
        await self._write("golden", offsets, BLOCK_BYTES, 32)

    async def consistency_points(self) -> None:
        for _ in range(4):
            offsets = self._random_offsets(20_000)
            await self._write("golden", offsets, BLOCK_BYTES, 32)
            await self._pool.consistency_point()

    async def flushes(self) -> None:
        volume = self._pool.volume("golden")
        for _ in range(10):
            offsets = self._random_offsets(20_000)
            await self._write("golden", offsets, BLOCK_BYTES, 32)
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            volume.flush(partial(_settle, future))
            await future

    async def snapshots_and_clones(self) -> None:
        for number in range(20):
            await self._pool.snapshot_create([("golden", f"s{number}")])
            await self._pool.clone_create("golden", f"s{number}", f"clone{number}")

    async def split_copy(self) -> None:
        await self._split("clone0", "copy")

    async def split_share(self) -> None:
        await self._split("clone1", "share")

    async def _split(self, name: str, mode: str) -> None:
        await self._pool.split_start(name, mode)
        while self._pool.split_show(name)["state"] != "done":
            await asyncio.sleep(0.01)

    async def check(self) -> None:
        for verify in (False, True):
            found = await self._pool.check(verify_data=verify)
            assert found["ok"], found["errors"][:3]

    async def delete(self) -> None:
        for name in ("clone0", "clone1"):
            await self._pool.vdisk_delete(name)
        await self._reclaimed()

    async def _reclaimed(self) -> None:
        before = -1
        while (used := self._pool.show()["used_bytes"]) != before:
            before = used
            await asyncio.sleep(1.0)

    async def unmap(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pool.volume("golden").unmap(0, self._disk_bytes, partial(_settle, future))
        await future
        await self._pool.consistency_point()

    async def many_vdisks(self) -> None:
        for first in range(0, self._vdisks, 64):
            await asyncio.gather(
                *(self._pool.vdisk_create(f"v{first + i}", 1 << 30) for i in range(64))
            )

    async def listing(self) -> None:
        for _ in range(3):
            await self._pool.vdisk_list()


def _settle(future: "asyncio.Future[None]", error: Exception | None) -> None:
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(None)


async def measure(directory: Path, disk_bytes: int, vdisks: int, late_seconds: float) -> None:
    path = str(directory / "pool")
    await asyncio.to_thread(Pool.create, path, disk_bytes * 6)
    pool = await Pool.open(path)
    tune_memory()
    scenario = Scenario(pool, disk_bytes, vdisks)
    steps: list[tuple[str, Awaitable[Any]]] = [
        ("idle", asyncio.sleep(1.0)),
        ("fill", scenario.fill()),
        ("random writes", scenario.random_writes()),
        ("writes and consistency points", scenario.consistency_points()),
        ("writes and flushes", scenario.flushes()),
        ("snapshots and clones", scenario.snapshots_and_clones()),
        ("random writes over snapshots", scenario.random_writes()),
        ("split, copy", scenario.split_copy()),
        ("split, share", scenario.split_share()),
        ("check, with data", scenario.check()),
        ("delete and reclaim", scenario.delete()),
        ("unmap of everything", scenario.unmap()),
        (f"create of {vdisks} vdisks", scenario.many_vdisks()),
        (f"list of {vdisks} vdisks", scenario.listing()),
    ]
    rows: list[tuple[str, ...]] = []
    late: dict[str, collections.Counter[str]] = {}
    with Probe(late_seconds) as probe:
        for name, step in steps:
            started = time.perf_counter()
            turns = await probe.measure(step)
            seconds = time.perf_counter() - started
            milliseconds = (
                f"{one * 1e3:.1f}"
                for one in (seconds / turns.count, turns.longest, turns.longest_processor)
            )
            rows.append(
                (name, f"{seconds:.1f}", *milliseconds, str(turns.late), str(turns.late_processor))
            )
            late[name] = turns.where
    await pool.close()
    limit = f"over {late_seconds * 1e3:g} ms"
    print(f"{machine()}\n\n### Turns of the event loop, milliseconds\n")
    print(
        table(
            (
                "during",
                "seconds",
                "mean",
                "longest",
                "longest, processor",
                limit,
                f"{limit}, processor",
            ),
            rows,
        )
        + "\n"
    )
    for name, stacks in late.items():
        for stack, count in stacks.most_common(6):
            print(f"late during {name}: {count} x {stack}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--disk-mib", type=int, default=2048)
    parser.add_argument("--vdisks", type=int, default=20_000)
    parser.add_argument("--late-ms", type=float, default=5.0)
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    tune_start()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        warm_memory(Path(directory), 3 * options.disk_mib << 20)
        uvloop.run(
            measure(Path(directory), options.disk_mib << 20, options.vdisks, options.late_ms / 1e3)
        )


if __name__ == "__main__":
    main()
