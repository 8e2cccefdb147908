"""Random reads and writes at a fixed rate through our own initiator, with every byte checked, in a
process of its own.

    python -m tests.load.random_load HOST:PORT TARGET --disk-mib 2048 --reads 2000 --writes 2000

Every block always holds (its number, a version) 256 times; `fill` writes version 0. Commands arrive
on standard input, one per line: ``phase NAME`` starts a new set of latencies, ``stop`` ends the
load. Then every block of the disk is read and compared, and the findings are printed as JSON. Rates
are open-loop: slow responses do not lower the request rate. A read may return any version from the
last acknowledged to the last submitted one; anything else is a wrong block.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from struct import Struct
from typing import NamedTuple

import uvloop

from daemon.iscsi.initiator import Initiator
from protocol.volume import Buffer
from tests.load.measuring import percentile

BLOCK_BYTES = 4096
STAMP = Struct("<QQ")
STAMPS_PER_BLOCK = BLOCK_BYTES // STAMP.size
FILL_BYTES = 1 << 18
# Requests are submitted at this interval; shorter sleeps would only take the processor from the
# daemon.
TICK_SECONDS = 0.001
# With more than this outstanding, the daemon does not keep up. The load then waits, and reports it.
OUTSTANDING_MAX = 512


def stamped(block: int, version: int) -> bytes:
    """Return the content of a block in a version."""
    return STAMP.pack(block + 1, version) * STAMPS_PER_BLOCK  # never zeros


class Phase(NamedTuple):
    """Latencies in seconds."""

    reads: list[float]
    writes: list[float]


class Load:
    """The load, and a model of the content that the disk must have."""

    def __init__(self, initiator: Initiator, blocks: int, seed: int) -> None:
        self._initiator = initiator
        self._blocks = blocks
        self._random = random.Random(seed)
        self._submitted: dict[int, int] = {}
        self._acknowledged: dict[int, int] = {}
        self._writing: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.phases: dict[str, Phase] = {}
        self.wrong: list[str] = []
        self.waits = 0
        self.stopped = asyncio.Event()
        self.begin("start")

    def begin(self, name: str) -> None:
        self._phase = self.phases.setdefault(name, Phase([], []))

    async def fill(self) -> None:
        """Write version 0 to every block, durably."""
        for first in range(0, self._blocks, FILL_BYTES // BLOCK_BYTES):
            await self._initiator.write(
                first * BLOCK_BYTES,
                b"".join(stamped(first + i, 0) for i in range(FILL_BYTES // BLOCK_BYTES)),
            )
        await self._initiator.flush()

    async def run(self, reads_per_second: float, writes_per_second: float) -> None:
        """Run the load until it is stopped."""
        started = time.perf_counter()
        reads = writes = 0
        while not self.stopped.is_set():
            passed = time.perf_counter() - started
            while writes < passed * writes_per_second:
                writes += 1
                self._spawn_write()
            while reads < passed * reads_per_second:
                reads += 1
                self._spawn(self._read(self._random.randrange(self._blocks)))
            while len(self._tasks) > OUTSTANDING_MAX:
                self.waits += 1
                await asyncio.sleep(TICK_SECONDS)
            await asyncio.sleep(TICK_SECONDS)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _spawn(self, work) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = task.exception()
        if error is not None:
            self.wrong.append(f"{type(error).__name__}: {error}")
            self.stopped.set()

    def _spawn_write(self) -> None:
        block = self._random.randrange(self._blocks)
        while block in self._writing:
            block = self._random.randrange(self._blocks)
        self._writing.add(block)
        version = self._submitted[block] = self._submitted.get(block, 0) + 1
        self._spawn(self._write(block, version))

    async def _write(self, block: int, version: int) -> None:
        phase, started = self._phase, time.perf_counter()
        await self._initiator.write(block * BLOCK_BYTES, stamped(block, version))
        phase.writes.append(time.perf_counter() - started)
        self._acknowledged[block] = version
        self._writing.discard(block)

    async def _read(self, block: int) -> None:
        low = self._acknowledged.get(block, 0)
        phase, started = self._phase, time.perf_counter()
        data = await self._initiator.read(block * BLOCK_BYTES, BLOCK_BYTES)
        phase.reads.append(time.perf_counter() - started)
        self._check(block, data, low)

    def _check(self, block: int, data: Buffer, low: int) -> None:
        number, version = STAMP.unpack_from(data)
        whole = bytes(data) == STAMP.pack(number, version) * STAMPS_PER_BLOCK
        if not whole or number != block + 1 or not low <= version <= self._submitted.get(block, 0):
            self.wrong.append(
                f"block {block}: holds block {number - 1} version {version}, whole: {whole},"
                f" expected {low} or later"
            )

    async def verify(self) -> int:
        """Read the whole disk; every block must hold the last acknowledged version. Return the
        number of blocks compared.
        """
        for first in range(0, self._blocks, FILL_BYTES // BLOCK_BYTES):
            data = memoryview(await self._initiator.read(first * BLOCK_BYTES, FILL_BYTES))
            for index in range(FILL_BYTES // BLOCK_BYTES):
                block = first + index
                if data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] != stamped(
                    block, self._acknowledged.get(block, 0)
                ):
                    self._check(
                        block,
                        data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES],
                        self._acknowledged.get(block, 0),
                    )
        return self._blocks

    def report(self, verified_blocks: int) -> dict[str, object]:
        phases = {
            name: {
                kind: {
                    "count": len(values),
                    **{
                        f"p{percent:g}_ms": round(percentile(values, percent) * 1e3, 3)
                        for percent in (50, 99, 99.9)
                    },
                    "max_ms": round(max(values, default=0.0) * 1e3, 3),
                }
                for kind, values in (("reads", phase.reads), ("writes", phase.writes))
            }
            for name, phase in self.phases.items()
        }
        return {
            "phases": phases,
            "wrong": self.wrong,
            "waits": self.waits,
            "verified_blocks": verified_blocks,
        }


async def take_commands(load: Load) -> None:
    """Read commands from standard input until ``stop`` or end of file."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := (await reader.readline()).decode().split():
        if line[0] == "phase":
            load.begin(line[1])
        elif line[0] == "stop":
            break
    load.stopped.set()


