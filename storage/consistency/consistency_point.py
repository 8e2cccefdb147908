"""The consistency point: the atomic step by which everything changed in memory becomes the pool's
on-disk state (design section 4).

Order, which is all that makes it atomic:
1. freeze: the current epoch becomes the frozen one; from here on changes go to the next epoch and
   copy what is frozen;
2. write the frozen nodes of all images, bottom-up, to VBNs they got when they were first changed;
3. write the table entries; bring the share map, then the active map and its summary, to the state
   of the freeze; write the maps;
4. sync; 5. write the superblock; 6. sync. Only then is the epoch durable, and what it freed may be
   released.

A crash before 5 is complete leaves the previous superblock in force, and nothing that it reaches
was overwritten. A write that finds the host's file system full is tried until there is room
(storage.state.host_room): that is no failure. If any step fails the pool goes read-only: what is
frozen can neither be completed nor undone. The table is shown as the last durable one.
"""

import asyncio
from time import perf_counter
from typing import NamedTuple, Protocol

from storage.allocation.active_map import ActiveMap
from storage.allocation.map_changes import MapChanges
from storage.allocation.share_map import ShareMap
from storage.allocation.write_allocator import WriteAllocator
from storage.checksum import crc32c
from storage.consistency.configuration import Configuration
from storage.consistency.node_writer import NodeWriter
from storage.consistency.retirement import Retired, Retirement
from storage.epoch.dirty_set import ChangedImage
from storage.epoch.epoch import Epoch
from storage.errors import HostStaysFull, PoolReadOnly, StorageError
from storage.fields import set_field, vbn_at
from storage.images.catalogue import Catalogue
from storage.images.image import KIND_FREE
from storage.images.record import KIND_OFFSET, ROOT_FIELD_OFFSET
from storage.layout import (
    BLOCK_BYTES,
    CONFIGURATION,
    CP_LAST,
    CP_WARNED_FROM,
    FIELD,
    FIELDS_SHIFT,
    HOLE,
    VDISK_TABLE,
    ZERO_POINTER,
    tree_levels,
)
from storage.log.intent_log import IntentLog
from storage.slicer import Slicer, dispose
from storage.state.host_room import HostRoom
from storage.state.point_requests import PointRequests
from storage.state.pool_state import PoolState
from storage.superblock.superblock import MetafileRoot, Superblock
from storage.tree.attempt import when_possible
from storage.tree.buffer_tree import BufferTree
from storage.tree.editor import TreeEditor

# The frozen epoch, and what the log says of itself at the freeze: block and sequence of its next
# record, blocks used.
Frozen = tuple[Epoch, tuple[int, int, int]]

# How old a change may get before it is written: bounds what replay has to do after a crash, and how
# long freed space waits.
INTERVAL_SECONDS = 5.0
# How often the other triggers are looked at.
WATCH_SECONDS = 0.1
# After so long without a consistency point the second copy of the superblock is synced too.
REST_SECONDS = 1.0
# 64 MiB of dirty nodes, or so many changes that the full log did not take: more would make one
# consistency point long.
DIRTY_NODES_WANTED = 16384
UNLOGGED_WANTED = 65536


class FollowsTable(Protocol):
    """What shows the table to others, beside the catalogue: open volumes."""

    def reverted(self) -> None:
        """The catalogue went back to the last durable consistency point."""


class Written(NamedTuple):
    """What a consistency point brings to the device, beside the nodes of images."""

    superblock: Superblock
    catalogue: Catalogue
    log: IntentLog
    configuration: Configuration
    active_map: ActiveMap
    map_changes: MapChanges
    share_map: ShareMap
    # In the order of layout.METAFILES.
    metafiles: list[TreeEditor]


