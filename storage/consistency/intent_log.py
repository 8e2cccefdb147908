"""The intent log: one record and one sync make a flush durable, whatever is waiting for it (design section 4).

Data lies in its final place before its record is written; the record lists where. Both become durable by the same sync, so after a
crash a record may be there without its data: replay verifies each block against the CRC32C in the record.

Invariants:
- Records have consecutive sequence numbers and lie one after the other in the ring. One is in flight at a time, so when record s is
  written, all up to s-1 are durable (``durable_sequence``).
- A record holds changes of one epoch and carries its number. Replay over consistency point n skips records up to n: so a flush that
  comes while consistency point n runs can still log changes of epoch n.
- A consistency point moves the head to where the ring stood at its freeze.
"""

import asyncio
from collections.abc import Callable

from crc32c import crc32c

from storage.consistency.epoch import Epoch, LogEntry
from storage.errors import DeviceFailed, as_storage_error
from storage.layout import BLOCK_BYTES, LOG_FIRST_VBN, RECORD_CRC_OFFSET, RECORD_ENTRY, RECORD_HEAD, RECORD_MAGIC
from storage.slices import CHUNK, Slicer
from storage.state import PoolState

FlushCompletion = Callable[[Exception | None], None]

# A record of this many entries is 2 MiB; more than that is cheaper as a consistency point.
RECORD_ENTRIES_MAX = 65536
# A consistency point is asked for when this part of the ring is full.
FILL_WANTED = 0.5


def record_blocks(entries: int) -> int:
    """Length in blocks of a record with that many entries."""
    return -(-(RECORD_HEAD.size + entries * RECORD_ENTRY.size) // BLOCK_BYTES)


async def encode_record(sequence: int, cp_number: int, durable_sequence: int, pool_uuid: bytes, entries: list[LogEntry]) -> bytearray:
    """One record, padded to whole blocks (layout.RECORD_HEAD, RECORD_ENTRY), made in slices; ``entries`` is empty afterwards."""
    slicer = Slicer()
    record = _unsealed_record(sequence, cp_number, durable_sequence, pool_uuid, len(entries))
    while entries:
        start = (len(entries) - 1) // CHUNK * CHUNK
        _encode_entries(record, start, entries[start:])
        del entries[start:]
        await slicer.breathe()
    _seal(record)
    return record


def _unsealed_record(sequence: int, cp_number: int, durable_sequence: int, pool_uuid: bytes, entry_count: int) -> bytearray:
    blocks = record_blocks(entry_count)
    record = bytearray(blocks * BLOCK_BYTES)
    RECORD_HEAD.pack_into(record, 0, RECORD_MAGIC, 0, sequence, cp_number, durable_sequence, pool_uuid[:8], entry_count, blocks)
    return record


def _encode_entries(record: bytearray, position: int, entries: list[LogEntry]) -> None:
    """Entries from number ``position`` on."""
    at = RECORD_HEAD.size + position * RECORD_ENTRY.size
    pack_into = RECORD_ENTRY.pack_into
    for entry in entries:
        pack_into(record, at, *entry)
        at += RECORD_ENTRY.size


def _seal(record: bytearray) -> None:
    record[RECORD_CRC_OFFSET : RECORD_CRC_OFFSET + 4] = crc32c(record).to_bytes(4, "little")


class IntentLog:
    """Group commit: all flushes that wait share the next record."""

    __slots__ = (
        "_blocks",
        "_committing",
        "_pool_uuid",
        "_state",
        "_used_blocks",
        "_waiting",
        "commits",
        "durable_by_cp",
        "head_block",
        "next_sequence",
    )

    def __init__(self, state: PoolState, pool_uuid: bytes, blocks: int, head_block: int, next_sequence: int) -> None:
        self._state = state
        self._pool_uuid = pool_uuid
        self._blocks = blocks
        self.head_block = head_block
        self.next_sequence = next_sequence
        self._used_blocks = 0
        self._waiting: list[FlushCompletion] = []
        self._committing: asyncio.Task[None] | None = None
        self.commits = 0
        # Makes everything durable by a consistency point instead; set by it.
        self.durable_by_cp: Callable[[], asyncio.Future[None]]

    def flush(self, done: FlushCompletion) -> None:
        """Make every change installed before this call durable, then call ``done``."""
        self._waiting.append(done)
        if self._committing is None:
            self._committing = asyncio.get_running_loop().create_task(self._commit_all())

    async def drain(self) -> None:
        """Wait until no flush is waiting or under way."""
        while self._committing is not None:
            await asyncio.shield(self._committing)

    def mark(self) -> tuple[int, int, int]:
        """At a freeze: where the next record will lie (block, sequence), and how much of the ring is used by then."""
        return self.head_block, self.next_sequence, self._used_blocks

    def trim(self, used_blocks_at_mark: int) -> None:
        """A consistency point is durable: what lay before its mark is no longer needed."""
        self._used_blocks -= used_blocks_at_mark

    async def _commit_all(self) -> None:
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                error: Exception | None = None
                try:
                    await self._commit()
                except Exception as failure:  # noqa: BLE001
                    # Whatever it was: each flush is answered, and the next ones are taken.
                    error = as_storage_error(failure)
                for done in waiting:
                    done(error)
        finally:
            self._committing = None

    async def _commit(self) -> None:
        """Write what is not logged yet, then sync. Raises DeviceFailed, PoolReadOnly."""
        state = self._state
        state.check_writable()
        epochs = [epoch for epoch in (state.frozen, state.epoch) if epoch is not None and (epoch.unlogged or epoch.by_reference)]
        try:
            for epoch in epochs[:-1]:
                if self._fits(epoch):
                    await self._append(epoch)
                    await state.device.sync()  # a record may say of those before it that they are durable
            # Looked at only now: while the record before was written, more changes may have come.
            if not all(map(self._fits, epochs)):
                await asyncio.shield(self.durable_by_cp())
                return
            for epoch in epochs[-1:]:
                await self._append(epoch)
            await state.device.sync()
        except DeviceFailed as failure:
            state.fail(f"the device failed to make data durable: {failure}")
            raise
        self.commits += 1
        if self._used_blocks > self._blocks * FILL_WANTED:
            state.wanted()

    def _fits(self, epoch: Epoch) -> bool:
        """Whether what the epoch has not logged yet is one record for which the ring has room now (nothing always fits)."""
        entries = len(epoch.unlogged)
        if epoch.by_reference:
            return False
        return entries <= RECORD_ENTRIES_MAX and (not entries or record_blocks(entries) <= self._blocks - self._used_blocks)

    async def _append(self, epoch: Epoch) -> None:
        entries, epoch.unlogged = epoch.unlogged, []
        # A freeze may come while this waits: then the record lies behind its mark and is skipped by its number (see the invariants).
        record = await encode_record(self.next_sequence, epoch.number, self.next_sequence - 1, self._pool_uuid, entries)
        blocks = len(record) // BLOCK_BYTES
        at = self.head_block
        self.head_block = (at + blocks) % self._blocks
        self.next_sequence += 1
        self._used_blocks += blocks
        first = min(blocks, self._blocks - at) * BLOCK_BYTES
        view = memoryview(record)
        await self._write(view[:first], at)
        if first < len(record):
            await self._write(view[first:], 0)

    async def _write(self, data: memoryview, block: int) -> None:
        offset = (LOG_FIRST_VBN + block) * BLOCK_BYTES
        device = self._state.device
        if not device.try_writev((data,), offset, len(data)):
            await device.writev((data,), offset)
