"""Blocks for nodes that the host has allocated already, so that writing a node cannot meet a full
host.

On a sparse pool file (``Device.thin``) every node gets its block from here. The stock is filled
ahead of need, by the I/O threads: free runs are claimed from the write allocator, and the host sets
room aside for them (``Device.reserve``). A part of it is *kept*: for consistency points alone, or
for what makes room (deletes and reclaim). So a pool on a full host can delete, and take consistency
points.

While the host is full, the stock is filled with free blocks that the host allocated in earlier
times: those that nodes or data had before. They are found by asking the device (``Device.backed``),
so nothing about them stands on disk, and a pool that is opened on a full host finds the stock of
its last life again.

Invariants:
- A block in the stock is claimed, and was set aside by the host after that. What is being discarded
  is not available yet (storage.consistency.retirement), so nobody punches a hole there afterwards.
- What must not be refused (a consistency point, replay) takes blocks that the host has not
  allocated when the stock is empty; their writes are tried until there is room
  (storage.state.host_room).
"""

import asyncio
from typing import Protocol

import numpy as np

from storage.allocation.claims import Claims
from storage.allocation.window import Window
from storage.errors import DeviceFull
from storage.layout import BLOCK_BYTES, REGION_BLOCKS, region_count
from storage.state.host_room import HostRoom
from storage.state.pool_state import PoolState

# 32 MiB: the whole maps of a pool of some 20 GiB. On a larger one a consistency point that changes
# more of them than this waits for room.
KEPT_BLOCKS_MAX = 8192
# Who may go below what is kept for others takes so many at a time: what is left of them is in the
# node window, and so everybody's.
BELOW_KEPT_BLOCKS = 16
# Regions looked into by one search for blocks that the host has allocated: one question to the
# device each.
REGIONS_PER_SEARCH = 64
# The host is said to have room when it can set aside this much (1 MiB) for data, in the first of so
# many free runs that needs it.
AHEAD_BLOCKS = 256
RUNS_AHEAD = 64


class Supplier(Protocol):
    """The write allocator, which the stock is a part of."""

    @property
    def free_now(self) -> int:
        """Blocks that are available or in a window."""

    @property
    def reserve_blocks(self) -> int:
        """How many of those are not for data."""

    @property
    def client_floor(self) -> int:
        """How many of those are not for trees of clients that grow."""

    @property
    def point_floor(self) -> int:
        """How many of those are for consistency points alone."""

    @property
    def node_window_blocks(self) -> int:
        """What the stock is filled with at a time."""

    def new_window(self, blocks: int) -> Window:
        """An empty window for up to so many blocks."""

    async def claim(self, window: Window) -> None:
        """Claim free runs for a window; none are left in the pool when it stays empty."""

    async def claim_in(self, region: int) -> list[tuple[int, int]]:
        """Claim whatever is free in a region."""

    def release_data_window(self) -> None:
        """Make what is claimed for data available."""

    def data_ahead(self, runs_max: int) -> list[tuple[int, int]]:
        """Where data will be written next."""