class ConsistencyPoints:
    """Takes consistency points when they are requested and when they are due. ``seconds_last`` is
    how long the last one took.
    """

    def __init__(
        self,
        state: PoolState,
        host_room: HostRoom,
        requests: PointRequests,
        allocator: WriteAllocator,
        retired: Retired,
        retirement: Retirement,
        written: Written,
        volumes: FollowsTable,
    ) -> None:
        self._state = state
        self._host_room = host_room
        self._requests = requests
        self._allocator = allocator
        self._retired = retired
        self._retirement = retirement
        self._superblock = written.superblock
        self._catalogue = written.catalogue
        self._log = written.log
        self._configuration = written.configuration
        self._active_map = written.active_map
        self._map_changes = written.map_changes
        self._share_map = written.share_map
        self._metafiles = [editor.tree for editor in written.metafiles]
        self._table = written.metafiles[VDISK_TABLE]
        self._volumes = volumes
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._due_at = 0.0
        # When the second copy of the superblock was written, while no sync has covered it.
        self._second_copy_at: float | None = None
        self._log_moved = False
        self._failed = False
        self._number_told = False
        self.seconds_last = 0.0

    def start(self) -> None:
        """Begin to take consistency points in the background."""
        self._requests.served = True
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Take a last consistency point if anything changed, and end."""
        self._stopping = True
        self._requests.want()
        if self._task is not None:
            await self._task

    def log_has_moved(self) -> asyncio.Future[None]:
        """The log goes on elsewhere than the superblock says: one has to be written although
        nothing else changed, and nothing may be logged before.
        """
        self._log_moved = self._log.held = True
        return self._requests.request()

    # --- The loop ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        wake = self._requests.wake
        while not self._stopping:
            try:
                await asyncio.wait_for(wake.wait(), WATCH_SECONDS)
            except TimeoutError:
                if not self._due():
                    await self._sync_second_copy()
                    continue
            wake.clear()
            await self._take()
        await self._take()
        self._requests.close()

    async def _sync_second_copy(self) -> None:
        """A pool that rests has both copies durable: the second has no sync of its own, and the
        next consistency point may be far.
        """
        if self._second_copy_at is None or perf_counter() - self._second_copy_at < REST_SECONDS:
            return
        if self._state.read_only_reason is not None:
            return
        self._second_copy_at = None
        try:
            await self._state.device.sync()
        except StorageError as error:
            self._state.fail(f"a sync failed: {error}")

    def _due(self) -> bool:
        epoch = self._state.epoch
        if (
            len(epoch.dirty.nodes) > min(DIRTY_NODES_WANTED, self._state.cache.nodes_max // 2)
            or len(epoch.unlogged.entries) > UNLOGGED_WANTED
        ):
            return True
        if self._host_room.full and epoch.frees:
            return True  # the sooner blocks are free, the sooner the host has them back
        return epoch.changed and perf_counter() >= self._due_at

    async def _take(self) -> None:
        """One consistency point, and the answers to all that wait for it."""
        waiting: list[asyncio.Future[None]] = []
        error: Exception | None = None
        try:
            await self._room_for_one()
            # First of all: on a pool that takes no changes, no change must be made in memory
            # either.
            self.check_number()
            self._state.check_writable()
            self._check_not_given_up()
            frozen = self._freeze(waiting)
            if frozen is not None:
                started = perf_counter()
                await self._consistency_point(frozen)
                self.seconds_last = perf_counter() - started
        except (PoolReadOnly, HostStaysFull) as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001
            # Whatever it was: what is frozen can neither be completed nor undone, and nothing may
            # wait for ever.
            self._state.fail(
                f"a consistency point failed: {str(failure) or type(failure).__name__}"
            )
            error = failure
        if error is not None and not self._failed:
            self._failed = True
            self._revert()
        if error is not None:
            waiting += [future for _, future in self._requests.waiting]
            self._requests.waiting = []
        for future in waiting:
            if future.done():
                continue  # the caller has gone
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
        self._due_at = perf_counter() + INTERVAL_SECONDS

    def _revert(self) -> None:
        """Nothing can become durable any more: show what is, for nobody was told of
        anything else.
        """
        state = self._state
        epochs = [epoch for epoch in (state.frozen, state.epoch) if epoch is not None]
        self._catalogue.revert(
            dict.fromkeys(image.number for epoch in epochs for image in epoch.dirty.images)
        )
        self._configuration.revert()
        self._volumes.reverted()

    def _check_not_given_up(self) -> None:
        """What is frozen found no room on the host, and the pool is closing: there will not be
        another one. Raises HostStaysFull.
        """
        if self._state.frozen is not None:
            raise HostStaysFull(
                "the pool is closing, and its last consistency point found no room on the host:"
                " nothing was changed"
            )

    def check_number(self) -> None:
        """Say that the numbers of consistency points will come to an end, and stop taking changes
        long before they do.
        """
        number = self._state.epoch.number
        if number >= CP_LAST:
            self._state.fail(
                f"consistency point {number} is the last that a pool can count: copy its vdisks"
                " into a new pool"
            )
        elif number >= CP_WARNED_FROM and not self._number_told:
            self._number_told = True
            self._state.on_event("pool.cp_number_high", cp_number=number, cp_number_last=CP_LAST)

    async def _room_for_one(self) -> None:
        """A consistency point that frees nothing yet eats from the reserve: there must not be many
        of them.
        """
        allocator = self._allocator
        while self._retired.epochs and allocator.free_now <= allocator.client_floor:
            await self._retired.wait_for_room()

    def _freeze(self, waiting: list[asyncio.Future[None]]) -> Frozen | None:
        """The freeze, one step: run what belongs to it, and let the epochs change places. None:
        there is nothing to write.

        Appends to ``waiting`` what is answered when this consistency point is durable.
        """
        self._run_at_freeze(waiting)
        state = self._state
        epoch = state.epoch
        if not epoch.changed and not self._log_moved:
            return None
        mark = self._log.mark()
        state.frozen, state.epoch = epoch, Epoch(epoch.number + 1)
        return epoch, mark

    def _run_at_freeze(self, waiting: list[asyncio.Future[None]]) -> None:
        """Run what belongs to the freeze; those whose part fails are answered at once.

        Each may touch table entries, which this consistency point must have room for: where the
        reserve has no more, the rest waits for the next one.
        """
        allocator, requests = self._allocator, self._requests
        at, changed = 0, False
        for at_freeze, future in requests.waiting:
            if changed and allocator.free_now < allocator.point_floor:
                requests.want()
                break
            at += 1
            try:
                if at_freeze is not None and not future.cancelled():
                    at_freeze()
                    changed = True
            except Exception as error:  # noqa: BLE001
                # Also what is no StorageError: a mistake in one change must not end the consistency
                # points of all.
                future.set_exception(error)
                continue
            waiting.append(future)
        del requests.waiting[:at]

    # --- One consistency point --------------------------------------------------------------------

    async def _consistency_point(self, frozen: Frozen) -> None:
        epoch, (head_block, head_sequence, used_at_mark) = frozen
        state, slicer = self._state, Slicer()
        writer = NodeWriter(state.device, self._host_room, epoch, slicer)
        await writer.write_dirty()
        entries = await self._write_entries(epoch, writer, slicer)
        await self._configuration.write(epoch, slicer)
        await self._share_map.apply(epoch, slicer)
        await self._map_changes.apply(epoch, slicer)
        await writer.write_dirty()
        # A map that contradicts itself has failed the pool: then this state must not become the
        # pool's.
        state.check_writable()
        await self._write_superblock(epoch, head_block, head_sequence)
        self._log_moved = self._log.held = False
        self._log.trim(used_at_mark)
        for number, entry in entries:
            self._catalogue.entry_written(number, entry)
        unlogged = epoch.unlogged.drain()
        self._finish(epoch)
        await dispose(unlogged, slicer)

    async def _write_entries(
        self, epoch: Epoch, writer: NodeWriter, slicer: Slicer
    ) -> list[tuple[int, bytearray | None]]:
        """Write the table entries of the images that changed, and point the table at them."""
        written: list[tuple[int, bytearray | None]] = []
        blocks: list[tuple[int, bytearray]] = []
        images = epoch.dirty.images
        for image in list(images):
            entry = images[image]
            if entry is None:
                entry = images[image] = image.encode()
            settle_root_crc(image, entry, writer.root_crcs)
            gone = entry[KIND_OFFSET] == KIND_FREE
            vbn = await self._point_at_entry(epoch, image.number, None if gone else entry)
            self._allocator.redeem()
            if not gone:
                blocks.append((vbn, entry))
            written.append((image.number, None if gone else entry))
            await slicer.breathe()
        await writer.write_blocks(blocks)
        return written

    async def _point_at_entry(self, epoch: Epoch, number: int, entry: bytearray | None) -> int:
        """Enter the new location of an entry (None: it is cleared) into the table's tree; returns
        its VBN.
        """
        levels = tree_levels(number + 1)
        await when_possible(self._state, lambda: self._table.grow(levels, epoch))
        return await when_possible(
            self._state, lambda: self._point_at_entry_now(epoch, number, entry)
        )

    def _point_at_entry_now(self, epoch: Epoch, number: int, entry: bytearray | None) -> int | None:
        allocator = self._allocator
        node = self._table.writable(number >> FIELDS_SHIFT, epoch)
        if node is None or (
            entry is not None
            and not allocator.nodes_at_hand(1, allocator.floor(epoch, grows=True), entry=False)
        ):
            return None
        old = vbn_at(node.q, number)
        if old > ZERO_POINTER:
            epoch.ledger.freed.append(old)
        if entry is None:
            set_field(node.q, number, (HOLE, 0, 0))
            return HOLE
        vbn = allocator.take_node(epoch.ledger)
        set_field(node.q, number, (vbn, crc32c(entry), epoch.number))
        return vbn

    async def _write_superblock(self, epoch: Epoch, head_block: int, head_sequence: int) -> None:
        state = self._state
        await state.device.sync()
        block = self._next_superblock(epoch, head_block, head_sequence)
        await self._write_block(block, epoch.number & 1)
        await state.device.sync()
        # The other copy follows without a sync of its own: the first one is durable, and the next
        # consistency point writes over it only after a sync, or the pool comes to rest and syncs
        # it. So damage to either copy costs nothing (docs/design.md, "Superblocks").
        await self._write_block(block, ~epoch.number & 1)
        self._second_copy_at = perf_counter()

    def _next_superblock(self, epoch: Epoch, head_block: int, head_sequence: int) -> bytearray:
        """The superblock that names what was written, all of it as of one moment."""
        superblock = self._superblock
        superblock.cp_number = epoch.number
        superblock.used_blocks = self._active_map.used_blocks
        superblock.log_head_block, superblock.log_head_sequence = head_block, head_sequence
        table_size = max(
            superblock.roots[VDISK_TABLE].size_blocks,
            1 + max((image.number for image in epoch.dirty.images), default=0),
        )
        superblock.roots[VDISK_TABLE].size_blocks = table_size
        configuration = superblock.roots[CONFIGURATION]
        configuration.size_blocks = max(configuration.size_blocks, self._configuration.size_blocks)
        for root, tree in zip(superblock.roots, self._metafiles, strict=True):
            write_root(root, tree)
        return superblock.encode()

    async def _write_block(self, block: bytearray, vbn: int) -> None:
        await self._host_room.put((block,), vbn * BLOCK_BYTES)

    def _finish(self, epoch: Epoch) -> None:
        """The epoch is durable: what it freed waits only for older reads now."""
        state = self._state
        dirty = epoch.dirty
        assert not dirty.nodes and not dirty.saved and not epoch.ledger.pointer_delta
        state.frozen = None
        dirty.images = {}
        followers, epoch.when_durable = epoch.when_durable, []
        for follow in followers:
            follow()
        self._retirement.retire(epoch)
        state.cache.trim()


def settle_root_crc(image: ChangedImage, entry: bytearray, root_crcs: dict[int, int]) -> None:
    """Fill in the CRC32C of a root that this consistency point wrote, in the entry and in the image
    if it still has that root.
    """
    vbn, _, birth = FIELD.unpack_from(entry, ROOT_FIELD_OFFSET)
    crc = root_crcs.get(vbn)
    if crc is None:
        return
    FIELD.pack_into(entry, ROOT_FIELD_OFFSET, vbn, crc, birth)
    if image.tree.root_vbn == vbn:
        image.tree.root_crc = crc


def write_root(root: MetafileRoot, tree: BufferTree) -> None:
    """Copy a metafile's root into the superblock's field for it."""
    root.vbn, root.crc, root.birth, root.levels = (
        tree.root_vbn,
        tree.root_crc,
        tree.root_birth,
        tree.levels,
    )
