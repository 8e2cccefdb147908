"""The intent log: what was changed since the last consistency point, as small records in a ring
(design section 4).

Data lies in its final place before a record lists where; replay verifies each block against the
CRC32C in the record.

Two things bring changes into the log:
- ``note``, after each batch of writes: the record goes to the device *without a sync*. That costs
  one short write, and means that a crash of the process (kill -9, out of memory) loses nothing that
  was acknowledged, as long as the machine goes on. Where the record cannot be written at once, the
  acknowledgement waits (``when_noted``).
- ``flush``: one sync makes all records and their data durable, shared by all flushes that wait
  (group commit).

Invariants:
- Records have consecutive sequence numbers and lie one after the other in the ring; entries are in
  the order of the changes.
- A record that was there when a sync was asked for is never written over until a consistency point
  has made it superfluous.
- ``durable_sequence`` in a record is the highest one whose sync had succeeded when that record was
  last written.
- After a sync, before anybody is told, the newest record says so (``_say_durable``), without a sync
  of its own. So after the death of the process replay knows what had been promised; after a loss of
  power it may not.
- A record holds changes of one epoch and carries its number. Replay over consistency point n skips
  records up to n. Changes of the frozen epoch are logged before any of the current one, so the
  order of the ring is the order of the changes.
- A consistency point moves the head to where the ring stood at its freeze.
"""

import asyncio
from collections.abc import Callable

from storage.epoch.log_queue import LogQueue
from storage.errors import DeviceFailed, DeviceFull, as_storage_error
from storage.layout import BLOCK_BYTES, ENTRIES_PER_RECORD
from storage.log.record import LogRecord
from storage.slicer import Slicer
from storage.state.host_room import HostRoom
from storage.state.point_requests import PointRequests
from storage.state.pool_state import PoolState

Completion = Callable[[Exception | None], None]

# Records filled by one ``note``: about half a millisecond; the rest follows with the next one, or
# with a flush.
RECORDS_PER_NOTE = 16
# A consistency point is asked for when this part of the ring is full.
FILL_WANTED = 0.5


