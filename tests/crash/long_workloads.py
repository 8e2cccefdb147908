"""Seeded long workloads: commands under way together, splits in both modes among client writes, a
log that wraps, many consistency points.

The device carries out its jobs late and out of order, so that writes are in flight whenever a sync
is. Of the states of each epoch a seeded few are examined; there are hundreds of epochs.
"""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any
from unittest import mock

from storage.log import intent_log, record
from tests.crash.oracle import SECTORS_PER_BLOCK
from tests.crash.session import Session

WORKLOADS = 40
OPERATIONS = 120
# At most this many vdisks and snapshots, so that a small pool holds them.
IMAGES_MAX = 7
STATES_AN_EPOCH = 8
# Of atomic writes; and records of every other workload hold no more than so many changes, so that
# their ends are met often.
ATOMIC_BLOCKS_MAX = 4
SMALL_RECORD_ENTRIES = 5
RECORD_SIZE = "ENTRIES_PER_RECORD"
WITH_RECORD_SIZE = (intent_log, record)
# Looked up here: an exception within a workload would count as a finding, also as that of a planted
# bug.
assert all(hasattr(module, RECORD_SIZE) for module in WITH_RECORD_SIZE)
# Where writes go: few blocks, met again and again, on both sides of a level-1 border.
BLOCKS = (0, 1, 2, 3, 4, 5, 128, 254, 255, 256, 257, 258)


