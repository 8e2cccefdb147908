"""An epoch: everything that changes between two freezes, which one consistency point then makes
durable.

Invariants:
- ``number`` is the consistency point that will hold these changes; it only grows, by one each time.
- A VBN enters ``allocated`` in the epoch that hands it out, and ``freed`` (its last reference went,
  known at once) or ``dropped`` (a reference went; the share map decides at the consistency point)
  in the epoch of the change.
- The maps themselves change only within a consistency point, from these lists. So between two of
  them the maps in memory are exactly those of the last durable consistency point, and a crash leaks
  nothing (design section 4).
- A freed VBN may be handed out again only when this epoch is durable and no epoch up to this one
  has a reader left.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from storage.epoch.vbn_arrays import VbnArray

if TYPE_CHECKING:
    from storage.images.image import Image
    from storage.tree.node import Node

# image number, CRC32C, FBN, VBN, run length: what the intent log says of one change
# (layout.RECORD_ENTRY).
LogEntry = tuple[int, int, int, int, int]


def follows(one: LogEntry, other: LogEntry) -> bool:
    """Whether two changes may be of one write: neighbours in one image."""
    return one[0] == other[0] and one[2] + one[4] == other[2]


class Epoch:
    """The changes of one generation. Sizes: one list element an allocation extent, a freed VBN, a
    dropped reference.
    """

    __slots__ = (
        "added",
        "allocated",
        "by_reference",
        "configuration",
        "dirty",
        "discards",
        "dropped",
        "dropped_arrays",
        "freed",
        "freed_arrays",
        "held",
        "images",
        "logged",
        "number",
        "pointer_delta",
        "readers",
        "saved",
        "unlogged",
        "unlogged_ends",
        "when_durable",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.dirty: dict[Node, None] = {}
        # Frozen nodes that were changed again before they were written: their bytes, VBN and birth
        # as of the freeze.
        self.saved: dict[Node, tuple[bytearray, int, int]] = {}
        # Images whose table entry changes; the bytes are filled in if the image changes again
        # before they are written.
        self.images: dict[Image, bytearray | None] = {}
        # The configuration's new bytes, if it was replaced, and the blocks promised for them.
        self.configuration: tuple[bytes, int] | None = None
        self.allocated: list[tuple[int, int]] = []
        self.freed: list[int] = []
        self.freed_arrays: list[VbnArray] = []
        self.dropped: list[int] = []
        self.dropped_arrays: list[VbnArray] = []
        self.added: list[VbnArray] = []
        # Changes of the reference counts of pointer blocks, which must be known at once
        # (share_map.try_count).
        self.pointer_delta: dict[int, int] = {}
        self.unlogged: list[LogEntry] = []
        # How many changes have left ``unlogged`` for a record; and, counted like these, where whole
        # writes end that did not.
        self.logged = 0
        self.unlogged_ends: list[int] = []
        # Blocks were copied by reference, which the log cannot say: a flush takes a consistency
        # point.
        self.by_reference = False
        self.readers = 0
        # Long runs (first VBN, length) that trims and deletions freed: the device may have that
        # space back before it is reused.
        self.discards: list[tuple[int, int]] = []
        # After the maps were written: the bits of each region that stay unavailable until this
        # epoch is released.
        self.held: dict[int, npt.NDArray[np.uint8]] = {}
        # What must not begin before the changes that it follows from are durable: taking a deleted
        # image apart, say.
        self.when_durable: list[Callable[[], None]] = []

    @property
    def changed(self) -> bool:
        """Whether a consistency point of this epoch would write anything but a superblock."""
        if self.configuration is not None:
            return True
        return bool(
            self.dirty
            or self.images
            or self.allocated
            or self.freed
            or self.freed_arrays
            or self.dropped
            or self.dropped_arrays
        )

    @property
    def freed_estimate(self) -> int:
        """Blocks that may come free with this epoch (an upper bound: what is shared only loses a
        reference).
        """
        arrays = sum(map(len, self.freed_arrays)) + sum(map(len, self.dropped_arrays))
        return len(self.freed) + len(self.dropped) + arrays

    @property
    def frees(self) -> bool:
        """Whether blocks may come free with this epoch, or by what begins when it is durable."""
        return bool(self.freed_estimate or self.held or self.when_durable)

    def note_end(self) -> None:
        """What was changed so far are whole writes: a record may end here."""
        end = self.logged + len(self.unlogged)
        if self.unlogged and (not self.unlogged_ends or self.unlogged_ends[-1] != end):
            self.unlogged_ends.append(end)

    def take_unlogged(self, room: int, room_max: int) -> list[LogEntry]:
        """Take the first changes for a record that has room for so many more. None if a write would
        be cut that fits into an empty one.

        A write of up to ATOMIC_WRITE_BYTES_MAX (protocol.volume) is there after a crash entirely or
        not at all, so one record holds it. Its changes lie between two ends, and are neighbours;
        what is longer than a record is no such write.
        """
        entries, ends = self.unlogged, self.unlogged_ends
        count = len(entries)
        if count <= room:
            self.unlogged, self.unlogged_ends = [], []
            self.logged += count
            return entries
        passed = bisect_right(ends, self.logged + room)
        end = ends[passed - 1] - self.logged if passed else 0
        count = next(
            (at for at in range(room, end, -1) if not follows(entries[at - 1], entries[at])), end
        )
        if not count and room == room_max:
            count = room
        taken = entries[:count]
        del entries[:count]
        self.logged += count
        del ends[: bisect_right(ends, self.logged)]
        return taken

    def hold(self, region: int, bits: npt.NDArray[np.uint8]) -> None:
        """Keep ``bits`` of a region unavailable until this epoch is released."""
        held = self.held.get(region)
        self.held[region] = bits if held is None else held | bits

    def absorb(self, later: "Epoch") -> None:
        """Release what ``later`` holds together with what this one holds. Neither has readers: an
        older epoch keeps both waiting.
        """
        for region, bits in later.held.items():
            self.hold(region, bits)
        self.discards += later.discards

    def count_pointer(self, vbn: int, change: int) -> None:
        """Note ``change`` more references to the pointer block at ``vbn``."""
        total = self.pointer_delta.get(vbn, 0) + change
        if total:
            self.pointer_delta[vbn] = total
        else:
            self.pointer_delta.pop(vbn, None)
