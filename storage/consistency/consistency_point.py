"""The consistency point: the atomic step by which everything changed in memory becomes the pool's on-disk state (design section 4).

Order, which is all that makes it atomic:
1. freeze: the current epoch becomes the frozen one; from here on changes go to the next epoch and copy what is frozen;
2. write the frozen nodes of all images, bottom-up, to VBNs they got when they were first changed;
3. write the table entries; bring the share map, then the active map and its summary, to the state of the freeze; write the maps;
4. sync; 5. write the superblock; 6. sync. Only then is the epoch durable, and what it freed may be released.

A crash before 5 is complete leaves the previous superblock in force, and nothing that it reaches was overwritten.
A write that finds the host's file system full is tried until there is room (storage.consistency.host_room): that is no failure.
If any step fails the pool goes read-only: what is frozen can neither be completed nor undone. The table is shown as the last durable one.
"""

import asyncio
from collections.abc import Callable
from time import perf_counter

from crc32c import crc32c

from storage.allocation.active_map import ActiveMap
from storage.configuration import Configuration
from storage.consistency.epoch import Epoch
from storage.consistency.intent_log import IntentLog
from storage.consistency.node_writer import NodeWriter
from storage.consistency.superblock import MetafileRoot, Superblock
from storage.errors import HostStaysFull, PoolReadOnly, VolumeClosed
from storage.images.catalogue import Catalogue
from storage.images.image import KIND_FREE, Image
from storage.images.record import KIND_OFFSET, ROOT_FIELD_OFFSET
from storage.layout import BLOCK_BYTES, CONFIGURATION, FIELD, FIELDS_MASK, FIELDS_SHIFT, HOLE, VDISK_TABLE, ZERO_POINTER, tree_levels
from storage.slices import Slicer, dispose
from storage.state import PoolState
from storage.tree.buffer_tree import BufferTree

AtFreeze = Callable[[], None]

# How old a change may get before it is written: bounds what replay has to do after a crash, and how long freed space waits.
INTERVAL_SECONDS = 5.0
# How often the other triggers are looked at.
WATCH_SECONDS = 0.1
# 64 MiB of dirty nodes, or so many changes that the full log did not take: more would make one consistency point long.
DIRTY_NODES_WANTED = 16384
UNLOGGED_WANTED = 65536


