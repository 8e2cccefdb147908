"""A volume: one vdisk or snapshot as clients reach it. It satisfies the wire's BlockVolume without
knowing of it.

The hot path is synchronous: ``try_read``, and ``write`` + ``settle``, finish at once when the
pointer blocks are in memory and the page cache answers. What has to wait becomes one Task a batch
(design section 3).

Ordering: commands that are under way at the same time have no order. A partial block is read,
merged and written in one step, or under the block's lock when it has to wait; whole blocks need no
lock, because they replace a pointer in one step.
"""

from collections.abc import Callable

from storage.checksum import crc32c
from storage.data import read_path, write_path
from storage.data.allocation_report import allocated_bytes
from storage.data.long_write import LONG_BYTES_MIN, PIECE_BYTES, write_long
from storage.errors import (
    BlockDamaged,
    DeviceFailed,
    NotByReference,
    PoolReadOnly,
    VolumeClosed,
    as_storage_error,
)
from storage.fields import CRC_MASK
from storage.images.image import Image
from storage.layout import (
    BLOCK_BYTES,
    BLOCK_MASK,
    BLOCK_SHIFT,
    FIELDS_MASK,
    FIELDS_SHIFT,
    KIND_VDISK,
    ZERO_POINTER,
)
from storage.log.intent_log import IntentLog
from storage.state.host_room import HostRoom
from storage.vdisks.counters import Counters
from storage.vdisks.open_image import OpenImage
from storage.vdisks.range_changes import RangeChanges

Buffer = bytes | bytearray | memoryview
Completion = Callable[[Exception | None], None]
ReadCompletion = Callable[[Buffer | None, Exception | None], None]
AllocationCompletion = Callable[[list[tuple[int, bool]] | None, Exception | None], None]
Write = tuple[int, Buffer, bool, Completion]

# A batch above this goes by the I/O threads anyway, and one write at a time, so that no copy of a
# large batch is made.
BATCH_BYTES_MAX = 1 << 20


def cut(blocks: bytearray, offset_bytes: int, length_bytes: int) -> Buffer:
    """The bytes that were asked for, of the whole blocks that they lie in."""
    start = offset_bytes & BLOCK_MASK
    if len(blocks) == length_bytes:
        return blocks
    return memoryview(blocks)[start : start + length_bytes]


