"""Claims: which free blocks somebody has, or may not have yet, and where free ones are found.

A VBN is available when its bit is clear in the active map (as of the last consistency point), and
it is neither *claimed* (in a window, or handed out in an epoch whose bits are not in the map yet)
nor *held* (freed by an epoch that is not released yet). The cursor sweeps the pool in circles; full
regions are skipped by the region summary.
"""

from collections.abc import Iterator

import numpy as np

from storage.allocation.active_map import NO_BITS, REGION_SHIFT, ActiveMap, Bits, count_bits
from storage.allocation.window import Window
from storage.layout import REGION_BLOCKS, region_count

# Block numbers within a region.
Offsets = np.ndarray[tuple[int], np.dtype[np.int64]]

# Regions looked into by one synchronous fill: about 0.5 ms. What lies further is found by the
# asynchronous path.
REGIONS_PER_FILL = 8
# Where blocks were freed last is written again first: the host has memory and space for it already.
# But only regions with no more than this in use are asked, and only for runs of so many blocks:
# batches must stay contiguous, for their reads as well.
ROOMY_USED_MAX = REGION_BLOCKS // 2
ROOMY_RUN_BLOCKS_MIN = 16


def region_bits(first: int, end: int) -> Iterator[tuple[int, Bits]]:
    """The regions that the blocks from ``first`` to before ``end`` lie in, with the bits of those
    blocks.
    """
    for region in range(first >> REGION_SHIFT, (end - 1 >> REGION_SHIFT) + 1):
        base = region * REGION_BLOCKS
        mask = np.zeros(REGION_BLOCKS, dtype=np.uint8)
        mask[max(0, first - base) : end - base] = 1
        yield region, np.packbits(mask, bitorder="little")