async def drive(
    portal: str, target: str, disk_mib: int, reads: float, writes: float, seed: int
) -> dict[str, object]:
    host, _, port = portal.rpartition(":")
    async with await Initiator.connect(host, int(port), target) as initiator:
        load = Load(initiator, disk_mib * (1 << 20) // BLOCK_BYTES, seed)
        commands = asyncio.create_task(take_commands(load))
        await load.run(reads, writes)
        commands.cancel()
        await initiator.flush()
        return load.report(await load.verify())


async def verify(portal: str, target: str, disk_mib: int) -> dict[str, object]:
    """Compare a disk that was not written since it was filled."""
    host, _, port = portal.rpartition(":")
    async with await Initiator.connect(host, int(port), target) as initiator:
        load = Load(initiator, disk_mib * (1 << 20) // BLOCK_BYTES, 0)
        return load.report(await load.verify())


async def fill(portal: str, target: str, disk_mib: int) -> None:
    host, _, port = portal.rpartition(":")
    async with await Initiator.connect(host, int(port), target) as initiator:
        await Load(initiator, disk_mib * (1 << 20) // BLOCK_BYTES, 0).fill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("portal")
    parser.add_argument("target")
    parser.add_argument("--disk-mib", type=int, required=True)
    parser.add_argument("--reads", type=float, default=2000.0, help="a second")
    parser.add_argument("--writes", type=float, default=2000.0, help="a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fill", action="store_true", help="only write version 0 everywhere")
    parser.add_argument(
        "--verify", action="store_true", help="only compare a disk that was not written since"
    )
    options = parser.parse_args()
    if options.verify:
        print(json.dumps(uvloop.run(verify(options.portal, options.target, options.disk_mib))))
        return
    if options.fill:
        uvloop.run(fill(options.portal, options.target, options.disk_mib))
        return
    print(
        json.dumps(
            uvloop.run(
                drive(
                    options.portal,
                    options.target,
                    options.disk_mib,
                    options.reads,
                    options.writes,
                    options.seed,
                )
            )
        )
    )


if __name__ == "__main__":
    main()
