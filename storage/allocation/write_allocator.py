"""The write allocator: chooses new VBNs, contiguous where it can, and never one that the last
consistency point can reach.

It hands VBNs out of *windows*: runs of free blocks claimed from one or more regions, one window for
data and one for nodes, so that a batch of writes is one extent and a consistency point writes its
nodes in long runs.

Which blocks are available is storage.allocation.claims' business; how many may be taken, by what
and for what, is said here (the reserve: storage.allocation.reserve).
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from storage.allocation.active_map import ActiveMap, Bits, count_bits
from storage.allocation.claims import REGIONS_PER_FILL, Claims
from storage.allocation.interfaces import FreedBlocks
from storage.allocation.node_stock import NodeStock
from storage.allocation.reserve import floors_of
from storage.allocation.window import Window
from storage.errors import HostFull, PoolFull
from storage.layout import BLOCK_BYTES, REGION_BLOCKS, region_count
from storage.state.host_room import HostRoom
from storage.state.pool_state import PoolState
from storage.tree.interfaces import Epoch, Ledger
from storage.tree.node import Hold

# 64 MiB of data and 4 MiB of nodes: a scan of a region (about 60 us) is paid once for that much.
DATA_WINDOW_BLOCKS = 16384
NODE_WINDOW_BLOCKS = 1024
# What a touched image's entry may take: itself, and the level-1 block of the table above it.
ENTRY_BLOCKS = 2
POOL_FULL = "the pool is full: delete snapshots or vdisks, or trim what is not needed"
HOST_FULL = (
    "the host's file system is full: free space where the pool lies, or delete snapshots or vdisks"
)


class WriteAllocator:
    """``free_now`` is the number of blocks that are available or in a window, less those promised;
    ``reserve_blocks`` are not for data.
    """

    __slots__ = (
        "_active_map",
        "_claims",
        "_data",
        "_freed",
        "_host_room",
        "_nodes",
        "_replaying",
        "_size_blocks",
        "_state",
        "borrow_floor",
        "client_floor",
        "free_now",
        "lent_blocks",
        "move_floor",
        "point_floor",
        "promised_blocks",
        "reserve_blocks",
        "returned_blocks",
        "stock",
    )

    def __init__(
        self,
        state: PoolState,
        host_room: HostRoom,
        active_map: ActiveMap,
        freed: FreedBlocks,
        size_blocks: int,
    ) -> None:
        self._state = state
        self._host_room = host_room
        self._active_map = active_map
        self._freed = freed
        self._size_blocks = size_blocks
        self._claims = Claims(active_map, size_blocks)
        window = max(16, size_blocks // 64)
        self._data = Window(min(DATA_WINDOW_BLOCKS, window))
        self._nodes = Window(min(NODE_WINDOW_BLOCKS, window))
        self.free_now = size_blocks - active_map.used_blocks
        self.promised_blocks = 0
        # Borrowed for writes that are not installed yet: they come back, though no epoch says so.
        self.lent_blocks = 0
        # How many blocks came back so far. It only grows: a caller that waits for some sees that
        # they came, also when others were faster.
        self.returned_blocks = 0
        floors = floors_of(size_blocks)
        self.point_floor = floors.point
        self.move_floor = floors.move
        self.borrow_floor = floors.borrow
        self.client_floor = floors.client
        self.reserve_blocks = floors.data
        self._replaying = False
        # Blocks for nodes that the host has allocated already, where that is a question.
        self.stock = NodeStock(state, host_room, self._claims, self, size_blocks)

    @property
    def available_bytes(self) -> int:
        """What the pool still has for data, whatever its host has."""
        return max(0, self.free_now - self.reserve_blocks) * BLOCK_BYTES

    # --- Handing out ------------------------------------------------------------------------------

    def take(self, count: int, borrowed: bool = False) -> list[tuple[int, int]] | None:
        """Extents (first VBN, length) of ``count`` blocks for data. None: nothing was taken, and
        ``state.missing`` is what to wait for.

        ``borrowed``: at least as many blocks come back with the next consistency point. The caller
        enters them into ``AllocationLedger.allocated`` in the same step that installs the pointers
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
            self.free_now -= count
            return window.take_scattered(count)
        self._state.missing = partial(self._bring, window, count, floor)
        return None

    def is_short(self, count: int) -> bool:
        """Whether ``take`` finds no room for so many new blocks, but might for borrowed ones."""
        return self.free_now - count < self.reserve_blocks

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

    def take_node(self, ledger: Ledger) -> int:
        """A VBN for a node, one of those that ``nodes_at_hand`` has found."""
        window = self._nodes
        found = window.advance()
        assert found, "taken without asking for it"
        vbn = window.next
        window.next = vbn + 1
        self.free_now -= 1
        ledger.allocated.append((vbn, 1))
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
        """How much of the stock is for others than a caller that may take nodes down to this
        floor.
        """
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
            if within_point or not await self._freed.come_back(
                self, floor + count - self.free_now, patient=floor < self.client_floor
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
        HostFull for a caller that may be refused.
        """
        kept = self._kept(floor)
        while self.stock.blocks - kept < count - self._nodes.left_blocks:
            if not await self.stock.top_up(kept + count - self._nodes.left_blocks):
                if kept and self.stock.refused:
                    raise HostFull(HOST_FULL)
                return False
        return True

    async def _refill(self, window: Window, count: int, hold: Hold) -> None:
        """Fill a window until it has ``count`` blocks, loading map blocks as needed; ends without
        them after one circle round the pool.
        """
        for _ in range(2 * region_count(self._size_blocks) // REGIONS_PER_FILL + 4):
            if window.left_blocks >= count:
                return
            if self._fill(window, count):
                continue
            await self._active_map.load(self._claims.missing_region, hold)
            await asyncio.sleep(0)
        # The other window may have what this one did not find.
        self._claims.settle_window(self._nodes if window is self._data else self._data)

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
        return self._claims.fill(window, wanted)

    async def make_room(self, full: PoolFull) -> bool:
        """Whether a change of metadata that was refused for want of room is worth another try.

        What it lacked is asked for: the host may have room that nobody has asked for since.
        """
        stock = self.stock
        if isinstance(full, HostFull) and (
            await stock.top_up(full.missing_blocks) or not stock.refused
        ):
            return True
        return await self._freed.come_back(self, full.missing_blocks, patient=False)

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
        self._claims.settle_window(self._data)

    async def claim_in(self, region: int) -> list[tuple[int, int]]:
        """Claim whatever is free in a region: runs (first VBN, end)."""
        window = Window(REGION_BLOCKS)
        with self._state.cache.hold() as hold:
            while self._claims.claim(region, 0, REGION_BLOCKS, window) is None:
                await self._active_map.load(region, hold)
        return window.runs

    def data_ahead(self, runs_max: int) -> list[tuple[int, int]]:
        """Where data will be written next: runs (first VBN, end), in their order; none where that
        is not known.
        """
        window = self._data
        if not window.advance():
            self._fill(window, window.size_blocks)
        return [(window.next, window.end), *reversed(window.runs[-runs_max:])]

    # --- Called by replay and by the consistency point --------------------------------------------

    def adopt(self, first: int, length: int = 1) -> None:
        """Claim blocks by their address: replay found them in use by records of the intent log."""
        self._claims.adopt(first, length)
        self.free_now -= length

    def settle(self, region: int, bits: Bits) -> None:
        """``bits`` are no longer claimed: the map has them now."""
        self._claims.settle(region, bits)

    def hold(self, region: int, bits: Bits) -> None:
        """``bits`` are clear in the map from now on, but must not be handed out before
        ``release``.
        """
        self._claims.hold(region, bits)

    def release(self, held: dict[int, Bits]) -> None:
        """What an epoch held is available again: it is durable, and no reader from
        before is left.
        """
        for region, bits in held.items():
            self._claims.release(region, bits)
            count = count_bits(bits)
            self.free_now += count
            self.returned_blocks += count
            if self._host_room.full:
                self.stock.freed_in(region)
            self._claims.note_roomy(region)

    @property
    def held_blocks(self) -> int:
        """Blocks that are free but not released yet."""
        return self._claims.held_blocks