class Claims:
    """``missing_region`` is the one whose map block a fill that found nothing has to have loaded
    first.
    """

    __slots__ = (
        "_active_map",
        "_claimed",
        "_cursor",
        "_held",
        "_roomy",
        "_size_blocks",
        "missing_region",
    )

    def __init__(self, active_map: ActiveMap, size_blocks: int) -> None:
        self._active_map = active_map
        self._size_blocks = size_blocks
        self._claimed: dict[int, Bits] = {}
        self._held: dict[int, Bits] = {}
        self._cursor = 0
        # Regions that ``note_roomy`` named, the latest last: see ``_claim_roomy``.
        self._roomy: dict[int, None] = {}
        self.missing_region = 0

    # --- Claiming ---------------------------------------------------------------------------------

    def fill(self, window: Window, wanted: int) -> bool:
        """Claim up to ``wanted`` blocks for ``window``, to be used after those that it has left.
        False: nothing was found in the regions at hand.
        """
        left, window.runs = window.runs, []
        try:
            return self._claim_roomy(window, wanted) or self._claim_from_cursor(window, wanted)
        finally:
            # Also when a map block cannot be read: what is in the window counts as free.
            window.runs.reverse()
            window.runs += left

    def _claim_from_cursor(self, window: Window, wanted: int) -> bool:
        regions = region_count(self._size_blocks)
        for _ in range(min(REGIONS_PER_FILL, regions + 1)):
            region = self._cursor >> REGION_SHIFT
            found = self.claim(region, self._cursor & (REGION_BLOCKS - 1), wanted, window)
            if found is None:
                self.missing_region = region
                break
            if found:
                self._cursor = window.runs[-1][1] % self._size_blocks
            wanted -= found
            if wanted <= 0:
                break
            self._cursor = (region + 1) % regions * REGION_BLOCKS
        return bool(window.runs)

    def _claim_roomy(self, window: Window, wanted: int) -> bool:
        """Claim from where blocks were freed last, so that a sparse pool file does not grow while a
        few blocks are overwritten.

        A page that the page cache holds already costs a third of a new one (docs/performance.md).
        """
        for _ in range(min(REGIONS_PER_FILL, len(self._roomy))):
            region, _ = self._roomy.popitem()
            used = self._active_map.peek_used(region)
            if used is None or used > ROOMY_USED_MAX:
                continue
            found = self.claim(region, 0, wanted, window, ROOMY_RUN_BLOCKS_MIN)
            if found == wanted:
                self._roomy[region] = None  # there may be more
            if found:
                return True
        return False

    def claim(
        self, region: int, start: int, wanted: int, window: Window, run_min: int = 1
    ) -> int | None:
        """Move up to ``wanted`` blocks of a region, from its block ``start`` on, into the window;
        None when its map has to be loaded first.

        Runs shorter than ``run_min`` stay where they are.
        """
        used = self._active_map.peek_used(region)
        if used is None:
            return None
        blocks = min(REGION_BLOCKS, self._size_blocks - region * REGION_BLOCKS)
        if used >= blocks:
            return 0
        bits = self._active_map.peek_bits(region)
        if bits is None:
            return None
        busy = bits | self._claimed.get(region, NO_BITS) | self._held.get(region, NO_BITS)
        free = np.unpackbits(~busy, bitorder="little").view(np.int8)
        free[blocks:] = 0
        free[:start] = 0
        edges = np.flatnonzero(np.diff(free, prepend=np.int8(0), append=np.int8(0)))
        starts, ends = edges[::2], edges[1::2]
        long = ends - starts >= run_min
        return self._take_into(window, region, starts[long], ends[long], wanted)

    def _take_into(
        self, window: Window, region: int, starts: Offsets, ends: Offsets, wanted: int
    ) -> int:
        """Claim up to ``wanted`` blocks of a region's free runs; returns how many."""
        totals = np.cumsum(ends - starts)
        count = min(int(np.searchsorted(totals, wanted)) + 1, len(totals))
        if not count:
            return 0
        starts, ends = starts[:count], ends[:count]
        ends[-1] -= max(0, int(totals[count - 1]) - wanted)
        mask = np.zeros(REGION_BLOCKS + 1, dtype=np.int8)
        mask[starts] = 1
        mask[ends] = -1
        claimed = np.packbits(np.cumsum(mask[:-1], dtype=np.int8).view(np.uint8), bitorder="little")
        self._claimed[region] = self._claimed.get(region, NO_BITS) | claimed
        base = region * REGION_BLOCKS
        window.runs.extend(zip((starts + base).tolist(), (ends + base).tolist(), strict=True))
        return int((ends - starts).sum())

    def adopt(self, first: int, length: int) -> None:
        """Claim blocks by their address: replay found them in use by records of the intent log."""
        for region, bits in region_bits(first, first + length):
            self._claimed[region] = self._claimed.get(region, NO_BITS) | bits

    # --- Giving up --------------------------------------------------------------------------------

    def settle(self, region: int, bits: Bits) -> None:
        """``bits`` are no longer claimed: the map has them now, or nobody."""
        left = self._claimed[region] & ~bits
        if left.any():
            self._claimed[region] = left
        else:
            del self._claimed[region]

    def settle_run(self, first: int, end: int) -> None:
        """Blocks that were claimed, and not used, are available again."""
        for region, bits in region_bits(first, end):
            self.settle(region, bits)

    def settle_window(self, window: Window) -> None:
        """The same for all that a window has left."""
        for first, end in window.empty():
            self.settle_run(first, end)

    # --- Holding ----------------------------------------------------------------------------------

    def hold(self, region: int, bits: Bits) -> None:
        """``bits`` are clear in the map from now on, but must not be handed out before
        ``release``.
        """
        self._held[region] = self._held.get(region, NO_BITS) | bits

    def release(self, region: int, bits: Bits) -> None:
        """What was held is available again."""
        left = self._held[region] & ~bits
        if left.any():
            self._held[region] = left
        else:
            del self._held[region]

    def note_roomy(self, region: int) -> None:
        """Blocks came back to a region: if it is half free, it is written again soon."""
        used = self._active_map.peek_used(region)
        if used is not None and used <= ROOMY_USED_MAX:
            self._roomy[region] = None

    @property
    def held_blocks(self) -> int:
        """Blocks that are free but not released yet."""
        return sum(map(count_bits, self._held.values()))
