"""Create, resize, rename and delete vdisks, snapshots and clones.

Each is a change of the table that happens inside the freeze of a consistency point
(``ConsistencyPoints.request``): it is checked and carried out in one step, together with the
freeze, and answered when it is durable. So a group of snapshots is one moment, and two callers who
want the same name get one success and one Conflict.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from functools import partial
from weakref import WeakValueDictionary

from storage.consistency.consistency_point import ConsistencyPoints
from storage.data.trim import trim_blocks
from storage.errors import Conflict, RequestError
from storage.images.catalogue import Catalogue
from storage.images.image import Image
from storage.images.record import ImageRecord
from storage.layout import (
    BLOCK_BYTES,
    IMAGE_FLAG_DELETE_AFTER_SPLIT,
    KIND_SNAPSHOT,
    KIND_VDISK,
    NAME_BYTES_MAX,
    VDISK_BYTES_MAX,
    VDISK_BYTES_MIN,
    ZERO_POINTER,
    tree_levels,
)
from storage.log.intent_log import IntentLog
from storage.state.pool_state import PoolState
from storage.tree.attempt import when_possible
from storage.vdisks.counters import Counters
from storage.vdisks.volume import Volume

# A subset of what iSCSI names may hold (RFC 7143 4.2.7), since a vdisk's name becomes part of one;
# '@' divides vdisk and snapshot.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
NO_ROOT = (0, 0, 0)


def check_name(name: str, what: str) -> None:
    """Raise RequestError for a name that a vdisk or a snapshot cannot have."""
    if not NAME.fullmatch(name) or len(name) > NAME_BYTES_MAX:
        raise RequestError(
            f"{name!r} cannot be the name of a {what}: use 1-{NAME_BYTES_MAX} letters, digits and ."
            " _ : -, begin with a letter or a digit"
        )


def check_size(size_bytes: int) -> None:
    """Raise RequestError for a size that a vdisk cannot have."""
    if size_bytes % BLOCK_BYTES:
        above = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        raise RequestError(f"{size_bytes} bytes are not whole blocks of {BLOCK_BYTES}: use {above}")
    if not VDISK_BYTES_MIN <= size_bytes <= VDISK_BYTES_MAX:
        raise RequestError(
            f"a vdisk cannot have {size_bytes} bytes: use {VDISK_BYTES_MIN} (4KiB) to"
            f" {VDISK_BYTES_MAX} (1PiB)"
        )


def new_record(kind: int, name: str, size_bytes: int, created_cp: int) -> ImageRecord:
    """The entry of an empty image."""
    return ImageRecord(
        kind=kind,
        name=name,
        uuid=uuid.uuid4().bytes,
        size_bytes=size_bytes,
        root=NO_ROOT,
        levels=tree_levels(size_bytes // BLOCK_BYTES),
        shared_cp=0,
        used_blocks=0,
        created_ns=time.time_ns(),
        created_cp=created_cp,
        origin=0,
        backing=0,
        backing_blocks=0,
    )


class Lifecycle:
    """The changes of the table, and the volumes that are in somebody's hand."""

    def __init__(
        self, state: PoolState, catalogue: Catalogue, points: ConsistencyPoints, log: IntentLog
    ) -> None:
        self._state = state
        self._catalogue = catalogue
        self._points = points
        self._log = log
        # Told of every image that was deleted, so that its blocks are reclaimed.
        self.deleted: Callable[[Image], None]
        self._volumes: WeakValueDictionary[int, Volume] = WeakValueDictionary()
        # By image number: those of images that had a volume since the pool was opened.
        self._counters: dict[int, Counters] = {}
        self._closing = False

    # --- Volumes ----------------------------------------------------------------------------------

    def volume(self, name: str) -> Volume:
        """The volume of ``NAME`` or ``NAME@SNAP``; everybody gets the same one. Raises NotFound."""
        vdisk, _, snapshot = name.partition("@")
        image = (
            self._catalogue.snapshot(vdisk, snapshot) if snapshot else self._catalogue.vdisk(vdisk)
        )
        volume = self._volume_of(image)
        if volume is None:
            volume = Volume(
                image, name, self._log, self._counters.setdefault(image.number, Counters())
            )
            volume.on_unused = partial(self._unused, image)
            self._volumes[image.number] = volume
        if self._closing:
            volume.close()
        return volume

    async def close_volumes(self) -> None:
        """The pool is closing: end what is under way on every volume, and refuse whatever comes, on
        those of later, too.
        """
        self._closing = True
        for volume in list(self._volumes.values()):
            volume.close()
            await volume.drain()

    def reverted(self) -> None:
        """The catalogue went back to the last durable consistency point: so do the volumes."""
        for number, volume in list(self._volumes.items()):
            image = volume.image
            if self._catalogue.find(number) is not image:
                volume.close()
            elif image.kind in (KIND_VDISK, KIND_SNAPSHOT):
                volume.name = self._catalogue.full_name(image)
                if not self._closing:
                    volume.reopen()

    def _volume_of(self, image: Image) -> Volume | None:
        """Its volume, if anybody refers to it. One of that number may also be left of an image that
        is no more.
        """
        volume = self._volumes.get(image.number)
        return volume if volume is not None and volume.image is image else None

    # --- Vdisks -----------------------------------------------------------------------------------

    async def create(self, name: str, size_bytes: int) -> Image:
        """A new, empty vdisk. Raises RequestError, Conflict, PoolFull."""
        check_name(name, "vdisk")
        check_size(size_bytes)
        self._catalogue.check_free(name)
        made: list[Image] = []

        def at_freeze() -> None:
            self._catalogue.check_free(name)
            self._state.allocator.check_room(1)
            made.append(
                self._catalogue.add(
                    new_record(KIND_VDISK, name, size_bytes, self._state.epoch.number)
                )
            )

        await self._points.request_with_room(at_freeze)
        return made[0]

    async def rename(self, old: str, new: str) -> Image:
        """Another name for a vdisk; sessions go on. Raises NotFound, Conflict, RequestError."""
        check_name(new, "vdisk")
        image = self._catalogue.vdisk(old)
        if old == new:
            return image
        self._catalogue.check_free(new, old)
        renamed: list[Image] = []

        def at_freeze() -> None:
            image = self._catalogue.vdisk(old)  # it may be another one by now
            self._catalogue.rename(image, new)
            self._rename_volumes(image)
            renamed.append(image)

        await self._points.request(at_freeze)
        return renamed[0]

    def _rename_volumes(self, image: Image) -> None:
        for number in (image.number, *self._catalogue.snapshots.get(image.number, {}).values()):
            volume = self._volumes.get(number)
            if volume is not None:
                volume.name = self._catalogue.full_name_of(number)

    async def resize(self, name: str, size_bytes: int) -> Image:
        """Grow or shrink a vdisk; what lies beyond a smaller end is gone for good. Raises NotFound,
        Conflict, RequestError, PoolFull.
        """
        check_size(size_bytes)
        image = self._catalogue.vdisk(name)
        self._claim(image, "grow" if size_bytes > image.size_bytes else "shrink")
        try:
            if size_bytes > image.size_bytes:
                await self._grow(image, size_bytes)
            elif size_bytes < image.size_bytes:
                await self._shrink(image, size_bytes)
        finally:
            image.busy = None
        return image

    async def _grow(self, image: Image, size_bytes: int) -> None:
        levels = tree_levels(size_bytes // BLOCK_BYTES)
        await when_possible(self._state, lambda: image.tree.grow(levels, self._state.epoch))

        def at_freeze() -> None:
            image.touch()
            image.size_bytes = size_bytes
            # Not left to this call: it may be cancelled, and the vdisk is larger all the same.
            self._state.epoch.when_durable.append(partial(self._grown, image))

        await self._points.request(at_freeze)

    @staticmethod
    def _grown(image: Image) -> None:
        """Only now: what clients write beyond the old end must not be lost with the new size."""
        if (
            image.busy != "shrink"
        ):  # that may follow one that was cancelled, and has taken the tail from clients already
            image.limit_bytes = image.size_bytes

    async def _shrink(self, image: Image, size_bytes: int) -> None:
        """Clients lose the tail at once; the size changes when the tail is trimmed, so that it can
        never come back by growing again.
        """

        def at_freeze() -> None:
            image.touch()
            image.size_bytes = size_bytes
            image.backing_blocks = min(image.backing_blocks, image.size_blocks)

        if image.limit_bytes < image.size_bytes:
            # A grow that was cancelled is not durable yet: until it is, nobody may write beyond the
            # old end.
            await self._points.request()
            image.limit_bytes = image.size_bytes
        before, image.limit_bytes = image.limit_bytes, size_bytes
        try:
            await trim_blocks(
                image, size_bytes // BLOCK_BYTES, (before - size_bytes) // BLOCK_BYTES
            )
            await self._points.request(at_freeze)
        except BaseException:
            # Also when this was cancelled: what the freeze has not changed by now it will not
            # change any more. Where a consistency point failed, clients stay below what may be
            # trimmed.
            if self._state.read_only_reason is None:
                image.limit_bytes = image.size_bytes
            raise

    async def delete(self, name: str) -> None:
        """Delete a vdisk; its blocks come free in the background. Raises NotFound, Conflict
        (sessions, snapshots).
        """
        image = self._catalogue.vdisk(name)
        self._check_deletable(image)
        self._claim(image, "delete")
        # Held from here on, so that whoever asks for the volume meanwhile gets this closed one.
        volume = self.volume(name)
        volume.close()
        try:
            await volume.drain()
            await self._points.request(lambda: self._delete_now(image))
        except BaseException:
            if not self._closing and image.kind == KIND_VDISK:
                volume.reopen()
            raise
        finally:
            image.busy = None

    def _delete_now(self, image: Image) -> None:
        if image.kind != KIND_VDISK:
            raise Conflict(f"{image.label} is being deleted already")
        self._check_deletable(image)
        if image.job is not None:
            image.job.abandon()
        backing = image.backing
        self._forget(image)
        if backing is not None:
            self.delete_if_released(backing)

    def _forget(self, image: Image) -> None:
        """Within a freeze. The blocks come free when the deletion is durable: until then a failure
        may bring the image back.
        """
        self._catalogue.mark_deleted(image)
        self._state.epoch.when_durable.append(partial(self._forgotten, image))

    def _forgotten(self, image: Image) -> None:
        self._counters.pop(image.number, None)
        self.deleted(image)

    def _check_unused(self, image: Image) -> None:
        volume = self._volume_of(image)
        if volume is not None and volume.labels:
            raise Conflict(
                f"{image.label} is in use by {', '.join(sorted(volume.labels))}: end those sessions"
                " first"
            )

    def _check_deletable(self, image: Image) -> None:
        self._check_unused(image)
        snapshots = self._catalogue.snapshots.get(image.number)
        if snapshots:
            names = ", ".join(f"{image.name}@{snapshot}" for snapshot in sorted(snapshots))
            raise Conflict(f"vdisk {image.name} has snapshots: delete {names} first")

    @staticmethod
    def _claim(image: Image, what: str) -> None:
        if image.busy is not None:
            raise Conflict(
                f"vdisk {image.name} is busy ({image.busy}): try again when that is done"
            )
        image.busy = what

    # --- Snapshots and clones ---------------------------------------------------------------------

    async def snapshot(self, pairs: list[tuple[str, str]]) -> list[Image]:
        """Snapshots (vdisk, name) of one moment. All or none are made. Raises NotFound, Conflict,
        RequestError, PoolFull.
        """
        if len(set(pairs)) != len(pairs) or not pairs:
            raise RequestError("name at least one snapshot, and each only once")
        for _, name in pairs:
            check_name(name, "snapshot")
        made: list[Image] = []

        def at_freeze() -> None:
            images = [self._snapshot_origin(vdisk, name) for vdisk, name in pairs]
            self._state.share_map.check_room(Conflict)
            self._state.allocator.check_room(2 * len(images))  # the vdisks' own entries change, too
            made.extend(
                self._snapshot_now(image, name)
                for image, (_, name) in zip(images, pairs, strict=True)
            )

        await self._points.request_with_room(at_freeze)
        return made

    def _snapshot_origin(self, vdisk: str, name: str) -> Image:
        image = self._catalogue.vdisk(vdisk)
        if name in self._catalogue.snapshots.get(image.number, {}):
            raise Conflict(f"a snapshot {vdisk}@{name} exists already: choose another name")
        if image.busy is not None:
            raise Conflict(f"vdisk {vdisk} is busy ({image.busy}): try again when that is done")
        return image

    def _snapshot_now(self, image: Image, name: str) -> Image:
        """One more reference to the root, whatever the size. From this epoch on, nothing the vdisk
        has may be changed in place.
        """
        epoch = self._state.epoch
        tree = image.tree
        image.touch()
        tree.shared_cp = epoch.number
        if tree.root_vbn > ZERO_POINTER:
            epoch.count_pointer(tree.root_vbn, 1)
        record = new_record(KIND_SNAPSHOT, name, image.size_bytes, epoch.number)
        record.root = (tree.root_vbn, tree.root_crc, tree.root_birth)
        record.levels = tree.levels
        record.shared_cp = epoch.number
        record.used_blocks = image.used_blocks
        record.origin = image.number
        record.backing = image.backing.number if image.backing is not None else 0
        record.backing_blocks = image.backing_blocks
        return self._catalogue.add(record)

    async def delete_snapshot(self, vdisk: str, name: str, after_split: bool = False) -> bool:
        """Delete a snapshot; with ``after_split``, as soon as the last clone lets go of it. Returns
        whether it is gone now.

        Raises NotFound, Conflict (clones stand on it).
        """
        self._catalogue.snapshot(vdisk, name)
        gone: list[bool] = []

        def at_freeze() -> None:
            image = self._catalogue.snapshot(vdisk, name)
            clones = self._catalogue.names_of_clones(image)
            if clones and not after_split:
                raise Conflict(
                    f"snapshot {vdisk}@{name} is the backing store of {', '.join(clones)}: split or"
                    " delete those first"
                )
            self._check_unused(image)
            image.touch()
            image.flags |= IMAGE_FLAG_DELETE_AFTER_SPLIT
            gone.append(self.delete_if_released(image))

        await self._points.request(at_freeze)
        return gone[0]

    def delete_marked(self) -> None:
        """Delete in the background the snapshots that are marked for it and were still in use when
        their last clone let go.
        """
        for number in self._catalogue.marked_snapshots():
            self._unused(self._catalogue.image(number))

    def _unused(self, image: Image) -> None:
        if image.flags & IMAGE_FLAG_DELETE_AFTER_SPLIT:
            # Nobody waits for it: if it fails, the next open tries again.
            self._points.request(partial(self._delete_if_marked, image)).add_done_callback(
                asyncio.Future.exception
            )

    def _delete_if_marked(self, image: Image) -> None:
        if image.kind == KIND_SNAPSHOT:
            self.delete_if_released(image)

    def delete_if_released(self, image: Image) -> bool:
        """Within a freeze: delete a snapshot that is marked for it, and the marked ones behind it,
        if nothing stands on them any more.
        """
        if not image.flags & IMAGE_FLAG_DELETE_AFTER_SPLIT or self._catalogue.clones.get(
            image.number
        ):
            return False
        volume = self._volume_of(image)
        if volume is not None:
            if volume.labels:
                return False
            volume.close()
        backing = image.backing
        self._forget(image)
        self._state.epoch.when_durable.append(
            partial(self._state.on_event, "snapshot.deleted", number=image.number)
        )
        if backing is not None:
            self.delete_if_released(backing)
        return True

    async def clone(self, vdisk: str, snapshot: str, name: str) -> Image:
        """A vdisk that reads as the snapshot: an empty tree, and its backing store's number.

        Raises NotFound, Conflict, RequestError, PoolFull.
        """
        check_name(name, "vdisk")
        self._catalogue.snapshot(vdisk, snapshot)
        made: list[Image] = []

        def at_freeze() -> None:
            backing = self._catalogue.snapshot(vdisk, snapshot)
            self._catalogue.check_free(name)
            self._state.allocator.check_room(1)
            record = new_record(KIND_VDISK, name, backing.size_bytes, self._state.epoch.number)
            record.backing = backing.number
            record.backing_blocks = backing.size_blocks
            made.append(self._catalogue.add(record))

        await self._points.request_with_room(at_freeze)
        return made[0]
