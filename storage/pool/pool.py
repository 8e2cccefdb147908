"""The pool as the daemon calls it (docs/design.md, "What the daemon calls"): each operation leads
to the room that carries it out.
"""

import asyncio
from collections.abc import Collection
from typing import Any
from uuid import UUID

from storage.consistency.changes import request_with_room
from storage.device import Device, is_block_device, new_device, open_device
from storage.device.owner import Owner
from storage.errors import NoPool, PoolRefused
from storage.layout import BLOCK_BYTES, KIND_SNAPSHOT, KIND_VDISK
from storage.pool.closing import close_rooms, close_soon
from storage.pool.formatting import checked_size, format_device, why_no_pool
from storage.pool.inspection import Inspection
from storage.pool.opening import open_rooms
from storage.pool.operations import Operations, ends_at_close
from storage.pool.rooms import Rooms
from storage.state.pool_state import EventSink, no_events
from storage.superblock.superblock import Superblock
from storage.vdisks.volume import Volume

CACHE_BYTES_DEFAULT = 256 << 20


class Pool:
    """One open pool. All methods are called on the event loop that opened it."""

    def __init__(self, rooms: Rooms) -> None:
        self.rooms = rooms
        self.operations = Operations()
        self._state = rooms.state
        self._catalogue = rooms.catalogue
        self._lifecycle = rooms.lifecycle
        self._listing = rooms.listing
        self._splits = rooms.splits
        self._inspection = Inspection(rooms)

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

    @staticmethod
    async def format(
        device: Device, size_bytes: int | None = None, *, erase: bool = False
    ) -> Superblock:
        """Make a new pool on a device, over whatever it holds. ``size_bytes``: not on the whole of
        it.

        ``erase``: the marks of what was there, too. Raises RequestError, DeviceFailed.
        """
        return await format_device(device, CACHE_BYTES_DEFAULT, size_bytes, erase=erase)

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
        rooms = await open_rooms(device, cache_bytes, on_event or no_events, owner)
        return cls(rooms)

    async def close(self) -> None:
        """Finish what is under way, take a consistency point, release the device.

        On a full host that consistency point is given up after a while (storage.pool.closing).
        What was acknowledged is then durable in the log.
        """
        await close_rooms(self.rooms, self.operations)

    def close_soon(self) -> None:
        """The pool will be closed: what waits for room on the host gets an answer soon."""
        close_soon(self.rooms)

    # --- The pool itself --------------------------------------------------------------------------

    @property
    def on_event(self) -> EventSink:
        """Where events go: called with a stable name and fields."""
        return self._state.on_event

    @ends_at_close
    async def consistency_point(self) -> None:
        """Make everything durable and the log empty. Raises PoolReadOnly, DeviceFailed."""
        await self.rooms.requests.request()

    def configuration(self, section: str) -> bytes:
        """What ``configure`` last stored under that name; empty if nothing was."""
        return self.rooms.configuration.get(section)

    @ends_at_close
    async def configure(self, section: str, value: bytes) -> None:
        """Store bytes under a name, durably (targets, access control, reservations). Raises
        RequestError, PoolFull, PoolReadOnly.
        """
        rooms = self.rooms
        await request_with_room(
            rooms.requests, rooms.allocator, lambda: rooms.configuration.replace(section, value)
        )

    def space(self) -> tuple[int, int]:
        """Bytes used, and bytes that the pool (not its host) has for vdisks. Cheaper than ``show``:
        for callers that look every second.
        """
        rooms = self.rooms
        return rooms.active_map.used_blocks * BLOCK_BYTES, rooms.allocator.available_bytes

    def show(self) -> dict[str, Any]:
        """Size, use and state of the pool."""
        rooms, state, superblock = self.rooms, self._state, self.rooms.superblock
        used, size, allocator = (
            rooms.active_map.used_blocks,
            superblock.size_blocks,
            rooms.allocator,
        )
        return {
            "path": rooms.device.path,
            "uuid": str(UUID(bytes=superblock.uuid)),
            "size_bytes": size * BLOCK_BYTES,
            "used_bytes": used * BLOCK_BYTES,
            "free_bytes": (size - used) * BLOCK_BYTES,
            **rooms.host_room.shown(allocator.available_bytes),
            "host_reserve_bytes": allocator.stock.blocks * BLOCK_BYTES,
            "reserve_bytes": allocator.reserve_blocks * BLOCK_BYTES,
            "cp_number": superblock.cp_number,
            "cp_seconds_last": round(rooms.points.seconds_last, 6),
            "log_commits": rooms.log.commits,
            "read_only": state.read_only_reason is not None,
            "read_only_reason": state.read_only_reason,
            "vdisks": len(self._catalogue.vdisks),
            "snapshots": sum(map(len, self._catalogue.snapshots.values())),
            "deleted_images": len(self._catalogue.deleted),
            "cached_nodes": len(state.cache),
            "background_messages": rooms.handler.messages,
        }

    @ends_at_close
    async def check(self, verify_data: bool = False) -> dict[str, Any]:
        """Check the state of the last consistency point while the pool goes on; its blocks are kept
        from reuse meanwhile.

        Raises Conflict when the pool ran out of other space.
        """
        return await self._inspection.check(verify_data)

    @ends_at_close
    async def scrub_start(self, rate_max_bytes: int | None = None) -> dict[str, Any]:
        """Begin to read and verify every block in use, in the background, at most so many bytes a
        second. Raises Conflict, PoolReadOnly.
        """
        return self._inspection.scrub_start(rate_max_bytes)

    def scrub_show(self) -> dict[str, Any]:
        """State, progress and findings of the last scrub since the pool was opened. Raises
        NotFound.
        """
        return self._inspection.scrub_show()

    @ends_at_close
    async def scrub_cancel(self) -> dict[str, Any]:
        """End the scrub; what it found so far stays to be shown. Raises NotFound."""
        return self._inspection.scrub_cancel()

    # --- Vdisks, snapshots, clones ----------------------------------------------------------------

    def names(self) -> list[str]:
        """Names of all vdisks, sorted."""
        return sorted(self._catalogue.vdisks)

    def snapshot_names(self, vdisk: str) -> list[str]:
        """Names of the snapshots of a vdisk, sorted. Raises NotFound."""
        return self._catalogue.snapshot_names(vdisk)

    def names_alike(self, name: str) -> list[str]:
        """Names of the vdisks whose names are this one in any case, sorted."""
        return self._catalogue.vdisks.alike(name)

    def names_with_case(self) -> Collection[str]:
        """Names, in lower case, for which there are vdisks whose names have upper-case letters;
        mostly none.
        """
        return self._catalogue.vdisks.with_case.keys()

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
        await self.rooms.deletion.delete(name)

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
        return await self.rooms.deletion.delete_snapshot(vdisk, name, after_split)

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