class Volume(OpenImage):
    """One image, as clients read and write it."""

    __slots__ = ("_batch", "_batch_bytes", "_changes", "_locks", "_log")

    def __init__(
        self,
        image: Image,
        name: str,
        host_room: HostRoom,
        log: IntentLog,
        counters: Counters,
        unused: Callable[[], None],
    ) -> None:
        super().__init__(image, name, host_room, counters, unused)
        self._log = log
        self._batch: list[Write] = []
        self._batch_bytes = 0
        self._changes = RangeChanges(image)
        self._locks = self._changes.locks

    # --- Reading ----------------------------------------------------------------------------------

    def try_read(self, offset_bytes: int, length_bytes: int) -> Buffer | None:
        """The bytes at once, or None when they have to be waited for, or cannot be read. Raises
        OutOfRange, VolumeClosed.
        """
        try:
            image = self.image
            if offset_bytes + length_bytes > image.limit_bytes or self._closed:
                self.refuse(offset_bytes, length_bytes)
            if length_bytes == BLOCK_BYTES and not offset_bytes & BLOCK_MASK:
                fbn = offset_bytes >> BLOCK_SHIFT
                tree = image.tree
                node = tree.leaves.get(fbn >> FIELDS_SHIFT) or tree.peek(fbn >> FIELDS_SHIFT)
                if node is None:
                    return None
                slot = (fbn & FIELDS_MASK) * 2  # inlines field_at of storage.fields
                vbn = node.q[slot]
                if vbn > ZERO_POINTER:
                    data = bytearray(BLOCK_BYTES)
                    if not self.state.device.try_readv((data,), vbn << BLOCK_SHIFT):
                        return None
                    if crc32c(data) != node.q[slot + 1] & CRC_MASK:
                        return None  # `read` says so, and where
                    node.referenced = True
                    self.count_read(BLOCK_BYTES)
                    return data
            if not length_bytes:
                return b""
            first = offset_bytes >> BLOCK_SHIFT
            count = (offset_bytes + length_bytes + BLOCK_MASK >> BLOCK_SHIFT) - first
            blocks = read_path.try_read_blocks(image, first, count)
            if blocks is None:
                return None
            self.count_read(length_bytes)
            return cut(blocks, offset_bytes, length_bytes)
        except (BlockDamaged, DeviceFailed):
            return None  # `read` tries again, and says what it is

    def read(self, offset_bytes: int, length_bytes: int, done: ReadCompletion) -> None:
        """Read by way of the I/O threads, then call ``done``."""
        self.spawn(self._read(offset_bytes, length_bytes, done))

    async def _read(self, offset_bytes: int, length_bytes: int, done: ReadCompletion) -> None:
        try:
            if offset_bytes + length_bytes > self.image.limit_bytes or self._closed:
                self.refuse(offset_bytes, length_bytes)
            first = offset_bytes >> BLOCK_SHIFT
            count = (offset_bytes + length_bytes + BLOCK_MASK >> BLOCK_SHIFT) - first
            blocks = await read_path.read_blocks(self.image, first, count)
            self.check_still_there(offset_bytes, length_bytes)
        except Exception as error:  # noqa: BLE001
            failure = as_storage_error(error)
            await read_path.locate_failure(self.image, offset_bytes, length_bytes, failure)
            done(None, failure)
            return
        self.count_read(length_bytes)
        done(cut(blocks, offset_bytes, length_bytes), None)

    # --- Writing ----------------------------------------------------------------------------------

    def write(self, offset_bytes: int, data: Buffer, fua: bool, done: Completion) -> None:
        """Take a write into the batch; ``data`` must stay valid until the next
        ``settle`` returns.
        """
        self._batch.append((offset_bytes, data, fua, done))
        self._batch_bytes += len(data)

    def settle(self) -> None:
        """Carry out the batch: at once where nothing has to be waited for, else by one Task with
        its own copy of the data.
        """
        batch, total = self._batch, self._batch_bytes
        if not batch:
            return
        self._batch, self._batch_bytes = [], 0
        if total > BATCH_BYTES_MAX or self._locks.held:
            self.spawn(
                self._write_later(
                    [(offset, bytes(data), fua, done) for offset, data, fua, done in batch]
                )
            )
            return
        whole: list[Write] = []
        whole_bytes = 0
        for write in batch:
            length = len(write[1])
            alone = (write[0] | length) & BLOCK_MASK or length >= LONG_BYTES_MIN
            if not alone:
                whole.append(write)
                whole_bytes += length
            if alone or whole_bytes > PIECE_BYTES - LONG_BYTES_MIN:
                self._write_whole(whole)
                whole, whole_bytes = [], 0
            if alone:
                self._write_alone(write)
        self._write_whole(whole)

    def _write_alone(self, write: Write) -> None:
        """A write that is long, or covers parts of blocks."""
        if (write[0] | len(write[1])) & BLOCK_MASK:
            self._write_partial(write)
        else:
            self._write_long(write)

    def _write_long(self, write: Write) -> None:
        """A write of many whole blocks, piece by piece; what cannot be done now, later."""
        offset, data, fua, done = write
        try:
            self._check([write])
            written = write_long(self.image, offset, data)
        except Exception as error:  # noqa: BLE001
            done(self.failure(error))
            return
        if written == len(data):
            self._written([write])
            return
        self.counters.written_bytes += written
        self.spawn(
            self._write_later([(offset + written, bytes(memoryview(data)[written:]), fua, done)])
        )

    def _write_whole(self, batch: list[Write]) -> None:
        """Writes of whole blocks, as one allocation and one call to the device."""
        if not batch:
            return
        targets: list[write_path.Target] = []
        buffers: list[Buffer] = []
        try:
            self._check(batch)
            for offset, data, _, _ in batch:
                write_path.split_blocks(offset >> BLOCK_SHIFT, data, targets, buffers)
            finished = write_path.write_now(self.image, targets, buffers)
        except Exception as error:  # noqa: BLE001
            if len(batch) == 1:
                batch[0][3](self.failure(error))
                return
            for write in batch:  # one failure must not fail the others
                self._write_whole([write])
            return
        if finished:
            self._written(batch)
        else:
            self.spawn(
                self._write_later(
                    [(offset, bytes(data), fua, done) for offset, data, fua, done in batch]
                )
            )

    def _write_partial(self, write: Write) -> None:
        """A write that covers parts of blocks: read, merge and write in one step, or later under
        the blocks' locks.
        """
        offset, data, fua, done = write
        try:
            self._check([write])
            finished = self._merge_now(offset, data)
        except Exception as error:  # noqa: BLE001
            done(self.failure(error))
            return
        if finished:
            self._written([write])
        else:
            self.spawn(self._write_later([(offset, bytes(data), fua, done)]))

    def _merge_now(self, offset: int, data: Buffer) -> bool:
        first = offset >> BLOCK_SHIFT
        old = read_path.try_read_blocks(
            self.image, first, (offset + len(data) + BLOCK_MASK >> BLOCK_SHIFT) - first
        )
        if old is None:
            return False
        old[offset & BLOCK_MASK : (offset & BLOCK_MASK) + len(data)] = data
        targets: list[write_path.Target] = []
        buffers: list[Buffer] = []
        write_path.split_blocks(first, old, targets, buffers)
        return write_path.write_now(self.image, targets, buffers)

    def _check(self, batch: list[Write]) -> None:
        """Raise for a batch that cannot be written: PoolReadOnly, VolumeClosed, OutOfRange."""
        image = self.image
        if self._closed:
            self.refuse(0, 0)
        if image.kind != KIND_VDISK:
            raise PoolReadOnly(
                f"{self.name} is a snapshot, which never changes: clone it, and write to the clone"
            )
        self.state.check_writable()
        for offset, data, _, _ in batch:
            if offset + len(data) > image.limit_bytes:
                self.refuse(offset, len(data))

    def _written(self, batch: list[Write]) -> None:
        """Installed: note it in the log, and acknowledge, after a sync where durability was asked
        for.
        """
        noted = self._log.note()
        counters = self.counters
        counters.writes += len(batch)
        self.state.operations += len(batch)
        for _, data, fua, done in batch:
            counters.written_bytes += len(data)
            if fua:
                self._log.flush(done)
            elif noted:
                done(None)
            else:
                self._log.when_noted(done)

    async def _write_later(self, batch: list[Write]) -> None:
        for write in batch:
            offset, data, _, done = write
            try:
                self._check([write])
                if data:
                    await self._changes.write(offset, data)
            except Exception as error:  # noqa: BLE001
                done(self.failure(error))
            else:
                self._written([write])

    # --- Trimming and flushing --------------------------------------------------------------------

    def unmap(self, offset_bytes: int, length_bytes: int, done: Completion) -> None:
        """Deallocate whole blocks and zero the partial ones at the ends: the range reads as zeros,
        and hides the backing store.
        """
        self.write_zeros(offset_bytes, length_bytes, False, done)

    def write_zeros(
        self, offset_bytes: int, length_bytes: int, fua: bool, done: Completion
    ) -> None:
        """Make the range zeros, stored as zero pointers."""
        self.spawn(self._write_zeros(offset_bytes, length_bytes, fua, done))

    async def _write_zeros(self, offset: int, length: int, fua: bool, done: Completion) -> None:
        try:
            self._check([(offset, b"", fua, done)])
            if offset + length > self.image.limit_bytes:
                self.refuse(offset, length)
            await self._changes.write_zeros(offset, offset + length)
            noted = self._log.note()
        except Exception as error:  # noqa: BLE001
            done(self.failure(error))
            return
        self.counters.trims += 1
        self.state.operations += 1
        if fua:
            self._log.flush(done)
        elif noted:
            done(None)
        else:
            self._log.when_noted(done)

    def allocation(
        self, offset_bytes: int, length_bytes: int, runs_max: int, done: AllocationCompletion
    ) -> None:
        """Which runs from the offset on are allocated, in order; it may end early. What shows
        through holes counts as allocated.
        """
        self.spawn(self._allocation(offset_bytes, length_bytes, runs_max, done))

    async def _allocation(
        self, offset: int, length: int, runs_max: int, done: AllocationCompletion
    ) -> None:
        try:
            self.check_range(offset, length)
            runs = await allocated_bytes(self.image, offset, length, runs_max)
            self.check_still_there(offset, length)
        except Exception as error:  # noqa: BLE001
            done(None, as_storage_error(error))
            return
        done(runs, None)

    def copy_from(
        self,
        source: object,
        source_offset_bytes: int,
        offset_bytes: int,
        length_bytes: int,
        done: Completion,
    ) -> None:
        """Make whole blocks read as those of another volume, by reference. An error with
        EOPNOTSUPP: not a volume of this pool.
        """
        if isinstance(source, Volume) and source.state is self.state:
            self.spawn(
                self._copy_from(source, source_offset_bytes, offset_bytes, length_bytes, done)
            )
        else:
            done(
                NotByReference(
                    f"{self.name} can take references only from a volume of its own pool: copy the"
                    " data"
                )
            )

    async def _copy_from(
        self, source: "Volume", source_offset: int, offset: int, length: int, done: Completion
    ) -> None:
        try:
            self._check([(offset, b"", False, done)])
            if (source_offset | offset | length) & BLOCK_MASK:
                self.refuse(offset, length)
            source.check_range(source_offset, length)
            self.check_range(offset, length)
            await self._changes.copy(source.image, source_offset, offset, length)
            # The log cannot say it: so that not even a crash of the process loses it, it is durable
            # before it is answered.
            await self._log.durable_by_point()
        except Exception as error:  # noqa: BLE001
            done(as_storage_error(error))
            return
        self.counters.writes += 1
        self.state.operations += 1
        done(None)

    def flush(self, done: Completion) -> None:
        """Make every write that was completed before this call durable."""
        self.counters.flushes += 1
        if self._closed:
            done(VolumeClosed(f"{self.name} is no longer there"))
            return
        if self.image.kind != KIND_VDISK:
            done(None)
            return
        self._log.flush(done)