class LongWorkload:
    """One workload of ``OPERATIONS`` steps, all drawn from ``seed``."""

    def __init__(self, session: Session, seed: int) -> None:
        self.session = session
        self.random = Random(seed)
        self.made = 0

    async def run(self) -> None:
        choices = [
            (self.together, 30), (self.flush, 25), (self.write_fua, 12), (self.background, 20),
            (self.consistency_point, 5), (self.unmap, 6), (self.snapshot, 4), (self.clone, 4),
            (self.split, 8), (self.delete_snapshot, 4), (self.delete_vdisk, 2), (self.resize, 2),
            (self.write_atomic, 10),
        ]  # fmt: skip
        operations, weights = zip(*choices, strict=True)
        for _ in range(OPERATIONS):
            await self.random.choices(operations, weights)[0]()

    # --- Clients ----------------------------------------------------------------------------------

    def vdisks(self) -> list[str]:
        return sorted(name for name in self.session.model.disks if "@" not in name)

    def snapshots(self) -> list[str]:
        return sorted(name for name in self.session.model.disks if "@" in name)

    def some_lba(self, name: str) -> int:
        return (
            self.random.choice(
                [fbn for fbn in BLOCKS if fbn < self.session.model.disks[name].size_blocks]
            )
            * SECTORS_PER_BLOCK
        )

    def some_write(
        self, taken: set[tuple[str, int]], fua: bool = False, name: str = ""
    ) -> list[Coroutine[Any, Any, Any]]:
        """A write to a block that no other of those that are under way with it touches."""
        name = name or self.random.choice(self.vdisks())
        lba = self.some_lba(name)
        if (name, lba) in taken:
            return []
        taken.add((name, lba))
        offset = self.random.choice((0, 0, 0, 1, 5))
        count = (
            self.random.choice((SECTORS_PER_BLOCK, SECTORS_PER_BLOCK, 1, 3)) if offset < 5 else 3
        )
        return [self.session.write(name, lba + offset, min(count, SECTORS_PER_BLOCK - offset), fua)]

    async def together(self) -> None:
        """Several writes, the background, and at times a consistency point, all at once."""
        taken: set[tuple[str, int]] = set()
        work = [
            one
            for _ in range(self.random.randint(1, 5))
            for one in self.some_write(taken, self.random.random() < 0.1)
        ]
        work.append(self.session.step())
        if self.random.random() < 0.2:
            # What it makes durable here is not told to the model: some of the writes may not be
            # among it.
            work.append(awaited(self.session.pool.consistency_point()))
        self.random.shuffle(work)
        await asyncio.gather(*work)

    async def write_fua(self) -> None:
        await asyncio.gather(*self.some_write(set(), fua=True))

    async def write_atomic(self) -> None:
        """Several at a time, to neighbours too: one batch, and where records are small, several
        records.
        """
        name = self.random.choice(self.vdisks())
        fbn, work = self.random.choice((0, 254)), []
        for _ in range(self.random.randint(1, 3)):
            blocks = min(
                self.random.randint(2, ATOMIC_BLOCKS_MAX),
                self.session.model.disks[name].size_blocks - fbn,
            )
            if blocks > 1:
                work.append(
                    self.session.write_atomic(name, fbn, blocks, self.random.random() < 0.3)
                )
                fbn += blocks
        await asyncio.gather(*work)

    async def unmap(self) -> None:
        name = self.random.choice(self.vdisks())
        lba = self.some_lba(name)
        most = self.session.model.disks[name].size_blocks * SECTORS_PER_BLOCK - lba
        await self.session.unmap(name, lba, min(most, self.random.choice((8, 16, 24, 12))))

    async def flush(self) -> None:
        await self.session.flush(self.random.choice(self.vdisks()))

    async def background(self) -> None:
        for _ in range(self.random.randint(1, 4)):
            await self.session.step()

    # --- Administrators ---------------------------------------------------------------------------

    async def consistency_point(self) -> None:
        await self.session.consistency_point()

    def name(self) -> str:
        self.made += 1
        return f"n{self.made}"

    async def snapshot(self) -> None:
        if len(self.session.model.disks) < IMAGES_MAX:
            await self.session.snapshot_create(self.random.choice(self.vdisks()), self.name())

    async def clone(self) -> None:
        if self.snapshots() and len(self.session.model.disks) < IMAGES_MAX:
            vdisk, snapshot = self.random.choice(self.snapshots()).split("@")
            await self.session.clone_create(vdisk, snapshot, self.name())

    async def split(self) -> None:
        """Begin a split of some clone, in either mode; steps of it follow among everything else."""
        session = self.session
        images = [session.pool._catalogue.vdisk(name) for name in self.vdisks()]
        clones = [
            image.name
            for image in images
            if image.backing is not None and not session.splitting(image.name)
        ]
        if clones:
            session.split_mode = self.random.choice(("copy", "share"))
            clone = self.random.choice(clones)
            await session.split_start(clone)
            for _ in range(self.random.randint(2, 4)):
                await self.race(clone)

    async def race(self, clone: str) -> None:
        """A message of the split against writes to the very blocks that it may be copying: the
        writes must win.
        """
        taken: set[tuple[str, int]] = set()
        await asyncio.gather(
            self.session.step(),
            *(one for _ in range(5) for one in self.some_write(taken, name=clone)),
        )

    async def delete_snapshot(self) -> None:
        if self.snapshots():
            vdisk, snapshot = self.random.choice(self.snapshots()).split("@")
            await self.session.snapshot_delete(vdisk, snapshot)

    async def delete_vdisk(self) -> None:
        free = [
            name
            for name in self.vdisks()
            if not any(snapshot.startswith(f"{name}@") for snapshot in self.snapshots())
        ]
        if len(free) > 1:
            await self.session.delete(self.random.choice(free))

    async def resize(self) -> None:
        await self.session.resize(
            self.random.choice(self.vdisks()), self.random.choice((130, 257, 300, 600))
        )


async def awaited(future: Coroutine[Any, Any, None]) -> None:
    await future


@contextmanager
def records_of(seed: int) -> Iterator[None]:
    """The records of the intent log as they are, or small ones."""
    with ExitStack() as stack:
        if seed & 1:
            for module in WITH_RECORD_SIZE:
                stack.enter_context(mock.patch.object(module, RECORD_SIZE, SMALL_RECORD_ENTRIES))
        yield
