"""The ring of the intent log as a stop left it: which records are whole, which are missing, and
what is left of those.

Sequence numbers are never used again (a replay goes on with a jump, see ``Replay.run``), so every
whole record from the superblock's head on belongs to the log, wherever it is found. Those that are
missing between them, or behind the last one, are what a ``Missing`` tells of.
"""

import asyncio
from dataclasses import dataclass, field

from storage.checksum import crc32c
from storage.device import Device
from storage.epoch.log_queue import LogEntry, follows
from storage.errors import PoolRefused, StorageError
from storage.layout import (
    BLOCK_BYTES,
    LOG_FIRST_VBN,
    RECORD_CRC,
    RECORD_CRC_OFFSET,
    RECORD_ENTRY,
    RECORD_HEAD,
    RECORD_MAGIC,
    RECORD_TAIL,
)
from storage.log.one_bit import flipped_bit
from storage.superblock.superblock import Superblock

# Blocks of the ring read at once. One that cannot be read must not cost its neighbours: they are
# then read one by one.
READ_BLOCKS = 256
NO_ENTRY: LogEntry = (0, 0, 0, 0, 0)


@dataclass
class Record:
    """One record of the intent log, as read back. Bit n of ``ends``: no write goes on past entry n.

    ``previous``: entries of the record before, and 1 more; 0 where that is not stated.
    """

    sequence: int
    cp_number: int
    durable_sequence: int
    block: int
    blocks: int
    entries: list[LogEntry]
    ends: int = 0
    previous: int = 0

    def unit(self, position: int) -> range:
        """Positions of the entries around one that may be of the same write, which is there
        entirely or not at all.

        The entries of a write are neighbours, and none of them but the last is marked as an end.
        """
        entries, first, end = self.entries, position, position + 1
        while first and self._joined(first - 1):
            first -= 1
        while end < len(entries) and self._joined(end - 1):
            end += 1
        return range(first, end)

    def _joined(self, position: int) -> bool:
        return not self.ends >> position & 1 and follows(
            self.entries[position], self.entries[position + 1]
        )


@dataclass
class Missing:
    """A record that should lie at ``block`` and is not whole. ``claims``: entries that may have
    been in it, none of them certain.

    ``at_end``: nothing follows it, so it may be that it never was.
    """

    sequence: int
    block: int
    unreadable: bool
    claims: list[LogEntry] = field(default_factory=list)
    at_end: bool = False


class Ring:
    """The blocks of the intent log, read in; those in ``unreadable`` hold zeros instead of what
    cannot be read.
    """

    def __init__(
        self, data: bytes | bytearray, pool_uuid: bytes, unreadable: frozenset[int] = frozenset()
    ) -> None:
        self._data = memoryview(data)
        self.blocks = len(data) // BLOCK_BYTES
        self.unreadable = unreadable
        self._pool = pool_uuid[:8]

    def block_bytes(self, block: int) -> memoryview:
        """The 4096 bytes of one block."""
        return self._data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]

    def record_at(self, block: int) -> Record | None:
        """The record that begins there, or None."""
        magic, crc, _, _, _, pool, count, blocks = RECORD_HEAD.unpack_from(self.block_bytes(block))
        if magic != RECORD_MAGIC or pool != self._pool or not 0 < blocks <= self.blocks:
            return None
        if RECORD_HEAD.size + count * RECORD_ENTRY.size > blocks * BLOCK_BYTES - RECORD_TAIL.size:
            return None
        whole = bytearray().join(
            self.block_bytes((block + step) % self.blocks) for step in range(blocks)
        )
        RECORD_CRC.pack_into(whole, RECORD_CRC_OFFSET, 0)
        return parsed(whole, block) if crc32c(whole) == crc else None

    def records_from(self, sequence: int) -> list[Record]:
        """All whole records of ``sequence`` and later, in their order."""
        found: dict[int, Record] = {}
        for block in range(self.blocks):
            magic, _, number, *_ = RECORD_HEAD.unpack_from(self.block_bytes(block))
            if (
                magic == RECORD_MAGIC
                and number >= sequence
                and (record := self.record_at(block)) is not None
            ):
                found[number] = record
        return [found[number] for number in sorted(found)]

    def missing(self, head_block: int, head_sequence: int, records: list[Record]) -> list[Missing]:
        """The records that are missing among ``records``, and the one behind them if something of
        it is there.
        """
        missing: list[Missing] = []
        block, sequence = head_block, head_sequence
        for record in records:
            missing += [
                self._missing((block + step) % self.blocks, sequence + step)
                for step in range(record.sequence - sequence)
            ]
            block, sequence = (record.block + record.blocks) % self.blocks, record.sequence + 1
        last = self._missing(block, sequence)
        last.at_end = True
        if (block != head_block or sequence == head_sequence) and (
            last.unreadable or self._begun_at(block, sequence)
        ):
            missing.append(last)
        return missing

    def mended(self, missing: Missing) -> Record | None:
        """The record that lies there if a single flipped bit is all that is wrong with it. For
        records that nobody can have torn.
        """
        block = bytearray(self.block_bytes(missing.block))
        (stored,) = RECORD_CRC.unpack_from(block, RECORD_CRC_OFFSET)
        RECORD_CRC.pack_into(block, RECORD_CRC_OFFSET, 0)
        difference = crc32c(block) ^ stored
        bit = (
            flipped_bit(BLOCK_BYTES, difference) if difference & (difference - 1) else None
        )  # else it is one of the CRC32C's own
        if bit is not None:
            block[bit[0]] ^= bit[1]
        elif difference & (difference - 1):
            return None
        record = parsed(block, missing.block)
        magic, _, _, _, _, pool, count, blocks = RECORD_HEAD.unpack_from(block)
        fits = (
            blocks == 1
            and RECORD_HEAD.size + count * RECORD_ENTRY.size <= BLOCK_BYTES - RECORD_TAIL.size
        )
        return (
            record
            if fits
            and magic == RECORD_MAGIC
            and pool == self._pool
            and record.sequence == missing.sequence
            else None
        )

    def _missing(self, block: int, sequence: int) -> Missing:
        claims: list[LogEntry] = []
        if (
            self.record_at(block) is None
        ):  # else a whole one of earlier is still there, which says nothing of this one
            claims = [
                entry
                for entry in parsed(
                    bytearray(self.block_bytes(block)), block, everything=True
                ).entries
                if entry != NO_ENTRY
            ]
        return Missing(sequence, block, block in self.unreadable, claims)

    def _begun_at(self, block: int, sequence: int) -> bool:
        """Whether a record of that sequence lies there, whole or not."""
        magic, _, number, _, _, pool, _, _ = RECORD_HEAD.unpack_from(self.block_bytes(block))
        return bool(magic == RECORD_MAGIC and pool == self._pool and number == sequence)