class IntentLog:
    """The ring, the record that is open, and the flushes that wait."""

    __slots__ = (
        "_blocks",
        "_durable_sequence",
        "_flushing",
        "_host_room",
        "_in_threads",
        "_mark_sequence",
        "_newest",
        "_noting",
        "_open",
        "_pool_uuid",
        "_requests",
        "_state",
        "_unwritten",
        "_used_blocks",
        "_worker",
        "commits",
        "head_block",
        "held",
        "next_sequence",
    )

    def __init__(
        self,
        state: PoolState,
        host_room: HostRoom,
        requests: PointRequests,
        pool_uuid: bytes,
        blocks: int,
        head_block: int,
        next_sequence: int,
    ) -> None:
        self._state = state
        self._host_room = host_room
        self._requests = requests
        self._pool_uuid = pool_uuid
        self._blocks = blocks
        self._open: LogRecord | None = None
        # The last that was begun, open or not.
        self._newest: LogRecord | None = None
        # Records that the device did not take at once, oldest first; the open one may be the last
        # of them.
        self._unwritten: list[LogRecord] = []
        # Whether the threads are writing the first of them: none may overtake it.
        self._in_threads = False
        self._mark_sequence = 0
        self._used_blocks = 0
        # What waits until everything is in the log, and what until it is durable as well; one Task
        # serves both.
        self._noting: list[Completion] = []
        self._flushing: list[Completion] = []
        self._worker: asyncio.Task[None] | None = None
        self.commits = 0
        # Nothing may be logged until a consistency point has said where the log begins (after a
        # replay that ended elsewhere).
        self.held = False
        self.begin_at(head_block, next_sequence)

    def begin_at(self, head_block: int, next_sequence: int) -> None:
        """Where the next record goes: known at open, and again after replay."""
        self.head_block = head_block
        self.next_sequence = next_sequence
        self._durable_sequence = next_sequence - 1
        self._newest = None

    @property
    def records(self) -> int:
        """Records of changes that the last durable consistency point does not hold: what the next
        opening would replay.
        """
        only_a_mark = self._open is not None and self._open.empty
        return self._used_blocks - only_a_mark

    # --- Called by the consistency point ----------------------------------------------------------

    def mark(self) -> tuple[int, int, int]:
        """At a freeze: where the next record will lie (block, sequence), and how much of the ring
        is used by then.
        """
        self._open = None
        self._mark_sequence = self.next_sequence
        return self.head_block, self.next_sequence, self._used_blocks

    def trim(self, used_blocks_at_mark: int) -> None:
        """A consistency point is durable: what lay before its mark is no longer needed."""
        self._used_blocks -= used_blocks_at_mark
        self._unwritten = [
            record for record in self._unwritten if record.sequence >= self._mark_sequence
        ]

    # --- Noting changes ---------------------------------------------------------------------------

    def note(self) -> bool:
        """Write what is not logged yet, as far as that is possible at once and without a sync.
        Returns whether that is all there is.

        Called between writes, so that all of them that were begun are there whole.
        """
        frozen = self._state.frozen
        if frozen is not None:
            frozen.unlogged.note_end()
        self._state.epoch.unlogged.note_end()
        for _ in range(RECORDS_PER_NOTE):
            queue = self._next_queue()
            if queue is None:
                break
            record = self._record_for(queue)
            if record is None:
                break
            entries = queue.take(record.room, ENTRIES_PER_RECORD)
            if not entries:
                self._open = None
                continue
            record.add(entries)
            self._to_be_written(record)
        self._write_out()
        return not self._unwritten and self._next_queue() is None

    def when_noted(self, done: Completion) -> None:
        """Call ``done`` when every change installed before this call is in the log: for a caller
        that ``note`` told False.
        """
        self._noting.append(done)
        self._work()

    def _next_queue(self) -> LogQueue | None:
        """The changes that are to be logged next: all of the frozen epoch's first."""
        frozen, queue = self._state.frozen, self._state.epoch.unlogged
        if frozen is not None and frozen.unlogged.entries:
            return frozen.unlogged
        return queue if queue.entries else None

    def _record_for(self, queue: LogQueue) -> LogRecord | None:
        """The open record if it can take more of this epoch, else a new one; None when the ring is
        full, or the epoch cannot be logged.
        """
        record = self._open
        if record is not None and record.room and record.cp_number == queue.cp_number:
            return record
        return None if queue.by_reference else self._begin_record(queue.cp_number)

    def _begin_record(self, cp_number: int) -> LogRecord | None:
        """A new record, the open one from now on; None when the ring is full."""
        if self.held or self._used_blocks >= self._blocks:
            return None
        record = LogRecord(
            self.head_block,
            self.next_sequence,
            cp_number,
            self._durable_sequence,
            self._pool_uuid,
            self._newest,
        )
        self.head_block = (self.head_block + 1) % self._blocks
        self.next_sequence += 1
        self._used_blocks += 1
        self._open = self._newest = record
        if self._used_blocks > self._blocks * FILL_WANTED and self._state.frozen is None:
            self._requests.want()
        return record

    def _to_be_written(self, record: LogRecord) -> None:
        if not self._unwritten or self._unwritten[-1] is not record:
            self._unwritten.append(record)

    def _write_out(self) -> None:
        """Write records that are not on the device as they are, in their order, until it would have
        to be waited for.
        """
        device = self._state.device
        if self._in_threads:
            return
        try:
            while self._unwritten and device.try_writev(
                (self._unwritten[0].buf,), self._unwritten[0].offset_bytes, BLOCK_BYTES
            ):
                del self._unwritten[0]
        except DeviceFull as full:
            self._host_room.met(
                full
            )  # the record stays, and with it what waits for its changes: see ``_write_rest``
        except DeviceFailed as failure:
            self._state.fail(f"the device failed to take a record of the intent log: {failure}")

    # --- Flushing ---------------------------------------------------------------------------------

    def flush(self, done: Completion) -> None:
        """Make every change installed before this call durable, then call ``done``."""
        self._flushing.append(done)
        self._work()

    async def durable_by_point(self) -> None:
        """Make everything durable by a consistency point, not by the log. Raises PoolReadOnly,
        DeviceFailed, HostStaysFull.
        """
        await asyncio.shield(self._requests.request())

    async def drain(self) -> None:
        """Wait until nobody waits for the log any more."""
        while self._worker is not None:
            await asyncio.shield(self._worker)

    def _work(self) -> None:
        if self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        try:
            while self._noting or self._flushing:
                noting, self._noting = self._noting, []
                flushing, self._flushing = self._flushing, []
                error: Exception | None = None
                try:
                    await self._commit(durable=bool(flushing))
                except Exception as failure:  # noqa: BLE001
                    # Whatever it was: everybody is answered, and the next ones are served.
                    error = as_storage_error(failure)
                for done in (*noting, *flushing):
                    done(error)
        finally:
            self._worker = None

    async def _commit(self, durable: bool) -> None:
        """Log what is not logged yet, and sync if it is to be durable. Raises DeviceFailed,
        PoolReadOnly.
        """
        state, slicer = self._state, Slicer()
        state.check_writable()
        while self._next_queue() is not None:
            before = self.next_sequence
            self.note()
            if self._next_queue() is not None and self.next_sequence == before:
                break
            await slicer.breathe()
        by_reference = any(
            epoch is not None and epoch.unlogged.by_reference
            for epoch in (state.frozen, state.epoch)
        )
        if self._next_queue() is not None or (durable and by_reference):
            await self.durable_by_point()
            return
        state.check_writable()  # noting may just have failed
        try:
            await self._put_down(durable)
        except DeviceFailed as failure:
            state.fail(f"the device failed to make data durable: {failure}")
            raise

    async def _put_down(self, durable: bool) -> None:
        """Have all records that there are now written, and synced with their data if asked for."""
        # The open one is closed: nobody may change what a thread writes, nor write over what is
        # durable. A mark holds nothing that anybody counts on, and stays open: flushes without a
        # change between them take no room in the ring.
        last_sequence = self.next_sequence - 1
        if self._open is not None and self._open.empty:
            last_sequence -= 1
        else:
            self._open = None
        await self._write_rest(last_sequence)
        if durable:
            await self._state.device.sync()
            self.commits += 1
            if last_sequence > self._durable_sequence:
                self._durable_sequence = last_sequence
                self._say_durable()

    def _say_durable(self) -> None:
        """Have the newest record say what is durable now: the open one, or the next one, begun
        without entries as a mark.
        """
        record = self._open or self._begin_record(self._state.epoch.number)
        if record is not None:
            record.say_durable(self._durable_sequence)
            self._to_be_written(record)
            self._write_out()

    async def _write_rest(self, last_sequence: int) -> None:
        """Write by the threads, one after the other, what the device does not take at once."""
        while self._unwritten and self._unwritten[0].sequence <= last_sequence:
            record = self._unwritten[0]
            self._in_threads = True
            try:
                await self._host_room.put((record.buf,), record.offset_bytes)
            finally:
                self._in_threads = False
            if (
                self._unwritten and self._unwritten[0] is record
            ):  # else a consistency point has made it superfluous
                del self._unwritten[0]