class NodeStock:
    """``blocks`` is what it holds; ``kept_blocks`` of that are not for clients, ``point_blocks``
    not for deletes either.
    """

    __slots__ = (
        "_allocator",
        "_asked",
        "_claims",
        "_exhausted",
        "_freed",
        "_host_room",
        "_next_region",
        "_regions",
        "_runs",
        "_size_blocks",
        "_state",
        "_task",
        "blocks",
        "kept_blocks",
        "point_blocks",
        "refused",
    )

    def __init__(
        self,
        state: PoolState,
        host_room: HostRoom,
        claims: Claims,
        allocator: Supplier,
        size_blocks: int,
    ) -> None:
        self._state = state
        self._host_room = host_room
        self._claims = claims
        self._allocator = allocator
        self._size_blocks = size_blocks
        self._regions = region_count(size_blocks)
        self._runs: list[tuple[int, int]] = []
        self.blocks = 0
        self.kept_blocks = min(KEPT_BLOCKS_MAX, allocator.client_floor)
        self.point_blocks = min(KEPT_BLOCKS_MAX // 2, allocator.point_floor)
        # Regions where blocks came free lately: the host has allocated those.
        self._freed: dict[int, None] = {}
        self._next_region = 0
        # Whether the host had no room when the stock was filled last.
        self.refused = False
        # Whether host or pool had no more then.
        self._exhausted = False
        self._task: asyncio.Task[None] | None = None
        # What callers that wait for it need, beyond what it is filled to anyway.
        self._asked = 0

    # --- Taking -----------------------------------------------------------------------------------

    def draw(self, window: Window, kept_blocks: int, least: int = 1) -> bool:
        """Move a window's worth of blocks to ``window``, or at least ``least``, but keep
        ``kept_blocks``. False: there are too few.
        """
        if self.blocks - kept_blocks < least:
            return False
        wanted = max(
            least, min(window.size_blocks, self.blocks - max(kept_blocks, self.kept_blocks))
        )
        if wanted == least:
            wanted = min(self.blocks - kept_blocks, max(least, BELOW_KEPT_BLOCKS))
        moved: list[tuple[int, int]] = []
        while wanted:
            first, end = self._runs.pop()
            length = min(wanted, end - first)
            if first + length < end:
                self._runs.append((first + length, end))
            moved.append((first, first + length))
            wanted -= length
            self.blocks -= length
        window.runs[:0] = reversed(moved)
        if self.blocks < self._target:
            self._start()
        return True

    def freed_in(self, region: int) -> None:
        """Blocks of that region are available again."""
        self._freed[region] = None

    def release_surplus(self, floor: int) -> None:
        """Give back to the pool what data that may take all but ``floor`` blocks could have: it
        finds no others.
        """
        while (surplus := self.blocks - min(self.kept_blocks, floor)) > 0:
            first, end = self._runs.pop()
            start = max(
                first, end - surplus
            )  # no more than that: nodes of the same write may need the rest
            if first < start:
                self._runs.append((first, start))
            self._claims.settle_run(start, end)
            self.blocks -= end - start

    # --- Filling ----------------------------------------------------------------------------------

    @property
    def _target(self) -> int:
        """What is kept, and a window's worth; or little if the pool is nearly full: data and nodes
        would take turns at the last blocks.
        """
        window = self._allocator.node_window_blocks
        roomy = self._allocator.free_now > self._allocator.reserve_blocks + 2 * window
        return self.kept_blocks + (window if roomy else BELOW_KEPT_BLOCKS)

    def start(self) -> None:
        """Begin to fill it, where nodes come from it: nobody who writes first is to
        wait for that.
        """
        if self._state.device.thin and self._state.read_only_reason is None:
            self._start()

    def _start(self) -> "asyncio.Task[None]":
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._fill())
            self._task.add_done_callback(self._filled)
        return self._task

    def _filled(self, task: "asyncio.Task[None]") -> None:
        self._task = None
        if not task.cancelled():
            task.exception()  # marks it as seen: who waits gets it, and others meet the same device

    async def top_up(self, blocks: int = 0) -> bool:
        """Fill it, for one who needs so many blocks in it. False: the host (``refused``) or the
        pool has no more. Raises DeviceFailed.

        A caller that comes while it is being filled waits for that, and then for its own part.
        """
        while True:
            self._asked = max(self._asked, blocks)
            await asyncio.shield(self._start())
            if self.blocks >= blocks:
                return True
            if self._exhausted:
                return False

    async def stop(self) -> None:
        """End with the pool."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _fill(self) -> None:
        self.refused = self._exhausted = False
        try:
            await self._fill_up()
        finally:
            self._asked = 0

    async def _fill_up(self) -> None:
        while (missing := max(self._target, self._asked) - self.blocks) > 0:
            window = self._allocator.new_window(missing)
            await self._allocator.claim(window)
            if not window.runs:
                self._exhausted = True
                return
            if not await self._reserve(window.runs):
                self.refused = self._exhausted = True
                await self._search()
                return

    async def _reserve(self, runs: list[tuple[int, int]]) -> bool:
        """Take claimed runs into the stock as the host sets room aside for them. False: it has no
        more; the rest is given back.
        """
        left = list(reversed(runs))
        try:
            while left:
                first, end = left[-1]
                await self._state.device.reserve(first * BLOCK_BYTES, (end - first) * BLOCK_BYTES)
                self._runs.append(left.pop())
                self.blocks += end - first
        except DeviceFull as error:
            self._host_room.met(error)
            return False
        finally:
            for first, end in left:
                self._claims.settle_run(first, end)
        return True

    async def _search(self) -> None:
        """The host has no more: find free blocks that it has allocated before."""
        if self.blocks < self.kept_blocks:
            self._allocator.release_data_window()  # they may all be in there
        for _ in range(min(REGIONS_PER_SEARCH, self._regions)):
            if self.blocks >= self._target:
                return
            await self._take_backed(self._region_to_search())

    async def _take_backed(self, region: int) -> None:
        """Take what is free in a region and allocated by the host.

        It is claimed first: so no hole is punched there after the device was asked. Asking the
        device to set it aside once more would be in vain, since xfs wants as much room for that as
        if nothing were there.
        """
        runs = await self._allocator.claim_in(region)
        if not runs:
            return
        first = region * REGION_BLOCKS
        length = min(REGION_BLOCKS, self._size_blocks - first)
        found: list[tuple[int, int]] = []
        free = region_mask(runs, first)
        kept = np.zeros_like(free)
        try:
            await self._state.device.backed(first * BLOCK_BYTES, length * BLOCK_BYTES, found)
            kept = free & region_mask(
                [(-(-start // BLOCK_BYTES), end // BLOCK_BYTES) for start, end in found], first
            )
            kept[np.flatnonzero(kept)[max(0, self._target - self.blocks) :]] = 0
            edges = (
                np.flatnonzero(np.diff(kept.view(np.int8), prepend=np.int8(0), append=np.int8(0)))
                + first
            )
            self._runs += zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
            self.blocks += int(kept.sum())
        finally:
            self._claims.settle(region, np.packbits(free ^ kept, bitorder="little"))

    def _region_to_search(self) -> int:
        if self._freed:
            return self._freed.popitem()[0]
        region = self._next_region
        self._next_region = (region + 1) % self._regions
        return region

    async def has_room(self) -> bool:
        """Whether the host has room again, for what is kept and for the data that comes next.
        Raises DeviceFailed.
        """
        await self.top_up()
        if self.refused:
            return False
        for first, end in self._allocator.data_ahead(RUNS_AHEAD):
            found: list[tuple[int, int]] = []
            await self._state.device.backed(first * BLOCK_BYTES, (end - first) * BLOCK_BYTES, found)
            for start, following in found:
                if start > first * BLOCK_BYTES:
                    break
                first = -(-following // BLOCK_BYTES)
            if first < end:
                return await self._can_reserve(
                    first * BLOCK_BYTES, min(AHEAD_BLOCKS, end - first) * BLOCK_BYTES
                )
        return True  # what comes next is allocated already

    async def _can_reserve(self, offset_bytes: int, length_bytes: int) -> bool:
        try:
            await self._state.device.reserve(offset_bytes, length_bytes)
        except DeviceFull as error:
            self._host_room.met(error)
            return False
        return True


def region_mask(
    runs: list[tuple[int, int]], first: int
) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """One byte for each block of the region that begins with block ``first``: 1 where it lies in
    one of the runs (first VBN, end).
    """
    mask = np.zeros(REGION_BLOCKS, dtype=np.uint8)
    for start, end in runs:
        mask[start - first : max(0, end - first)] = 1
    return mask
