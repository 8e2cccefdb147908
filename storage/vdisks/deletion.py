"""Deleting vdisks and snapshots. Each deletion is a change of the table inside the freeze of a
consistency point; the blocks come free in the background (storage.backdoor.reclaim), once it is
durable.
"""

import asyncio
from functools import partial

from storage.backdoor.reclaim import Reclaims
from storage.errors import Conflict
from storage.images.catalogue import Catalogue
from storage.images.image import Image
from storage.layout import IMAGE_FLAG_DELETE_AFTER_SPLIT, KIND_SNAPSHOT, KIND_VDISK
from storage.state.point_requests import PointRequests
from storage.state.pool_state import PoolState
from storage.vdisks.open_volumes import OpenVolumes


class Deletion:
    """Deletes at once, or as soon as nobody needs it any more."""

    def __init__(
        self,
        state: PoolState,
        requests: PointRequests,
        catalogue: Catalogue,
        volumes: OpenVolumes,
        reclaims: Reclaims,
    ) -> None:
        self._state = state
        self._requests = requests
        self._catalogue = catalogue
        self._volumes = volumes
        self._reclaims = reclaims

    # --- Vdisks -----------------------------------------------------------------------------------

    async def delete(self, name: str) -> None:
        """Delete a vdisk; its blocks come free in the background. Raises NotFound, Conflict
        (sessions, snapshots).
        """
        image = self._catalogue.vdisk(name)
        self._check_deletable(image)
        image.claim("delete")
        # Held from here on, so that callers that ask for the volume meanwhile get this closed one.
        volume = self._volumes.open(image, name, self.unused)
        volume.close()
        try:
            await volume.drain()
            await self._requests.request(lambda: self._delete_now(image))
        except BaseException:
            if not self._volumes.closing and image.kind == KIND_VDISK:
                volume.reopen()
            raise
        finally:
            image.busy = None

    def _delete_now(self, image: Image) -> None:
        if image.kind != KIND_VDISK:
            raise Conflict(f"{image.label} is being deleted already")
        self._check_deletable(image)
        if image.watcher is not None:
            image.watcher.abandon()
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
        self._volumes.forget_counters(image.number)
        self._reclaims.begin(image)

    def _check_unused(self, image: Image) -> None:
        volume = self._volumes.find(image)
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

    # --- Snapshots --------------------------------------------------------------------------------

    async def delete_snapshot(self, vdisk: str, name: str, after_split: bool = False) -> bool:
        """Delete a snapshot; with ``after_split``, as soon as no clone stands on it. Returns
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

        await self._requests.request(at_freeze)
        return gone[0]

    def delete_marked(self) -> None:
        """Delete in the background the snapshots that are marked for it and were still in use when
        their last clone was split or deleted.
        """
        for number in self._catalogue.marked_snapshots():
            self.unused(self._catalogue.image(number))

    def unused(self, image: Image) -> None:
        """Nobody reads a snapshot any more: it may have waited for that to be deleted."""
        if image.flags & IMAGE_FLAG_DELETE_AFTER_SPLIT:
            # Nobody waits for it: if it fails, the next open tries again.
            self._requests.request(partial(self._delete_if_marked, image)).add_done_callback(
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
        volume = self._volumes.find(image)
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
