"""The allocation ledger of an epoch: which blocks it took and gave back.

Invariants:
- A VBN enters ``allocated`` in the epoch that hands it out, and ``freed`` (its last reference went,
  known at once) or ``dropped`` (a reference went; the share map decides at the consistency point)
  in the epoch of the change.
- The maps themselves change only within a consistency point, from these lists. So between two of
  them the maps in memory are exactly those of the last durable consistency point, and a crash leaks
  nothing (design section 4).
- A freed VBN may be handed out again only when the epoch is durable and no epoch up to it has a
  reader left (storage.consistency.retirement).
"""

import numpy as np
import numpy.typing as npt

from storage.epoch.vbn_arrays import VbnArray


class AllocationLedger:
    """The blocks of one epoch. Sizes: one list element an allocation extent, a freed VBN, a dropped
    reference.
    """

    __slots__ = (
        "added",
        "allocated",
        "discards",
        "dropped",
        "dropped_arrays",
        "freed",
        "freed_arrays",
        "held",
        "pointer_delta",
    )

    def __init__(self) -> None:
        # Extents: first VBN, length.
        self.allocated: list[tuple[int, int]] = []
        self.freed: list[int] = []
        self.freed_arrays: list[VbnArray] = []
        self.dropped: list[int] = []
        self.dropped_arrays: list[VbnArray] = []
        # Data blocks that have one more reference.
        self.added: list[VbnArray] = []
        # Changes of the reference counts of pointer blocks, which must be known at once
        # (share_map.try_count).
        self.pointer_delta: dict[int, int] = {}
        # Long runs (first VBN, length) that trims and deletions freed: the device may have that
        # space back before it is reused.
        self.discards: list[tuple[int, int]] = []
        # After the maps were written: the bits of each region that stay unavailable until this
        # epoch is released.
        self.held: dict[int, npt.NDArray[np.uint8]] = {}

    @property
    def changed(self) -> bool:
        """Whether the maps will change."""
        return bool(
            self.allocated or self.freed or self.freed_arrays or self.dropped or self.dropped_arrays
        )

    @property
    def freed_estimate(self) -> int:
        """Blocks that may come free with this epoch (an upper bound: what is shared only loses a
        reference).
        """
        arrays = sum(map(len, self.freed_arrays)) + sum(map(len, self.dropped_arrays))
        return len(self.freed) + len(self.dropped) + arrays

    def count_pointer(self, vbn: int, change: int) -> None:
        """Note ``change`` more references to the pointer block at ``vbn``."""
        total = self.pointer_delta.get(vbn, 0) + change
        if total:
            self.pointer_delta[vbn] = total
        else:
            self.pointer_delta.pop(vbn, None)

    def hold(self, region: int, bits: npt.NDArray[np.uint8]) -> None:
        """Keep ``bits`` of a region unavailable until this epoch is released."""
        held = self.held.get(region)
        self.held[region] = bits if held is None else held | bits

    def absorb(self, later: "AllocationLedger") -> None:
        """Release what ``later`` holds together with what this one holds. Neither of their epochs
        has readers: an older epoch keeps both waiting.
        """
        for region, bits in later.held.items():
            self.hold(region, bits)
        self.discards += later.discards
