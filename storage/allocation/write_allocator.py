"""The write allocator: chooses new VBNs, contiguous where it can, and never one that the last
consistency point can reach.

It hands VBNs out of *windows*: runs of free blocks claimed from one or more regions, one window for
data and one for nodes, so that a batch of writes is one extent and a consistency point writes its
nodes in long runs.

A VBN is available when its bit is clear in the active map (as of the last consistency point), and
it is neither *claimed* (in a window, or handed out in an epoch whose bits are not in the map yet)
nor *held* (freed by an epoch that is not released yet). The cursor sweeps the pool in circles; full
regions are skipped by the region summary.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from storage.allocation.active_map import NO_BITS, REGION_SHIFT, ActiveMap, Bits, count_bits
from storage.allocation.node_stock import NodeStock
from storage.epoch.epoch import Epoch
from storage.errors import HostFull, PoolFull
from storage.layout import (
    BLOCK_BYTES,
    FIELDS_PER_BLOCK,
    REGION_BLOCKS,
    SHARES_PER_BLOCK,
    SUMMARIES_PER_BLOCK,
    region_count,
    tree_levels,
)
from storage.tree.node import Hold

if TYPE_CHECKING:
    from storage.state.pool_state import PoolState

# Block numbers within a region.
Offsets = np.ndarray[tuple[int], np.dtype[np.int64]]

# 64 MiB of data and 4 MiB of nodes: a scan of a region (about 60 us) is paid once for that much.
DATA_WINDOW_BLOCKS = 16384
NODE_WINDOW_BLOCKS = 1024
# Regions looked into by one synchronous fill: about 0.5 ms. What lies further is found by the
# asynchronous path.
REGIONS_PER_FILL = 8
# Where blocks were freed last is written again first: the host has memory and space for it already.
# But only regions with no more than this in use are asked, and only for runs of so many blocks:
# batches must stay contiguous, for their reads as well.
ROOMY_USED_MAX = REGION_BLOCKS // 2
ROOMY_RUN_BLOCKS_MIN = 16
# A full pool must still do what must be possible on it (design section 6, invariant 6), whatever
# clients did before. So what is kept back is not given to whoever comes first: from top to bottom,
# - the trees of clients may grow in the first part (a trim in a clone, say, that needs no block for
#   data);
# - the second is *lent*: a change that gives back with its consistency point what it takes (it
#   moves nodes that are not shared, or overwrites data of its own) may go down here, and waits for
#   that consistency point where others have borrowed all. So trims, shrinking and overwriting what
#   is not shared go on for ever. Data leaves half of it to nodes, and both leave a quarter to
#   deletions;
# - the rest is for consistency points: every block of the maps once (one may have to rewrite them
#   all), and the upper part of the vdisk table. Table entries are not in it: whoever touches an
#   image has promised the blocks that its entry takes.
POINT_BLOCKS_EXTRA = 48
# Each of the first two: 1/256 of the pool, up to 16 MiB; on a small pool so much that half of it is
# an atomic write (128 KiB).
PART_BLOCKS_MIN = 64
PART_BLOCKS_MAX = 4096
# What a touched image's entry may take: itself, and the level-1 block of the table above it.
ENTRY_BLOCKS = 2
POOL_FULL = "the pool is full: delete snapshots or vdisks, or trim what is not needed"
HOST_FULL = (
    "the host's file system is full: free space where the pool lies, or delete snapshots or vdisks"
)


class Window:
    """Free runs claimed for one purpose: the current one is [next, end), the others wait in
    ``runs`` (last one first).
    """

    __slots__ = ("end", "next", "runs", "size_blocks")

    def __init__(self, size_blocks: int) -> None:
        self.size_blocks = size_blocks
        self.next = 0
        self.end = 0
        self.runs: list[tuple[int, int]] = []

    @property
    def left_blocks(self) -> int:
        """Blocks that are left to hand out. Not for the hot path: it counts the runs."""
        return self.end - self.next + sum(end - first for first, end in self.runs)

    def advance(self) -> bool:
        """Move on to the next run when the current one is used up. False: the window is empty."""
        while self.next == self.end:
            if not self.runs:
                return False
            self.next, self.end = self.runs.pop()
        return True


def tree_blocks(size_blocks: int) -> int:
    """Blocks of a metafile of that size, its pointer blocks included."""
    total = blocks = size_blocks
    for _ in range(tree_levels(size_blocks)):
        blocks = -(-blocks // FIELDS_PER_BLOCK)
        total += blocks
    return total


def map_blocks(size_blocks: int) -> int:
    """Blocks of all the maps of a pool of ``size_blocks`` blocks."""
    regions = region_count(size_blocks)
    return (
        tree_blocks(regions)
        + tree_blocks(-(-regions // SUMMARIES_PER_BLOCK))
        + tree_blocks(-(-size_blocks // SHARES_PER_BLOCK))
    )


def region_bits(first: int, end: int) -> Iterator[tuple[int, Bits]]:
    """The regions that the blocks from ``first`` to before ``end`` lie in, with the bits of those
    blocks.
    """
    for region in range(first >> REGION_SHIFT, (end - 1 >> REGION_SHIFT) + 1):
        base = region * REGION_BLOCKS
        mask = np.zeros(REGION_BLOCKS, dtype=np.uint8)
        mask[max(0, first - base) : end - base] = 1
        yield region, np.packbits(mask, bitorder="little")


async def nothing_on_its_way(blocks: int, patient: bool) -> bool:
    """The answer to who waits for freed blocks while there are no consistency points yet."""
    return False


class WriteAllocator:
    """``free_now`` is the number of blocks that are available or in a window, less those promised;
    ``reserve_blocks`` are not for data.
    """

    __slots__ = (
        "_active_map",
        "_claimed",
        "_cursor",
        "_data",
        "_held",
        "_nodes",
        "_replaying",
        "_roomy",
        "_size_blocks",
        "_state",
        "_wait_for",
        "borrow_floor",
        "client_floor",
        "free_now",
        "lent_blocks",
        "move_floor",
        "point_floor",
        "promised_blocks",
        "reclaim",
        "reserve_blocks",
        "returned_blocks",
        "stock",
    )

    def __init__(self, state: "PoolState", active_map: ActiveMap, size_blocks: int) -> None:
        self._state = state
        self._active_map = active_map
        self._size_blocks = size_blocks
        self._claimed: dict[int, Bits] = {}
        self._held: dict[int, Bits] = {}
        window = max(16, size_blocks // 64)
        self._data = Window(min(DATA_WINDOW_BLOCKS, window))
        self._nodes = Window(min(NODE_WINDOW_BLOCKS, window))
        self._cursor = 0
        # Regions that blocks came back to and that are at least half free, the latest last: see
        # ``_claim_roomy``.
        self._roomy: dict[int, None] = {}
        self._wait_for = 0
        self.free_now = size_blocks - active_map.used_blocks
        self.promised_blocks = 0
        # Borrowed for writes that are not installed yet: they come back, though no epoch says so.
        self.lent_blocks = 0
        # How many blocks came back so far. It only grows: whoever waits for some sees that they
        # came, also when others were faster.
        self.returned_blocks = 0
        part = max(PART_BLOCKS_MIN, min(PART_BLOCKS_MAX, size_blocks // 256))
        self.point_floor = map_blocks(size_blocks) + POINT_BLOCKS_EXTRA
        self.move_floor = self.point_floor + part // 4
        self.borrow_floor = self.point_floor + part // 2
        self.client_floor = self.point_floor + part
        self.reserve_blocks = self.client_floor + part
        self._replaying = False
        # Blocks for nodes that the host has allocated already, where that is a question.
        self.stock = NodeStock(state, self, size_blocks)
        if state.device.thin:
            state.room.has_room = self.stock.has_room
        # Waits until freed blocks can be used again; False when fewer than so many are on their
        # way. Who is patient goes on waiting when others were faster: for one who gives back what
        # he takes there will be some.
        self.reclaim: Callable[[int, bool], Awaitable[bool]] = nothing_on_its_way

    @property
    def available_bytes(self) -> int:
        """What the pool still has for data, whatever its host has."""
        return max(0, self.free_now - self.reserve_blocks) * BLOCK_BYTES

    # --- Handing out ------------------------------------------------------------------------------

    def take(self, count: int, borrowed: bool = False) -> list[tuple[int, int]] | None:
        """Extents (first VBN, length) of ``count`` blocks for data. None: nothing was taken, and
        ``state.missing`` is what to wait for.

        ``borrowed``: at least as many blocks come back with the next consistency point. Whoever
        takes them enters them into ``Epoch.allocated`` in the same step that installs the pointers
        (a bit is set only together with the pointer that uses it), or gives them back.
        """
        floor = self.borrow_floor if borrowed else self.reserve_blocks
        window = self._data
        first = window.next
        if first + count <= window.end and self.free_now - count >= floor:
            window.next = first + count
            self.free_now -= count
            return [(first, count)]
        if self.free_now - count >= floor and self._fill_up(window, count):
            return self._take_scattered(count)
        self._state.missing = partial(self._bring, window, count, floor)
        return None

    def is_short(self, count: int) -> bool:
        """Whether ``take`` finds no room for so many new blocks, but might for borrowed ones."""
        return self.free_now - count < self.reserve_blocks

    def _take_scattered(self, count: int) -> list[tuple[int, int]]:
        window = self._data
        extents: list[tuple[int, int]] = []
        self.free_now -= count
        while count:
            window.advance()
            length = min(count, window.end - window.next)
            extents.append((window.next, length))
            window.next += length
            count -= length
        return extents

    def _fill_up(self, window: Window, count: int) -> bool:
        """Fill a window until it has ``count`` blocks, from what is in memory."""
        while window.left_blocks < count:
            if not self._fill(window, count):
                return False
        return True

    def give_back(self, extents: list[tuple[int, int]]) -> None:
        """What ``take`` handed out and nobody used, whatever was written there."""
        for first, length in reversed(extents):
            self.free_now += length
            if self._data.next == first + length:
                self._data.next = first
            else:
                self._data.runs.append((first, first + length))

    def nodes_at_hand(self, count: int, floor: int, entry: bool) -> bool:
        """Whether ``take_node`` has ``count`` VBNs above the floor, and room for a table entry
        beside them if wanted.

        False: ``state.missing`` is what to wait for.
        """
        wanted = count + ENTRY_BLOCKS if entry else count
        window = self._nodes
        if self.free_now - wanted >= floor and (
            window.end - window.next >= count or self._fill_nodes(count, floor)
        ):
            return True
        self._state.missing = partial(self._bring, window, wanted, floor)
        return False

    def take_node(self, epoch: Epoch) -> int:
        """A VBN for a node, one of those that ``nodes_at_hand`` has found."""
        window = self._nodes
        found = window.advance()
        assert found, "taken without asking for it"
        vbn = window.next
        window.next = vbn + 1
        self.free_now -= 1
        epoch.allocated.append((vbn, 1))
        return vbn

    def floor(self, epoch: Epoch, grows: bool) -> int:
        """What must be left free when nodes are taken in an epoch. A consistency point may use the
        whole reserve.

        ``grows``: the tree takes more than it gives back.
        """
        if epoch is self._state.frozen:
            return -self.promised_blocks
        return self.client_floor if grows else self.move_floor

    def _fill_nodes(self, count: int, floor: int) -> bool:
        """Fill the node window until it has ``count`` blocks, on a sparse pool file from the stock
        alone.
        """
        window = self._nodes
        while (missing := count - window.left_blocks) > 0:
            if not self.stock.draw(window, self._kept(floor), missing) and (
                self._state.device.thin or not self._fill(window, count)
            ):
                return False
        return True

    def _kept(self, floor: int) -> int:
        """How much of the stock is for others than whoever may take nodes down to this floor."""
        if self._replaying or floor <= 0:
            return 0
        return self.stock.kept_blocks if floor >= self.client_floor else self.stock.point_blocks

    def promise(self, blocks: int = ENTRY_BLOCKS) -> None:
        """Something changed that the next consistency point will write (an image's entry): nobody
        may take the last blocks before.
        """
        self.free_now -= blocks
        self.promised_blocks += blocks

    def redeem(self, blocks: int = ENTRY_BLOCKS) -> None:
        """The consistency point has taken what it was promised."""
        self.free_now += blocks
        self.returned_blocks += blocks
        self.promised_blocks -= blocks

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Replay must succeed: it may take what clients may not, since it repeats what was possible
        before.
        """
        floors = self.client_floor, self.move_floor
        self.client_floor = self.move_floor = self.point_floor
        self._replaying = True
        try:
            yield
        finally:
            self.client_floor, self.move_floor = floors
            self._replaying = False

    def check_room(self, images: int = 0, blocks: int = 0) -> None:
        """Raise PoolFull when there is no room for so many more table entries, or blocks of the
        configuration.
        """
        missing = self.client_floor + 1 + images * ENTRY_BLOCKS + blocks - self.free_now
        if missing > 0:
            raise PoolFull(POOL_FULL, missing)
        needed = self.stock.point_blocks + images * ENTRY_BLOCKS + blocks
        if self.stock.refused and self.stock.blocks < needed:
            raise HostFull(HOST_FULL, needed)

    # --- Waiting ----------------------------------------------------------------------------------

    async def _bring(self, window: Window, count: int, floor: int, hold: Hold) -> None:
        """Wait until there are ``count`` blocks above the floor, and in the window. Raises PoolFull
        (too few are on the way), HostFull.
        """
        within_point = floor <= 0
        while self.free_now - count < floor:
            if within_point or not await self.reclaim(
                floor + count - self.free_now, floor < self.client_floor
            ):
                raise PoolFull(POOL_FULL)
        if window is self._data:
            await self._refill(window, count, hold)
            if window.left_blocks < count:
                self.stock.release_surplus(floor)
        elif not self._state.device.thin or not await self._stocked(count, floor):
            await self._refill(window, count, hold)

    async def _stocked(self, count: int, floor: int) -> bool:
        """Wait until the stock has what the node window lacks. False: it cannot, and blocks that
        the host has not set aside must do: what is written there waits until it has room. Raises
        HostFull for one who may be refused.
        """
        kept = self._kept(floor)
        while self.stock.blocks - kept < count - self._nodes.left_blocks:
            if not await self.stock.top_up(kept + count - self._nodes.left_blocks):
                if kept and self.stock.refused:
                    raise HostFull(HOST_FULL)
                return False
        return True

    async def _refill(self, window: Window, count: int, hold: Hold) -> None:
        """Fill a window until it has ``count`` blocks, loading map blocks as needed; ends
        empty-handed after one circle round the pool.
        """
        for _ in range(2 * region_count(self._size_blocks) // REGIONS_PER_FILL + 4):
            if window.left_blocks >= count:
                return
            if self._fill(window, count):
                continue
            await self._active_map.load(self._wait_for, hold)
            await asyncio.sleep(0)
        other = self._nodes if window is self._data else self._data
        self._release_window(other)

    # --- Claiming ---------------------------------------------------------------------------------

    def _fill(self, window: Window, count: int) -> bool:
        """Claim free runs for ``window``, to be used after those that it has left. False: nothing
        was found in the regions at hand.

        On a pool that is nearly full data and nodes claim no more than the ``count`` blocks that
        are wanted now: else the one would take the last blocks that the other needs for the same
        write, and they would pass them to and fro for ever.
        """
        short = (
            self.free_now <= self.reserve_blocks + self._data.size_blocks + self._nodes.size_blocks
        )
        exact = short and (window is self._data or window is self._nodes)
        wanted = max(1, count - window.left_blocks) if exact else window.size_blocks
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
            found = self._claim(region, self._cursor & (REGION_BLOCKS - 1), wanted, window)
            if found is None:
                self._wait_for = region
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
            found = self._claim(region, 0, wanted, window, ROOMY_RUN_BLOCKS_MIN)
            if found == wanted:
                self._roomy[region] = None  # there may be more
            if found:
                return True
        return False

    def _claim(
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

    def _release_window(self, window: Window) -> None:
        """Give a window's blocks back to the pool: the other one found none elsewhere."""
        if window.next < window.end:
            window.runs.append((window.next, window.end))
        for first, end in window.runs:
            self.settle_run(first, end)
        window.runs = []
        window.next = window.end = 0

    # --- For the stock ----------------------------------------------------------------------------

    @property
    def node_window_blocks(self) -> int:
        """What the stock is filled with at a time."""
        return self._nodes.size_blocks

    def new_window(self, blocks: int) -> Window:
        """A window of its own, of so many blocks, but no more than that for nodes."""
        return Window(min(blocks, self._nodes.size_blocks))

    async def claim(self, window: Window) -> None:
        """Claim free runs for ``window``; none are left in the pool when it stays empty."""
        with self._state.cache.hold() as hold:
            for _ in range(2):  # the second time with what the data window gave back
                await self._refill(window, 1, hold)
                if window.left_blocks:
                    return

    def release_data_window(self) -> None:
        """Let nodes have what was claimed for data; that is claimed anew."""
        self._release_window(self._data)

    async def claim_in(self, region: int) -> list[tuple[int, int]]:
        """Claim whatever is free in a region: runs (first VBN, end)."""
        window = Window(REGION_BLOCKS)
        with self._state.cache.hold() as hold:
            while self._claim(region, 0, REGION_BLOCKS, window) is None:
                await self._active_map.load(region, hold)
        return window.runs

    def settle_run(self, first: int, end: int) -> None:
        """Blocks that were claimed, and not used, are available again."""
        for region, bits in region_bits(first, end):
            self.settle(region, bits)

    def data_ahead(self, runs_max: int) -> list[tuple[int, int]]:
        """Where data will be written next: runs (first VBN, end), in their order; none where that
        is not known.
        """
        window = self._data
        if not window.advance():
            self._fill(window, window.size_blocks)
        return [(window.next, window.end), *reversed(window.runs[-runs_max:])]

    def adopt(self, first: int, length: int = 1) -> None:
        """Claim blocks by their address: replay found them in use by records of the intent log."""
        for region, bits in region_bits(first, first + length):
            self._claimed[region] = self._claimed.get(region, NO_BITS) | bits
        self.free_now -= length

    # --- Called by the consistency point ----------------------------------------------------------

    def settle(self, region: int, bits: Bits) -> None:
        """``bits`` are no longer claimed: the map has them now, or nobody."""
        left = self._claimed[region] & ~bits
        if left.any():
            self._claimed[region] = left
        else:
            del self._claimed[region]

    def hold(self, region: int, bits: Bits) -> None:
        """``bits`` are clear in the map from now on, but must not be handed out before
        ``release``.
        """
        self._held[region] = self._held.get(region, NO_BITS) | bits

    def release(self, held: dict[int, Bits]) -> None:
        """What an epoch held is available again: it is durable, and no reader from
        before is left.
        """
        for region, bits in held.items():
            left = self._held[region] & ~bits
            if left.any():
                self._held[region] = left
            else:
                del self._held[region]
            count = count_bits(bits)
            self.free_now += count
            self.returned_blocks += count
            if self._state.room.full:
                self.stock.freed_in(region)
            used = self._active_map.peek_used(region)
            if used is not None and used <= ROOMY_USED_MAX:
                self._roomy[region] = None

    @property
    def held_blocks(self) -> int:
        """Blocks that are free but not released yet."""
        return sum(map(count_bits, self._held.values()))