class ConsistencyPoints:
    """Takes consistency points when asked to and when due. ``request`` is what every change of metadata waits for."""

    def __init__(
        self,
        state: PoolState,
        superblock: Superblock,
        catalogue: Catalogue,
        log: IntentLog,
        active_map: ActiveMap,
        metafiles: list[BufferTree],
        configuration: Configuration,
    ) -> None:
        self._state = state
        self._superblock = superblock
        self._catalogue = catalogue
        self._log = log
        self._active_map = active_map
        self._metafiles = metafiles
        self._configuration = configuration
        self._table = metafiles[VDISK_TABLE]
        self._waiting: list[tuple[AtFreeze | None, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._ended = False
        self._due_at = 0.0
        # Set when the log goes on elsewhere than the superblock says: then one has to be written although nothing else changed.
        self.log_moved = False
        self.seconds_last = 0.0
        # Told once when nothing can become durable any more.
        self.on_failure: Callable[[], None] = lambda: None
        self._failed = False
        state.wanted = self._wake.set
        log.durable_by_cp = self.request

    # --- Asking for one ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to take consistency points in the background."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Take a last consistency point if anything changed, and end."""
        self._stopping = True
        self._wake.set()
        if self._task is not None:
            await self._task

    def request(self, at_freeze: AtFreeze | None = None) -> asyncio.Future[None]:
        """A Future for a consistency point whose freeze comes after this call. ``at_freeze`` runs in the freeze, before the epochs change
        places; what it raises is raised to the caller, and its consistency point goes on without it.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._ended:
            future.set_exception(VolumeClosed("the pool is closing: nothing is taken any more"))
            return future
        self._waiting.append((at_freeze, future))
        self._wake.set()
        return future

    async def reclaim(self) -> bool:
        """Make freed blocks available. False: none are on their way."""
        state = self._state
        on_their_way = [epoch for epoch in (state.epoch, state.frozen) if epoch is not None and epoch.frees]
        if not on_their_way and not state.retired:
            return False
        before = state.allocator.free_now
        await self.request()
        while state.retired and state.allocator.free_now <= before:
            await state.room_from_retired()
        return state.allocator.free_now > before

    # --- The loop --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._stopping:
            try:
                await asyncio.wait_for(self._wake.wait(), WATCH_SECONDS)
            except TimeoutError:
                if not self._due():
                    continue
            self._wake.clear()
            await self._take()
        await self._take()
        self._ended = True
        for _, future in self._waiting:  # who came during the last one
            if not future.done():
                future.set_exception(VolumeClosed("the pool is closing: nothing is taken any more"))

    def _due(self) -> bool:
        epoch = self._state.epoch
        if len(epoch.dirty) > min(DIRTY_NODES_WANTED, self._state.cache.nodes_max // 2) or len(epoch.unlogged) > UNLOGGED_WANTED:
            return True
        if self._state.room.full and epoch.frees:
            return True  # the sooner blocks are free, the sooner the host has them back
        return epoch.changed and perf_counter() >= self._due_at

    async def _take(self) -> None:
        """One consistency point, and the answers to all who wait for it."""
        waiting, self._waiting = self._waiting, []
        error: Exception | None = None
        try:
            # First of all: on a pool that takes no changes, no change must be made in memory either.
            self._state.check_writable()
            self._check_not_given_up()
            waiting = self._run_at_freeze(waiting)
            if self._state.epoch.changed or self.log_moved:
                started = perf_counter()
                await self._consistency_point()
                self.seconds_last = perf_counter() - started
        except (PoolReadOnly, HostStaysFull) as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001
            # Whatever it was: what is frozen can neither be completed nor undone, and nobody may wait for ever.
            self._state.fail(f"a consistency point failed: {str(failure) or type(failure).__name__}")
            error = failure
        if error is not None and not self._failed:
            self._failed = True
            self.on_failure()
        for _, future in waiting:
            if future.done():
                continue  # whoever asked has gone
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
        self._due_at = perf_counter() + INTERVAL_SECONDS

    def _check_not_given_up(self) -> None:
        """What is frozen found no room on the host, and the pool is closing: there will not be another one. Raises HostStaysFull."""
        if self._state.frozen is not None:
            raise HostStaysFull("the pool is closing, and its last consistency point found no room on the host: nothing was changed")

    @staticmethod
    def _run_at_freeze(waiting: list[tuple[AtFreeze | None, asyncio.Future[None]]]) -> list[tuple[AtFreeze | None, asyncio.Future[None]]]:
        """Run what belongs to the freeze; those whose part fails are answered at once, the others returned."""
        left = []
        for at_freeze, future in waiting:
            try:
                if at_freeze is not None and not future.cancelled():
                    at_freeze()
            except Exception as error:  # noqa: BLE001
                # Also what is no StorageError: a mistake in one change must not end the consistency points of all.
                future.set_exception(error)
                continue
            left.append((at_freeze, future))
        return left

    # --- One consistency point ---------------------------------------------------------------------------------------

    async def _consistency_point(self) -> None:
        state = self._state
        # A consistency point that frees nothing yet eats from the reserve: there must not be many of them.
        while state.retired and state.allocator.free_now <= state.allocator.client_floor:
            await state.room_from_retired()
        epoch = state.epoch
        head_block, head_sequence, used_at_mark = self._log.mark()
        state.frozen, state.epoch = epoch, Epoch(epoch.number + 1)
        slicer = Slicer()
        writer = NodeWriter(state, epoch, slicer)
        await writer.write_dirty()
        entries = await self._write_entries(epoch, writer, slicer)
        await self._configuration.write(epoch, slicer)
        await state.share_map.apply(epoch, slicer)
        await self._active_map.apply(epoch, slicer)
        await writer.write_dirty()
        state.check_writable()  # a map that contradicts itself has failed the pool: then this state must not become the pool's
        await self._write_superblock(epoch, head_block, head_sequence)
        self.log_moved = self._log.held = False
        self._log.trim(used_at_mark)
        for number, entry in entries:
            self._catalogue.entry_written(number, entry)
        unlogged = epoch.unlogged
        self._finish(epoch)
        await dispose(unlogged, slicer)

    async def _write_entries(self, epoch: Epoch, writer: NodeWriter, slicer: Slicer) -> list[tuple[int, bytearray | None]]:
        """Write the table entries of the images that changed, and point the table at them."""
        written: list[tuple[int, bytearray | None]] = []
        blocks: list[tuple[int, bytearray]] = []
        for image in list(epoch.images):
            entry = epoch.images[image]
            if entry is None:
                entry = epoch.images[image] = image.encode()
            settle_root_crc(image, entry, writer.root_crcs)
            gone = entry[KIND_OFFSET] == KIND_FREE
            vbn = await self._point_at_entry(epoch, image, None if gone else entry)
            self._state.allocator.redeem()
            if not gone:
                blocks.append((vbn, entry))
            written.append((image.number, None if gone else entry))
            await slicer.breathe()
        await writer.write_blocks(blocks)
        return written

    async def _point_at_entry(self, epoch: Epoch, image: Image, entry: bytearray | None) -> int:
        """Enter the new location of an entry (None: it is cleared) into the table's tree; returns its VBN."""
        table = self._table
        levels = tree_levels(image.number + 1)
        while levels > table.levels and not table.grow(levels, epoch):
            await self._state.allocator.prepare_nodes(epoch)
        while True:
            node = table.writable(image.number >> FIELDS_SHIFT, epoch)
            vbn = self._state.allocator.take_node(epoch) if entry is not None and node is not None else HOLE
            if node is not None and (vbn or entry is None):
                break
            await table.prepare(image.number >> FIELDS_SHIFT, epoch)
        slot = (image.number & FIELDS_MASK) * 2
        if node.q[slot] > ZERO_POINTER:
            epoch.freed.append(node.q[slot])
        node.q[slot] = vbn
        node.q[slot + 1] = crc32c(entry) | epoch.number << 32 if entry is not None else 0
        return vbn

    async def _write_superblock(self, epoch: Epoch, head_block: int, head_sequence: int) -> None:
        state, superblock = self._state, self._superblock
        await state.device.sync()
        superblock.cp_number = epoch.number
        superblock.used_blocks = self._active_map.used_blocks
        superblock.log_head_block, superblock.log_head_sequence = head_block, head_sequence
        table_size = max(superblock.roots[VDISK_TABLE].size_blocks, 1 + max((image.number for image in epoch.images), default=0))
        superblock.roots[VDISK_TABLE].size_blocks = table_size
        configuration = superblock.roots[CONFIGURATION]
        configuration.size_blocks = max(configuration.size_blocks, self._configuration.size_blocks)
        for root, tree in zip(superblock.roots, self._metafiles, strict=True):
            write_root(root, tree)
        block = superblock.encode()
        await self._write_block(block, epoch.number & 1)
        await state.device.sync()
        # The other copy follows without a sync of its own: the first one is durable, and the next consistency point writes over it only
        # after a sync. So damage to either copy costs nothing (docs/design.md, "Superblocks").
        await self._write_block(block, ~epoch.number & 1)

    async def _write_block(self, block: bytearray, vbn: int) -> None:
        await self._state.room.put((block,), vbn * BLOCK_BYTES)

    def _finish(self, epoch: Epoch) -> None:
        """The epoch is durable: what it freed waits only for older reads now."""
        state = self._state
        assert not epoch.dirty and not epoch.saved and not epoch.pointer_delta
        state.frozen = None
        epoch.images = {}
        epoch.unlogged = []
        followers, epoch.when_durable = epoch.when_durable, []
        for follow in followers:
            follow()
        state.retire(epoch)


def settle_root_crc(image: Image, entry: bytearray, root_crcs: dict[int, int]) -> None:
    """Fill in the CRC32C of a root that this consistency point wrote, in the entry and in the image if it still has that root."""
    vbn, _, birth = FIELD.unpack_from(entry, ROOT_FIELD_OFFSET)
    crc = root_crcs.get(vbn)
    if crc is None:
        return
    FIELD.pack_into(entry, ROOT_FIELD_OFFSET, vbn, crc, birth)
    if image.tree.root_vbn == vbn:
        image.tree.root_crc = crc


def write_root(root: MetafileRoot, tree: BufferTree) -> None:
    """Copy a metafile's root into the superblock's field for it."""
    root.vbn, root.crc, root.birth, root.levels = tree.root_vbn, tree.root_crc, tree.root_birth, tree.levels
