"""The narrow interface through which the wire protocols reach a disk. A vdisk and a snapshot of
`storage` satisfy it.

Rules that make the hot path possible (design section 3):

- ``try_read`` and ``write`` + ``settle`` make no Task, Future or coroutine when nothing has to be
  waited for.
- A completion is called exactly once; it may be called before the method that took it returns.
- Errors are given to completions (or raised by ``try_read``), and each carries an ``errno``
  attribute (EIO: the block's checksum failed or the device did; ENOSPC: the pool is full; EROFS:
  read-only; EINVAL: out of range; ESHUTDOWN: the volume is going away), from which each protocol
  makes its own status. That of a read may have ``offset_bytes``, the first byte of the volume that
  could not be read, or None.
"""

from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable
from uuid import UUID

Buffer = bytes | bytearray | memoryview
Completion = Callable[[Exception | None], None]
ReadCompletion = Callable[[Buffer | None, Exception | None], None]
# Runs from the offset asked for, in order: (length in bytes, whether blocks are allocated there).
# At least one; they may end early.
AllocationCompletion = Callable[[list[tuple[int, bool]] | None, Exception | None], None]

# A write of whole 4 KiB blocks up to this length (WRITE ATOMIC tells clients so) is, after any
# crash, there entirely or not at all, and a read sees it so. 128 KiB is above the pages and journal
# blocks of every database that asks for atomic writes.
ATOMIC_WRITE_BYTES_MAX: Final = 128 * 1024


class BlockVolume(Protocol):
    """One disk. Offsets and lengths are bytes, multiples of 512, and within ``size_bytes``: the
    caller has checked them.
    """

    @property
    def name(self) -> str:
        """Name of the vdisk (``NAME``) or the snapshot (``NAME@SNAP``)."""

    @property
    def uuid(self) -> UUID:
        """Identity for life; SCSI designators are made from it."""

    @property
    def size_bytes(self) -> int:
        """Size now. It may change while sessions are open (resize)."""

    @property
    def read_only(self) -> bool:
        """True for snapshots, and for every volume of a pool that went read-only."""

    def try_read(self, offset_bytes: int, length_bytes: int) -> Buffer | None:
        """Data at once, or None when it has to be waited for (then call ``read``). Raises an error
        with ``errno``.
        """

    def read(self, offset_bytes: int, length_bytes: int, done: ReadCompletion) -> None:
        """Read by way of the I/O threads."""

    def write(self, offset_bytes: int, data: Buffer, fua: bool, done: Completion) -> None:
        """Take a write into the current batch. ``data`` need stay valid only until the next
        ``settle`` returns.

        Whole blocks of at most ATOMIC_WRITE_BYTES_MAX become readable, and durable, in one step.
        """

    def settle(self) -> None:
        """Carry out the batch of writes taken since the last call: call it once at the end of each
        wake-up.
        """

    def unmap(self, offset_bytes: int, length_bytes: int, done: Completion) -> None:
        """Deallocate; the range reads as zeros afterwards (partial blocks at its ends
        are zeroed).
        """

    def write_zeros(
        self, offset_bytes: int, length_bytes: int, fua: bool, done: Completion
    ) -> None:
        """Make the range zeros, deallocating whole blocks."""

    def flush(self, done: Completion) -> None:
        """Make every write that was completed before this call durable."""


@runtime_checkable
class ReportsAllocation(Protocol):
    """What a volume may have in addition: it can say which ranges are allocated. One that cannot
    counts as allocated throughout.
    """

    def allocation(
        self, offset_bytes: int, length_bytes: int, runs_max: int, done: AllocationCompletion
    ) -> None:
        """Report the state of a range, in about ``runs_max`` runs. Holes that read through to a
        backing store count as allocated.
        """


@runtime_checkable
class CopiesByReference(Protocol):
    """What a volume may have in addition: it can take over blocks of another volume without moving
    their data.
    """

    def copy_from(
        self,
        source: object,
        source_offset_bytes: int,
        offset_bytes: int,
        length_bytes: int,
        done: Completion,
    ) -> None:
        """Make whole blocks (all three numbers are multiples of 4096) read as those of ``source``
        read now.

        An error with EOPNOTSUPP: the two volumes share nothing, and the data have to be copied.
        """


class VolumeUsage(Protocol):
    """The space that a thin volume uses, and what is free in its pool."""

    @property
    def used_bytes(self) -> int:
        """What the volume's own blocks take."""

    @property
    def available_bytes(self) -> int:
        """What is free in its pool."""


@runtime_checkable
class ReportsUsage(Protocol):
    """What a volume may have in addition: it knows its share of the pool. The logical block
    provisioning log page tells clients.
    """

    def usage(self) -> VolumeUsage:
        """Returns at once."""


class SplitState(Protocol):
    """How far the split of a clone is."""

    @property
    def holes_remaining_blocks(self) -> int | None:
        """Blocks of 4096 bytes still read from the backing store; None: not counted yet."""

    @property
    def holes_total_blocks(self) -> int | None:
        """The same when the split began; None where no split was started."""

    @property
    def running(self) -> bool:
        """A split is running."""


@runtime_checkable
class ReportsSplit(Protocol):
    """What a volume may have in addition: it knows how much of it is still backed. The clone log
    page tells clients.
    """

    def split_state(self) -> SplitState | None:
        """None where there is no backing store. Returns at once."""
