"""The pool: opens a device, puts the rooms together, and is what the daemon calls (docs/design.md,
"What the daemon calls").
"""

import asyncio
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from typing import Any
from uuid import UUID

from storage.allocation.active_map import ActiveMap
from storage.allocation.share_map import ShareMap
from storage.allocation.write_allocator import WriteAllocator
from storage.backdoor.handler import BackdoorMessageHandler, in_background
from storage.backdoor.reclaim import Reclaim
from storage.backdoor.scrub import RATE_BYTES_DEFAULT, Scrub
from storage.check import check_live
from storage.consistency.configuration import Configuration
from storage.consistency.consistency_point import ConsistencyPoints
from storage.consistency.replay import Replay, Replayed
from storage.device import Device, is_block_device, new_device, open_device
from storage.device.owner import Owner
from storage.errors import (
    Conflict,
    DeviceFull,
    NoPool,
    NotFound,
    PoolRefused,
    RequestError,
    StorageError,
)
from storage.formatting import begin_format, erase_marks, why_no_pool, write_zeros
from storage.images.catalogue import Catalogue
from storage.images.image import Image
from storage.images.table_reader import read_table
from storage.layout import (
    ACTIVE_MAP,
    BLOCK_BYTES,
    CONFIGURATION,
    KIND_SNAPSHOT,
    KIND_VDISK,
    LOG_FIRST_VBN,
    METAFILE_NAMES,
    POOL_BLOCKS_MIN,
    REGION_SUMMARY,
    SHARE_MAP,
    SHARES_PER_BLOCK,
    SUMMARIES_PER_BLOCK,
    VDISK_TABLE,
    log_blocks,
    region_count,
    tree_levels,
)
from storage.log.intent_log import IntentLog
from storage.split.service import SplitService
from storage.state.pool_state import EventSink, PoolState
from storage.state.under_way import UnderWay, ends_at_close
from storage.superblock.copies import Copies, read_copies, write_copies
from storage.superblock.superblock import Superblock
from storage.tree.buffer_tree import BufferTree
from storage.vdisks.lifecycle import Lifecycle
from storage.vdisks.listing import Listing
from storage.vdisks.volume import Volume

CACHE_BYTES_DEFAULT = 256 << 20


