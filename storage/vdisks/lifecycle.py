"""Create, resize and rename vdisks, snapshots and clones.

Each is a change of the table that happens inside the freeze of a consistency point
(``PointRequests.request``): it is checked and carried out in one step, together with the freeze,
and answered when it is durable. So a group of snapshots is one moment, and two callers that want
the same name get one success and one Conflict.
"""

import re
import time
import uuid
from functools import partial

from storage.allocation.share_map import ShareMap
from storage.allocation.write_allocator import WriteAllocator
from storage.consistency.changes import request_with_room
from storage.data.trim import trim_blocks
from storage.errors import Conflict, RequestError
from storage.images.catalogue import Catalogue
from storage.images.image import Image
from storage.images.record import ImageRecord
from storage.layout import (
    BLOCK_BYTES,
    KIND_SNAPSHOT,
    KIND_VDISK,
    NAME_BYTES_MAX,
    VDISK_BYTES_MAX,
    VDISK_BYTES_MIN,
    ZERO_POINTER,
    tree_levels,
)
from storage.state.point_requests import AtFreeze, PointRequests
from storage.state.pool_state import PoolState
from storage.tree.attempt import when_possible
from storage.vdisks.deletion import Deletion
from storage.vdisks.open_volumes import OpenVolumes
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
    """The changes of the table, but for deletions, and the way to a volume by its name."""

    def __init__(
        self,
        state: PoolState,
        requests: PointRequests,
        allocator: WriteAllocator,
        share_map: ShareMap,
        catalogue: Catalogue,
        volumes: OpenVolumes,
        deletion: Deletion,
    ) -> None:
        self._state = state
        self._requests = requests
        self._allocator = allocator
        self._share_map = share_map
        self._catalogue = catalogue
        self._volumes = volumes
        self._deletion = deletion

    def volume(self, name: str) -> Volume:
        """The volume of ``NAME`` or ``NAME@SNAP``; everybody gets the same one. Raises NotFound."""
        vdisk, _, snapshot = name.partition("@")
        image = (
            self._catalogue.snapshot(vdisk, snapshot) if snapshot else self._catalogue.vdisk(vdisk)
        )
        return self._volumes.open(image, name, self._deletion.unused)

    async def _request_with_room(self, at_freeze: AtFreeze) -> None:
        await request_with_room(self._requests, self._allocator, at_freeze)

    # --- Vdisks -----------------------------------------------------------------------------------

    async def create(self, name: str, size_bytes: int) -> Image:
        """A new, empty vdisk. Raises RequestError, Conflict, PoolFull."""
        check_name(name, "vdisk")
        check_size(size_bytes)
        self._catalogue.check_free(name)
        made: list[Image] = []

        def at_freeze() -> None:
            self._catalogue.check_free(name)
            self._allocator.check_room(1)
            made.append(
                self._catalogue.add(
                    new_record(KIND_VDISK, name, size_bytes, self._state.epoch.number)
                )
            )

        await self._request_with_room(at_freeze)
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
            snapshots = self._catalogue.snapshots.get(image.number, {})
            self._volumes.rename([image.number, *snapshots.values()])
            renamed.append(image)

        await self._requests.request(at_freeze)
        return renamed[0]

    async def resize(self, name: str, size_bytes: int) -> Image:
        """Grow or shrink a vdisk; what lies beyond a smaller end is gone for good. Raises NotFound,
        Conflict, RequestError, PoolFull.
        """
        check_size(size_bytes)
        image = self._catalogue.vdisk(name)
        image.claim("grow" if size_bytes > image.size_bytes else "shrink")
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
        await when_possible(self._state, lambda: image.editor.grow(levels, self._state.epoch))

        def at_freeze() -> None:
            image.touch()
            image.size_bytes = size_bytes
            # Not left to this call: it may be cancelled, and the vdisk is larger all the same.
            self._state.epoch.when_durable.append(partial(self._grown, image))

        await self._requests.request(at_freeze)

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
            await self._requests.request()
            image.limit_bytes = image.size_bytes
        before, image.limit_bytes = image.limit_bytes, size_bytes
        try:
            await trim_blocks(
                image, size_bytes // BLOCK_BYTES, (before - size_bytes) // BLOCK_BYTES
            )
            await self._requests.request(at_freeze)
        except BaseException:
            # Also when this was cancelled: what the freeze has not changed by now it will not
            # change any more. Where a consistency point failed, clients stay below what may be
            # trimmed.
            if self._state.read_only_reason is None:
                image.limit_bytes = image.size_bytes
            raise

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
            self._share_map.check_room(Conflict)
            self._allocator.check_room(2 * len(images))  # the vdisks' own entries change, too
            made.extend(
                self._snapshot_now(image, name)
                for image, (_, name) in zip(images, pairs, strict=True)
            )

        await self._request_with_room(at_freeze)
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
            epoch.ledger.count_pointer(tree.root_vbn, 1)
        record = new_record(KIND_SNAPSHOT, name, image.size_bytes, epoch.number)
        record.root = (tree.root_vbn, tree.root_crc, tree.root_birth)
        record.levels = tree.levels
        record.shared_cp = epoch.number
        record.used_blocks = image.used_blocks
        record.origin = image.number
        record.backing = image.backing.number if image.backing is not None else 0
        record.backing_blocks = image.backing_blocks
        return self._catalogue.add(record)

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
            self._allocator.check_room(1)
            record = new_record(KIND_VDISK, name, backing.size_bytes, self._state.epoch.number)
            record.backing = backing.number
            record.backing_blocks = backing.size_blocks
            made.append(self._catalogue.add(record))

        await self._request_with_room(at_freeze)
        return made[0]