def parsed(whole: bytearray, block: int, everything: bool = False) -> Record:
    """What the bytes of a record say; ``everything``: also in the places behind its last entry."""
    _, _, sequence, cp_number, durable, _, count, _ = RECORD_HEAD.unpack_from(whole)
    end = (
        len(whole) - RECORD_TAIL.size
        if everything
        else RECORD_HEAD.size + count * RECORD_ENTRY.size
    )
    entries = list(RECORD_ENTRY.iter_unpack(memoryview(whole)[RECORD_HEAD.size : end]))
    ends, previous = RECORD_TAIL.unpack_from(whole, len(whole) - RECORD_TAIL.size)
    return Record(
        sequence,
        cp_number,
        durable,
        block,
        len(whole) // BLOCK_BYTES,
        entries,
        int.from_bytes(ends, "little"),
        previous,
    )


async def read_ring(device: Device, superblock: Superblock) -> Ring:
    """Read the whole ring. Raises PoolRefused when the superblock's words on it cannot be."""
    check_place(device, superblock)
    data = bytearray(superblock.log_blocks * BLOCK_BYTES)
    view = memoryview(data)
    starts = range(0, superblock.log_blocks, READ_BLOCKS)
    pieces = [view[start * BLOCK_BYTES : (start + READ_BLOCKS) * BLOCK_BYTES] for start in starts]
    # All at once: what the device has to fetch, it fetches together.
    reads = [
        device.readv((piece,), (LOG_FIRST_VBN + start) * BLOCK_BYTES)
        for start, piece in zip(starts, pieces, strict=True)
    ]
    outcomes = await asyncio.gather(*reads, return_exceptions=True)
    unreadable: set[int] = set()
    for start, piece, outcome in zip(starts, pieces, outcomes, strict=True):
        if isinstance(outcome, StorageError):
            unreadable.update(
                start + bad for bad in await read_singly(device, piece, LOG_FIRST_VBN + start)
            )
        elif outcome is not None:
            raise outcome
    return Ring(data, superblock.uuid, frozenset(unreadable))


def check_place(device: Device, superblock: Superblock) -> None:
    """Raise PoolRefused for a log that lies beyond the pool, or whose head lies beyond the log."""
    blocks, head = superblock.log_blocks, superblock.log_head_block
    if not 0 < blocks <= superblock.size_blocks - LOG_FIRST_VBN or not 0 <= head < blocks:
        raise PoolRefused(
            f"{device.path}: the superblock says that the intent log has {blocks} blocks and its"
            f" head is block {head} of them, which cannot be in a pool of {superblock.size_blocks}"
            " blocks: run `cleaved check`, and restore it from a copy"
        )


async def read_singly(device: Device, piece: memoryview, vbn: int) -> list[int]:
    """Read neighbouring blocks one by one, after a read of all failed; returns which cannot be
    read. Those are filled with zeros.
    """
    bad: list[int] = []
    for position in range(len(piece) // BLOCK_BYTES):
        block = piece[position * BLOCK_BYTES : (position + 1) * BLOCK_BYTES]
        try:
            await device.readv((block,), (vbn + position) * BLOCK_BYTES)
        except StorageError:
            block[:] = bytes(BLOCK_BYTES)
            bad.append(position)
    return bad