class Pool:
    """One open pool. All methods are called on the event loop that opened it."""

    def __init__(self, device: Device, superblock: Superblock, cache_bytes: int) -> None:
        self._device = device
        self._superblock = superblock
        state = self._state = PoolState(device, superblock.cp_number, cache_bytes)
        metafiles = [
            BufferTree(
                state,
                METAFILE_NAMES[number],
                root.levels,
                (root.vbn, root.crc, root.birth),
                0,
                None,
            )
            for number, root in enumerate(superblock.roots)
        ]
        self._metafiles = metafiles
        self.under_way = UnderWay()
        self._scrub: Scrub | None = None
        self._table = metafiles[VDISK_TABLE]
        self._active_map = ActiveMap(
            state, metafiles[ACTIVE_MAP], metafiles[REGION_SUMMARY], superblock.used_blocks
        )
        state.share_map = ShareMap(state, metafiles[SHARE_MAP])
        state.allocator = WriteAllocator(state, self._active_map, superblock.size_blocks)
        self._catalogue = Catalogue(state)
        self._log = IntentLog(
            state,
            superblock.uuid,
            superblock.log_blocks,
            superblock.log_head_block,
            superblock.log_head_sequence,
        )
        self._configuration = Configuration(state, metafiles[CONFIGURATION])
        self._points = ConsistencyPoints(
            state,
            superblock,
            self._catalogue,
            self._log,
            self._active_map,
            metafiles,
            self._configuration,
        )
        self._handler = BackdoorMessageHandler(state)
        self._lifecycle = Lifecycle(state, self._catalogue, self._points, self._log)
        self._lifecycle.deleted = self._post_reclaim
        self._points.on_failure = self._revert
        self._splits = SplitService(
            state, self._catalogue, self._points, self._handler, self._lifecycle
        )
        self._listing = Listing(state, self._catalogue, self._points)

    # --- Creating, opening, closing ---------------------------------------------------------------

    @staticmethod
    def create(
        path: str, size_bytes: int | None = None, *, overwrite: bool = False
    ) -> dict[str, Any]:
        """Make a new pool, in a file (sparse) or on a block device, which has a size of its own.
        Call it where no event loop runs.

        ``overwrite``: what is there goes, at once when it is a device, and when the new pool is
        whole when it is a file. Interrupted at any moment it leaves nothing that a later creation
        stumbles over. Returns path, uuid, size_bytes. Raises Conflict (something is there),
        RequestError (size), PoolLocked, PoolRefused, DeviceFull, DeviceFailed.
        """
        if size_bytes is not None:
            size_bytes = checked_size(size_bytes) * BLOCK_BYTES
        with new_device(path, size_bytes, overwrite=overwrite) as device:
            superblock = asyncio.run(Pool.format(device, size_bytes, erase=is_block_device(path)))
        return {
            "path": path,
            "uuid": str(UUID(bytes=superblock.uuid)),
            "size_bytes": superblock.size_blocks * BLOCK_BYTES,
        }

    @classmethod
    async def format(
        cls, device: Device, size_bytes: int | None = None, *, erase: bool = False
    ) -> Superblock:
        """Make a new pool on a device, over whatever it holds, with its superblocks last.
        ``size_bytes``: not the whole device.

        ``erase``: the marks of what was there, too. Raises RequestError, DeviceFailed.
        """
        size_blocks = checked_size(device.size_bytes if size_bytes is None else size_bytes)
        superblock = Superblock(
            uuid.uuid4().bytes, size_blocks, log_blocks(size_blocks), time.time_ns()
        )
        regions = region_count(size_blocks)
        for number, size in (
            (ACTIVE_MAP, regions),
            (SHARE_MAP, -(-size_blocks // SHARES_PER_BLOCK)),
            (REGION_SUMMARY, -(-regions // SUMMARIES_PER_BLOCK)),
        ):
            superblock.roots[number].size_blocks, superblock.roots[number].levels = (
                size,
                tree_levels(size),
            )
        await begin_format(device)
        if erase:
            await erase_marks(device)
        await write_zeros(device, LOG_FIRST_VBN, LOG_FIRST_VBN + superblock.log_blocks)
        pool = cls(device, superblock, CACHE_BYTES_DEFAULT)
        fixed = LOG_FIRST_VBN + superblock.log_blocks
        pool._state.allocator.adopt(0, fixed)
        pool._state.epoch.allocated.append((0, fixed))
        pool._points.start()
        try:
            await pool._points.request()
        finally:
            await pool._points.stop()
        await device.sync()
        return superblock

    @classmethod
    async def open(
        cls, path: str, cache_bytes: int = CACHE_BYTES_DEFAULT, on_event: EventSink | None = None
    ) -> "Pool":
        """Open the pool at ``path``, note this process as its owner, replay its log, and go on with
        its background work.

        Raises PoolRefused, PoolLocked, DeviceFailed.
        """
        device = open_device(path)
        try:
            return await cls.open_on(device, cache_bytes, on_event, Owner.of_this_process())
        except NoPool as refusal:
            device.close()
            raise PoolRefused(why_no_pool(path)) from refusal
        except BaseException:
            device.close()
            raise

    @classmethod
    async def open_on(
        cls,
        device: Device,
        cache_bytes: int = CACHE_BYTES_DEFAULT,
        on_event: EventSink | None = None,
        owner: Owner | None = None,
    ) -> "Pool":
        """``open`` on a device that is open already; the pool closes it. ``owner`` is noted in the
        pool until it is closed.
        """
        copies = await read_copies(device)
        pool = cls(device, copies.best, cache_bytes)
        if on_event is not None:
            pool._state.on_event = on_event
        try:
            await pool._start(copies, owner)
        except BaseException:
            await pool._points.stop()
            raise
        return pool

    async def _start(self, copies: Copies, owner: Owner | None) -> None:
        self._points.check_number()
        if self._superblock.unknown_ro_compat:
            self._state.fail(
                "it has features that this version can only read past: use a newer cleaved to write"
            )
        else:
            await self._sync_what_is_there()
            await self._take_over(copies, owner)
        await read_table(
            self._state,
            self._table,
            self._catalogue,
            self._superblock.roots[VDISK_TABLE].size_blocks,
        )
        await self._configuration.load()
        self._splits.take_up()
        replayed = await self._replay()
        self._state.allocator.reclaim = self._reclaim
        self._state.allocator.stock.start()
        self._points.start()
        if replayed.moved and self._state.read_only_reason is None:
            self._points.log_moved = self._log.held = True
            await self._unless_the_host_is_full(self._points.request())
        self._handler.start()
        self._splits.go_on()
        self._lifecycle.delete_marked()
        for number in sorted(self._catalogue.deleted):
            self._post_reclaim(self._catalogue.image(number))
        self._state.on_event(
            "pool.opened",
            path=self._device.path,
            cp_number=self._superblock.cp_number,
            images=len(self._catalogue),
            records_replayed=replayed.records,
            changes_replayed=replayed.entries,
        )

    async def _unless_the_host_is_full(self, point: "asyncio.Future[None]") -> None:
        """Wait for a consistency point, but not for the host to have room: everything can be read
        meanwhile.
        """
        while not point.done() and not self._state.room.full:
            await asyncio.wait([point], timeout=FULL_POLL_SECONDS)
        if point.done():
            point.result()
        else:
            point.add_done_callback(seen)

    async def _sync_what_is_there(self) -> None:
        """What the last process wrote may be in the page cache only. Nothing must be built on that:
        blocks that its consistency point freed would be written over while the durable one still
        needs them.
        """
        try:
            await self._device.sync()
        except StorageError as error:
            self._state.fail(f"what the pool holds cannot be made durable: {error}")

    async def _take_over(self, copies: Copies, owner: Owner | None) -> None:
        """Make both copies of the superblock the newest one, with its owner in it: before anything
        else is written, for a consistency point writes over one copy in the belief that the other
        one is good.
        """
        superblock, state = self._superblock, self._state
        if state.read_only_reason is not None or (not copies.faults and owner == superblock.owner):
            return
        if (
            owner is not None
            and superblock.owner is not None
            and not owner.shares_boot_with(superblock.owner)
        ):
            gone = superblock.owner
            state.on_event(
                "pool.owner_changed",
                previous_host=gone.host,
                previous_pid=gone.pid,
                previous_opened_ns=gone.opened_ns,
            )
        superblock.owner = owner
        try:
            await write_copies(self._device, superblock, copies.whole_vbn)
        except DeviceFull as full:
            if copies.faults:
                state.fail(f"the two copies of the superblock cannot be made the same: {full}")
            else:
                state.room.met(
                    full
                )  # both are good, and the owner gets in with the next consistency point
            return
        except StorageError as error:
            state.fail(f"the two copies of the superblock cannot be made the same: {error}")
            return
        for vbn, fault in copies.faults.items():
            state.on_event(
                "superblock.repaired", vbn=vbn, reason=fault, cp_number=superblock.cp_number
            )

    async def _replay(self) -> Replayed:
        with self._state.allocator.replaying():
            replayed = await Replay(self._state, self._superblock, self._catalogue).run()
        self._log.begin_at(replayed.head_block, replayed.next_sequence)
        return replayed

    async def close(self) -> None:
        """Finish what is under way, take a consistency point, release the device.

        On a full host that consistency point is given up after CLOSE_SECONDS. What was acknowledged
        is then durable in the log.
        """
        self.close_soon()
        await self._handler.stop()
        await self._lifecycle.close_volumes()
        await self._log.drain()
        await self._points.stop()
        await self.under_way.end()
        while self._state.discarding is not None:
            await self._state.discarding
        await self._state.room.stop()
        await self._state.allocator.stock.stop()
        if self._state.read_only_reason is None:
            try:
                await self._let_go()
            except StorageError as error:
                self._state.fail(
                    f"the last sync failed: {error}"
                )  # the device is released all the same
        if self._state.frozen is not None and self._state.read_only_reason is None:
            self._state.on_event(
                "pool.closed_on_full_host",
                cp_number=self._superblock.cp_number,
                log_records=self._log.records,
            )
        self._state.on_event(
            "pool.closed", cp_number=self._superblock.cp_number, log_records=self._log.records
        )
        self._device.close()

    async def _let_go(self) -> None:
        """Make everything durable, the second copy of the superblock too, and clear the owner in
        both. Raises DeviceFailed.
        """
        superblock = self._superblock
        await self._device.sync()  # first of all: what was acknowledged may be in the log only
        if superblock.owner is None or self._state.frozen is not None:
            return  # what was given up for want of room must not come to be after all
        superblock.owner = None
        with suppress(DeviceFull):  # an owner that is dead is in nobody's way
            await write_copies(self._device, superblock, superblock.cp_number & 1)

    def close_soon(self) -> None:
        """The pool will be closed: what waits for room on the host gets an answer within
        CLOSE_SECONDS.
        """
        self._state.room.close_within(CLOSE_SECONDS)

    async def _reclaim(self, blocks: int, patient: bool) -> bool:
        """Make freed blocks available, those that background reclaim is still collecting included.
        False: so many are not on their way.

        The background itself does not wait for reclaim: that is a message in the same queue, and
        would wait for it in turn.
        """
        if await self._points.reclaim(blocks, patient):
            return True
        if (
            in_background.get()
            or not self._handler.holds(Reclaim)
            or self._state.read_only_reason is not None
        ):
            return False
        await asyncio.sleep(RECLAIM_POLL_SECONDS)
        return True

    def _revert(self) -> None:
        """Nothing can become durable any more: show what is, for nobody was told of
        anything else.
        """
        epochs = [epoch for epoch in (self._state.frozen, self._state.epoch) if epoch is not None]
        self._catalogue.revert(dict.fromkeys(image for epoch in epochs for image in epoch.images))
        self._configuration.revert()
        self._lifecycle.reverted()

    def _post_reclaim(self, image: Image) -> None:
        self._handler.post(Reclaim(self._state, image, self._catalogue.deleted, self._handler.post))

    # --- The pool itself --------------------------------------------------------------------------

    @property
    def on_event(self) -> EventSink:
        """Where events go: called with a stable name and fields."""
        return self._state.on_event

    @on_event.setter
    def on_event(self, sink: EventSink) -> None:
        self._state.on_event = sink

    @ends_at_close
    async def consistency_point(self) -> None:
        """Make everything durable and the log empty. Raises PoolReadOnly, DeviceFailed."""
        await self._points.request()

    def configuration(self, section: str) -> bytes:
        """What ``configure`` last stored under that name; empty if nothing was."""
        return self._configuration.get(section)

    @ends_at_close
    async def configure(self, section: str, value: bytes) -> None:
        """Store bytes under a name, durably (targets, access control, reservations). Raises
        RequestError, PoolFull, PoolReadOnly.
        """
        await self._points.request_with_room(lambda: self._configuration.replace(section, value))

    def space(self) -> tuple[int, int]:
        """Bytes used, and bytes that the pool (not its host) has for vdisks. Cheaper than ``show``:
        for those who look every second.
        """
        return self._active_map.used_blocks * BLOCK_BYTES, self._state.allocator.available_bytes

    def show(self) -> dict[str, Any]:
        """Size, use and state of the pool."""
        state, superblock = self._state, self._superblock
        size = superblock.size_blocks
        return {
            "path": self._device.path,
            "uuid": str(UUID(bytes=superblock.uuid)),
            "size_bytes": size * BLOCK_BYTES,
            "used_bytes": self._active_map.used_blocks * BLOCK_BYTES,
            "free_bytes": (size - self._active_map.used_blocks) * BLOCK_BYTES,
            **state.room.shown(state.allocator.available_bytes),
            "host_reserve_bytes": state.allocator.stock.blocks * BLOCK_BYTES,
            "reserve_bytes": state.allocator.reserve_blocks * BLOCK_BYTES,
            "cp_number": superblock.cp_number,
            "cp_seconds_last": round(self._points.seconds_last, 6),
            "log_commits": self._log.commits,
            "read_only": state.read_only_reason is not None,
            "read_only_reason": state.read_only_reason,
            "vdisks": len(self._catalogue.vdisks),
            "snapshots": sum(map(len, self._catalogue.snapshots.values())),
            "deleted_images": len(self._catalogue.deleted),
            "cached_nodes": len(state.cache),
            "background_messages": self._handler.messages,
        }

    @ends_at_close
    async def check(self, verify_data: bool = False) -> dict[str, Any]:
        """Check the state of the last consistency point while the pool goes on; its blocks are kept
        from reuse meanwhile.

        Raises Conflict when the pool ran out of other space.
        """
        while self._state.read_only_reason is None:
            await self._points.request()
            if self._state.frozen is None:
                break
        state = self._state
        epoch = state.begin_read()
        task = asyncio.create_task(
            check_live(self._device, await self._durable_superblock(), verify_data)
        )
        state.checks.add(task)
        try:
            report = await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise Conflict(
                "the pool ran short of space, and the check was keeping what was freed: free some,"
                " and run it again"
            ) from None
        finally:
            state.checks.discard(task)
            state.end_read(epoch)
        return report.as_dict()

    @ends_at_close
    async def scrub_start(self, rate_max_bytes: int | None = None) -> dict[str, Any]:
        """Begin to read and verify every block in use, in the background, at most so many bytes a
        second. Raises Conflict, PoolReadOnly.
        """
        self._state.check_writable()
        if self._scrub is not None and self._scrub.state == "running":
            raise Conflict("a scrub is under way: wait for its end, or cancel it")
        self._scrub = Scrub(
            self._state, self._catalogue, self._metafiles, self._superblock.size_blocks,
            self._active_map.used_blocks, rate_max_bytes or RATE_BYTES_DEFAULT,
        )  # fmt: skip
        self._state.on_event("scrub.started", rate_max_bytes=self._scrub.rate_max_bytes)
        self._handler.post(self._scrub)
        return self._scrub.as_dict()

    def scrub_show(self) -> dict[str, Any]:
        """State, progress and findings of the last scrub since the pool was opened. Raises
        NotFound.
        """
        if self._scrub is None:
            raise NotFound(
                "no scrub was started since the pool was opened: `cleavectl pool scrub` starts one"
            )
        return self._scrub.as_dict()

    @ends_at_close
    async def scrub_cancel(self) -> dict[str, Any]:
        """End the scrub; what it found so far stays to be shown. Raises NotFound."""
        shown = self.scrub_show()
        if self._scrub is not None and shown["state"] == "running":
            self._scrub.state = "cancelled"
            self._handler.withdraw(self._scrub)
        return self.scrub_show()

    async def _durable_superblock(self) -> bytearray:
        """The superblock in force. On a pool that went read-only the one in memory may be of a
        consistency point that failed.
        """
        if self._state.read_only_reason is None:
            return self._superblock.encode()
        return (await read_copies(self._device)).best.encode()

    # --- Vdisks, snapshots, clones ----------------------------------------------------------------

    def names(self) -> list[str]:
        """Names of all vdisks, sorted."""
        return sorted(self._catalogue.vdisks)

    def names_alike(self, name: str) -> list[str]:
        """Names of the vdisks whose names are this one in any case, sorted."""
        return self._catalogue.names_alike(name)

    def names_with_case(self) -> Collection[str]:
        """Names, in lower case, for which there are vdisks whose names have upper-case letters;
        mostly none.
        """
        return self._catalogue.with_case.keys()

    def volume(self, name: str) -> Volume:
        """The volume of ``NAME`` or ``NAME@SNAP``. Raises NotFound."""
        return self._lifecycle.volume(name)

    @ends_at_close
    async def vdisk_create(self, name: str, size_bytes: int) -> dict[str, Any]:
        """A new, empty, thin vdisk. Raises RequestError, Conflict, PoolFull."""
        return self._listing.brief(await self._lifecycle.create(name, size_bytes))

    @ends_at_close
    async def vdisk_list(self) -> list[dict[str, Any]]:
        """All vdisks, by name."""
        return await self._listing.all(KIND_VDISK)

    def names_of_uuids(self, wanted: Collection[bytes]) -> dict[bytes, str]:
        """Names of the vdisks of these UUIDs, as far as there are any."""
        return self._catalogue.names_of_uuids(wanted)

    @ends_at_close
    async def vdisk_show(self, name: str) -> dict[str, Any]:
        """One vdisk, or snapshot, with what it shares. Raises NotFound."""
        return await self._listing.full(self._lifecycle.volume(name).image)

    @ends_at_close
    async def vdisk_resize(self, name: str, size_bytes: int) -> dict[str, Any]:
        """Grow or shrink. Raises NotFound, RequestError, Conflict, PoolFull."""
        return self._listing.brief(await self._lifecycle.resize(name, size_bytes))

    @ends_at_close
    async def vdisk_rename(self, old: str, new: str) -> dict[str, Any]:
        """Another name; sessions go on. Raises NotFound, RequestError, Conflict."""
        return self._listing.brief(await self._lifecycle.rename(old, new))

    @ends_at_close
    async def vdisk_delete(self, name: str) -> None:
        """Delete; blocks come free in the background. Raises NotFound, Conflict."""
        await self._lifecycle.delete(name)

    @ends_at_close
    async def snapshot_create(self, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """Snapshots (vdisk, name) of one moment, all or none. Raises NotFound, RequestError,
        Conflict, PoolFull.
        """
        return [self._listing.brief(image) for image in await self._lifecycle.snapshot(pairs)]

    @ends_at_close
    async def snapshot_list(self, vdisk: str | None = None) -> list[dict[str, Any]]:
        """All snapshots, or those of one vdisk. Raises NotFound."""
        return await self._listing.all(
            KIND_SNAPSHOT, self._catalogue.vdisk(vdisk).number if vdisk is not None else None
        )

    @ends_at_close
    async def snapshot_delete(self, vdisk: str, name: str, after_split: bool = False) -> bool:
        """Delete a snapshot, with ``after_split`` once no clone stands on it; returns whether it is
        gone. Raises NotFound, Conflict.
        """
        return await self._lifecycle.delete_snapshot(vdisk, name, after_split)

    @ends_at_close
    async def clone_create(self, vdisk: str, snapshot: str, name: str) -> dict[str, Any]:
        """A writable clone of a snapshot. Raises NotFound, RequestError, Conflict, PoolFull."""
        return self._listing.brief(await self._lifecycle.clone(vdisk, snapshot, name))

    # --- Splits -----------------------------------------------------------------------------------

    @ends_at_close
    async def split_start(
        self,
        name: str,
        mode: str = "copy",
        rate_min_bytes: int | None = None,
        rate_max_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Begin to separate a clone from its backing store. Raises NotFound, Conflict,
        RequestError.
        """
        return await self._splits.start(name, mode, rate_min_bytes, rate_max_bytes)

    def split_show(self, name: str) -> dict[str, Any]:
        """State and progress. Raises NotFound."""
        return self._splits.show(name)

    def split_list(self) -> list[dict[str, Any]]:
        """All that are running or paused."""
        return self._splits.list()

    @ends_at_close
    async def split_pause(self, name: str) -> dict[str, Any]:
        """Stop until resumed. Raises NotFound, Conflict."""
        return await self._splits.pause(name)

    @ends_at_close
    async def split_resume(self, name: str) -> dict[str, Any]:
        """Go on after a pause. Raises NotFound, Conflict."""
        return await self._splits.resume(name)

    @ends_at_close
    async def split_cancel(self, name: str) -> dict[str, Any]:
        """End it; the clone stays a clone. Raises NotFound, Conflict."""
        return await self._splits.cancel(name)

    @ends_at_close
    async def split_estimate(self, name: str) -> dict[str, Any]:
        """What a copy split would move, and how long that takes. Raises NotFound, Conflict."""
        return await self._splits.estimate(name)


# How often a writer to a full pool looks whether background reclaim has freed something.
RECLAIM_POLL_SECONDS = 0.01
# How often an opening looks whether its consistency point waits for room on the host.
FULL_POLL_SECONDS = 0.05
# How long a pool that closes waits for room on the host. An orderly stop of the daemon takes at
# most 10 s in all.
CLOSE_SECONDS = 2.0


def checked_size(size_bytes: int) -> int:
    """Size in blocks of a pool of ``size_bytes``, rounded down. Raises RequestError when that is
    too small.
    """
    blocks = size_bytes // BLOCK_BYTES
    if blocks < POOL_BLOCKS_MIN:
        raise RequestError(
            f"a pool of {size_bytes} bytes is too small: use at least"
            f" {POOL_BLOCKS_MIN * BLOCK_BYTES} (8MiB)"
        )
    return blocks


def seen(future: "asyncio.Future[None]") -> None:
    """Nobody waits for it: what it raises shows in the state of the pool."""
    if not future.cancelled():
        future.exception()
