"""Replay: after a crash, apply what the intent log holds beyond the last consistency point.

Nothing is written before the whole log was read and verified, and the consistency point that follows writes only where neither the
old state nor any applied record lies. So a crash during replay leaves everything as it was, and replay can be repeated.

How it ends: records are read while their sequence, pool and CRC32C are right. The last ones may be torn in another way: the record is
there but not all of its data. Below the highest ``durable_sequence`` that any record states, a block that does not verify is damage: its
pointer is installed all the same, so that reading it is an error and not old data, and it is reported. Above it, it is the torn tail:
that record was never acknowledged, and replay ends before it.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from crc32c import crc32c

from storage.consistency.superblock import Superblock
from storage.errors import BlockDamaged
from storage.images.catalogue import Catalogue
from storage.images.image import Image
from storage.images.trim import trim_blocks
from storage.images.write_path import indexes_of, install, nodes_of, plan_for
from storage.layout import (
    BLOCK_BYTES,
    LOG_FIRST_VBN,
    RECORD_CRC_OFFSET,
    RECORD_ENTRY,
    RECORD_HEAD,
    RECORD_MAGIC,
    ZERO_POINTER,
)
from storage.slices import Slicer
from storage.state import PoolState
from storage.tree.attempt import when_possible

Entry = tuple[int, int, int, int, int]
# Blocks of the ring, or of neighbouring data, read at once.
READ_BLOCKS = 256
# Data writes installed in one step.
STEP_ENTRIES = 256


@dataclass
class Record:
    """One record of the intent log, as read back."""

    sequence: int
    cp_number: int
    durable_sequence: int
    block: int
    blocks: int
    entries: list[Entry]


@dataclass
class Replayed:
    """Outcome: where the log goes on, and what was done. ``moved``: not where the superblock says, so a new one must be written first."""

    head_block: int
    next_sequence: int
    moved: bool
    records: int
    entries: int


class Ring:
    """The blocks of the intent log, read in."""

    def __init__(self, data: bytes | bytearray, pool_uuid: bytes) -> None:
        self._data = memoryview(data)
        self.blocks = len(data) // BLOCK_BYTES
        self._pool = pool_uuid[:8]

    def record_at(self, block: int) -> Record | None:
        """The record that begins there, or None."""
        head = self._data[block * BLOCK_BYTES : block * BLOCK_BYTES + RECORD_HEAD.size]
        magic, crc, sequence, cp_number, durable, pool, count, blocks = RECORD_HEAD.unpack(head)
        if magic != RECORD_MAGIC or pool != self._pool or not 0 < blocks <= self.blocks:
            return None
        if RECORD_HEAD.size + count * RECORD_ENTRY.size > blocks * BLOCK_BYTES:
            return None
        whole = bytearray(self._data[block * BLOCK_BYTES : (block + blocks) * BLOCK_BYTES])
        whole += self._data[: blocks * BLOCK_BYTES - len(whole)]
        whole[RECORD_CRC_OFFSET : RECORD_CRC_OFFSET + 4] = bytes(4)
        if crc32c(whole) != crc:
            return None
        end = RECORD_HEAD.size + count * RECORD_ENTRY.size
        entries = list(RECORD_ENTRY.iter_unpack(memoryview(whole)[RECORD_HEAD.size : end]))
        return Record(sequence, cp_number, durable, block, blocks, entries)

    def records_from(self, block: int, sequence: int) -> list[Record]:
        """All records from there on, as far as they follow one another."""
        found: list[Record] = []
        room = self.blocks
        while (record := self.record_at(block)) is not None and record.sequence == sequence and record.blocks <= room:
            found.append(record)
            block = (block + record.blocks) % self.blocks
            room -= record.blocks
            sequence += 1
        return found

    def holds_from(self, sequence: int) -> bool:
        """Whether a record of ``sequence`` or above lies in the ring: it was not synced, and those before it are lost."""
        for start in range(0, len(self._data), BLOCK_BYTES):
            magic, _, found, *_ = RECORD_HEAD.unpack_from(self._data, start)
            if magic == RECORD_MAGIC and found >= sequence and self.record_at(start // BLOCK_BYTES) is not None:
                return True
        return False

    def later_than(self, sequence: int) -> Record | None:
        """Any record of a higher sequence anywhere in the ring that says ``sequence`` was durable."""
        for start in range(0, len(self._data), BLOCK_BYTES):
            magic, _, found, _, durable, *_ = RECORD_HEAD.unpack_from(self._data, start)
            if magic == RECORD_MAGIC and found > sequence and durable >= sequence:
                record = self.record_at(start // BLOCK_BYTES)
                if record is not None:
                    return record
        return None


class Replay:
    """Replays the log of one pool, while nobody else works on it."""

    def __init__(self, state: PoolState, superblock: Superblock, catalogue: Catalogue) -> None:
        self._state = state
        self._superblock = superblock
        self._catalogue = catalogue
        self._slicer = Slicer()

    async def run(self) -> Replayed:
        """Apply the log. Raises BlockDamaged, DeviceFailed; damage that leaves the rest usable is reported and survived."""
        superblock = self._superblock
        ring = Ring(await self._read_ring(), superblock.uuid)
        records = ring.records_from(superblock.log_head_block, superblock.log_head_sequence)
        next_sequence = superblock.log_head_sequence + len(records)
        self._look_for_a_gap(ring, next_sequence)
        applied = await self._verified([record for record in records if record.cp_number > superblock.cp_number])
        entries = [entry for record in applied for entry in record.entries]
        for run in runs(entries):
            self._state.allocator.adopt(run[0][3], len(run))
        await self._apply(entries)
        head_block = records[-1].block + records[-1].blocks if records else superblock.log_head_block
        # A jump in the sequence: nothing left of a torn tail can ever be taken for a successor, also where the tail is all that there is.
        moved = bool(records) or ring.holds_from(next_sequence)
        jump = ring.blocks if moved else 0
        return Replayed(head_block % ring.blocks, next_sequence + jump, moved, len(applied), len(entries))

    async def _read_ring(self) -> bytearray:
        data = bytearray(self._superblock.log_blocks * BLOCK_BYTES)
        view = memoryview(data)
        starts = range(0, len(data), READ_BLOCKS * BLOCK_BYTES)
        parts = [(view[start : start + READ_BLOCKS * BLOCK_BYTES], LOG_FIRST_VBN * BLOCK_BYTES + start) for start in starts]
        # All at once: what the device has to fetch, it fetches together.
        await asyncio.gather(*(self._state.device.readv((part,), offset) for part, offset in parts))
        return data

    def _look_for_a_gap(self, ring: Ring, missing: int) -> None:
        """A later record that knows ``missing`` to be durable proves that the log is damaged, not torn."""
        later = ring.later_than(missing)
        if later is not None and later.cp_number > self._superblock.cp_number:
            self._state.fail(
                f"record {missing} of the intent log is damaged, later ones exist: acknowledged writes may be lost; restore a backup"
            )

    async def _verified(self, records: list[Record]) -> list[Record]:
        """The records to apply: up to the torn tail."""
        durable = max((record.durable_sequence for record in records), default=0)
        for position, record in enumerate(records):
            bad = await self._damaged_entries(record)
            if not bad:
                continue
            if record.sequence > durable:
                self._state.on_event("log.torn_tail", sequence=record.sequence, blocks_missing=len(bad))
                return records[:position]
            for number, _, fbn, vbn, _ in bad:
                self._state.on_event("block.damaged", image=number, offset_bytes=fbn * BLOCK_BYTES, vbn=vbn, durable=True)
        return records

    async def _damaged_entries(self, record: Record) -> list[Entry]:
        """Data entries whose block does not have the CRC32C that the record gives."""
        bad: list[Entry] = []
        buffer = memoryview(bytearray(min(len(record.entries), READ_BLOCKS) * BLOCK_BYTES))
        for run in runs(record.entries):
            first, last = run[0][3], run[-1][3]
            if last >= self._superblock.size_blocks:
                raise BlockDamaged(f"record {record.sequence} of the intent log names VBN {last}, beyond the pool: run `cleaved check`")
            data = buffer[: len(run) * BLOCK_BYTES]
            if not self._state.device.try_readv((data,), first * BLOCK_BYTES):
                await self._state.device.readv((data,), first * BLOCK_BYTES)
            blocks = range(0, len(data), BLOCK_BYTES)
            bad += [entry for entry, at in zip(run, blocks, strict=True) if crc32c(data[at : at + BLOCK_BYTES]) != entry[1]]
            await self._slicer.breathe()
        return bad

    async def _apply(self, entries: list[Entry]) -> None:
        """Install in the order of the log; neighbours that write data to one image go together."""
        start = 0
        for at in range(1, len(entries) + 1):
            together = at < len(entries) and self._joins(entries[at - 1], entries[at]) and at - start < STEP_ENTRIES
            if not together:
                await self._apply_step(entries[start:at])
                start = at

    @staticmethod
    def _joins(one: Entry, other: Entry) -> bool:
        return one[0] == other[0] and one[3] > ZERO_POINTER and other[3] > ZERO_POINTER

    async def _apply_step(self, entries: list[Entry]) -> None:
        number, _, fbn, vbn, count = entries[0]
        if self._catalogue.is_damaged(number):
            # Without changes there is no consistency point, so the log keeps what it has until the entry can be read.
            self._state.fail(f"the intent log holds writes of image {number}, whose table entry cannot be read: restore a copy of the pool")
            return
        image = self._catalogue.find(number)
        if image is None:
            self._state.on_event("log.unknown_image", image=number, entries=len(entries))
            for _, _, _, orphan, _ in entries:
                if orphan > ZERO_POINTER:
                    self._state.allocator.give_back([(orphan, 1)])
        elif vbn == ZERO_POINTER:
            await trim_blocks(image, fbn, count)
        else:
            await self._install(image, entries)

    async def _install(self, image: Image, entries: list[Entry]) -> None:
        targets = [(fbn, crc) for _, crc, fbn, _, _ in entries]
        indexes = indexes_of(targets)
        plan = await when_possible(self._state, lambda: plan_for(image, self._state.epoch, indexes))
        image.tree.carry_out(plan)
        install(image, plan.epoch, nodes_of(image, indexes), targets, [(run[0][3], len(run)) for run in runs(entries)])


def runs(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """The entries that write data, those whose blocks are neighbours on the device together, at most READ_BLOCKS."""
    start, following = 0, 0
    for at, (_, _, _, vbn, _) in enumerate(entries):
        if vbn != following or at - start == READ_BLOCKS:
            if at > start:
                yield entries[start:at]
            start = at
        if vbn <= ZERO_POINTER:
            start = at + 1
        following = vbn + 1
    if start < len(entries):
        yield entries[start:]
