"""Opening a pool: which superblock counts, what the table and the log say, and then its background
work. On a device that is a pool already; storage.pool.formatting makes one.
"""

import asyncio

from storage.consistency.replay import Replay, Replayed
from storage.device import Device
from storage.device.owner import Owner
from storage.errors import DeviceFull, StorageError
from storage.images.table_reader import read_table
from storage.layout import VDISK_TABLE
from storage.pool.rooms import Rooms
from storage.state.pool_state import EventSink
from storage.superblock.copies import Copies, read_copies, write_copies

# How often an opening looks whether its consistency point waits for room on the host.
FULL_POLL_SECONDS = 0.05


async def open_rooms(
    device: Device, cache_bytes: int, on_event: EventSink, owner: Owner | None
) -> Rooms:
    """The rooms of the pool on a device, with all that runs in them. ``owner`` is noted in the
    pool. Raises PoolRefused, DeviceFailed.
    """
    copies = await read_copies(device)
    rooms = Rooms(device, copies.best, cache_bytes, on_event)
    try:
        await _Opening(rooms).run(copies, owner)
    except BaseException:
        await rooms.points.stop()
        raise
    return rooms


class _Opening:
    """The opening of one pool."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._state = rooms.state

    async def run(self, copies: Copies, owner: Owner | None) -> None:
        rooms, superblock = self._rooms, self._rooms.superblock
        rooms.points.check_number()
        if superblock.unknown_ro_compat:
            self._state.fail(
                "it has features that this version can only read past: use a newer cleaved to write"
            )
        else:
            await self._sync_what_is_there()
            await self._take_over(copies, owner)
        table_blocks = superblock.roots[VDISK_TABLE].size_blocks
        await read_table(self._state, rooms.table, rooms.catalogue, table_blocks)
        await rooms.configuration.load()
        rooms.splits.take_up()
        replayed = await self._replay()
        await self._start(replayed)
        self._state.on_event(
            "pool.opened",
            path=rooms.device.path,
            cp_number=superblock.cp_number,
            images=len(rooms.catalogue),
            records_replayed=replayed.records,
            changes_replayed=replayed.entries,
        )

    async def _start(self, replayed: Replayed) -> None:
        """All is in memory as it was: go on from there."""
        rooms = self._rooms
        rooms.allocator.stock.start()
        rooms.points.start()
        if replayed.moved and self._state.read_only_reason is None:
            await self._unless_the_host_is_full(rooms.points.log_has_moved())
        rooms.handler.start()
        rooms.splits.go_on()
        rooms.deletion.delete_marked()
        rooms.reclaims.begin_all()

    async def _unless_the_host_is_full(self, point: "asyncio.Future[None]") -> None:
        """Wait for a consistency point, but not for the host to have room: everything can be read
        meanwhile.
        """
        while not point.done() and not self._rooms.host_room.full:
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
            await self._rooms.device.sync()
        except StorageError as error:
            self._state.fail(f"what the pool holds cannot be made durable: {error}")

    async def _take_over(self, copies: Copies, owner: Owner | None) -> None:
        """Make both copies of the superblock the newest one, with its owner in it: before anything
        else is written, for a consistency point writes over one copy in the belief that the other
        one is good.
        """
        rooms, state, superblock = self._rooms, self._state, self._rooms.superblock
        if state.read_only_reason is not None or (not copies.faults and owner == superblock.owner):
            return
        gone = superblock.owner
        if owner is not None and gone is not None and not owner.shares_boot_with(gone):
            state.on_event(
                "pool.owner_changed",
                previous_host=gone.host,
                previous_pid=gone.pid,
                previous_opened_ns=gone.opened_ns,
            )
        superblock.owner = owner
        try:
            await write_copies(rooms.device, superblock, copies.whole_vbn)
        except DeviceFull as full:
            if copies.faults:
                state.fail(f"the two copies of the superblock cannot be made the same: {full}")
            else:
                # Both are good, and the owner gets in with the next consistency point.
                rooms.host_room.met(full)
            return
        except StorageError as error:
            state.fail(f"the two copies of the superblock cannot be made the same: {error}")
            return
        for vbn, fault in copies.faults.items():
            state.on_event(
                "superblock.repaired", vbn=vbn, reason=fault, cp_number=superblock.cp_number
            )

    async def _replay(self) -> Replayed:
        rooms = self._rooms
        with rooms.allocator.replaying():
            replayed = await Replay(
                self._state, rooms.superblock, rooms.catalogue, rooms.allocator
            ).run()
        rooms.log.begin_at(replayed.head_block, replayed.next_sequence)
        return replayed


def seen(future: "asyncio.Future[None]") -> None:
    """Nobody waits for it: what it raises shows in the state of the pool."""
    if not future.cancelled():
        future.exception()
