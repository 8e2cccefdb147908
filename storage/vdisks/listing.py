"""What lists and shows say of images. The keys are documented in docs/operations.md and stable."""

from typing import Any
from uuid import UUID

from storage.consistency.consistency_point import ConsistencyPoints
from storage.errors import NotFound
from storage.images.catalogue import Catalogue
from storage.images.image import Image
from storage.images.record import ImageRecord
from storage.layout import BLOCK_BYTES, KIND_SNAPSHOT, KIND_VDISK, SPLIT_RUNNING, SPLIT_STATES
from storage.state.pool_state import PoolState
from storage.state.slices import Slicer
from storage.vdisks.exclusive_blocks import exclusive_blocks


class Listing:
    """Describes images, from their table entries where nobody has them in hand."""

    def __init__(self, state: PoolState, catalogue: Catalogue, points: ConsistencyPoints) -> None:
        self._state = state
        self._catalogue = catalogue
        self._points = points

    def brief(self, image: Image) -> dict[str, Any]:
        """What lists say of one image."""
        return self._describe(image.number, self._catalogue.record(image.number))

    def _describe(self, number: int, record: ImageRecord) -> dict[str, Any]:
        releasing = number in self._catalogue.releasing
        shown: dict[str, Any] = {
            "name": self._catalogue.full_name_of(number, record),
            "uuid": str(UUID(bytes=record.uuid)),
            "size_bytes": record.size_bytes,
            "used_bytes": record.used_blocks * BLOCK_BYTES,
            "backing": self._catalogue.backing_name(number, record),
            "created_ns": record.created_ns,
            "split": SPLIT_STATES[SPLIT_RUNNING if releasing else record.split.state],
        }
        if record.kind == KIND_SNAPSHOT:
            shown["clones"] = self._catalogue.clone_names(number)
        return shown

    async def all(self, kind: int, origin: int | None = None) -> list[dict[str, Any]]:
        """All images of a kind, or all snapshots of one vdisk, by name."""
        slicer = Slicer()
        numbers = (
            self._catalogue.numbers(kind)
            if origin is None
            else self._catalogue.snapshots.get(origin, {}).values()
        )
        shown = []
        for number in list(numbers):
            record = self._catalogue.find_record(number)
            if record is not None and record.kind == kind:
                shown.append(self._describe(number, record))
            await slicer.breathe()
        shown.sort(key=lambda row: str(row["name"]))
        return shown

    async def full(self, image: Image) -> dict[str, Any]:
        """One image, with how much is its own; exact as of a consistency point that this takes.
        Raises BlockDamaged, DeviceFailed.
        """
        if image.tree.shared_cp and self._state.read_only_reason is None:
            await self._points.request()
        exclusive = min(await exclusive_blocks(image), image.used_blocks)
        if image.kind not in {KIND_VDISK, KIND_SNAPSHOT}:
            raise NotFound("it was deleted while it was looked at: list again")
        shown = self.brief(image)
        shown["exclusive_bytes"] = exclusive * BLOCK_BYTES
        shown["shared_bytes"] = shown["used_bytes"] - shown["exclusive_bytes"]
        shown["snapshots"] = sorted(self._catalogue.snapshots.get(image.number, {}))
        releasing = self._catalogue.releasing.get(image.number)
        backed = releasing.backing_blocks if releasing is not None else image.backing_blocks
        shown["backed_bytes"] = backed * BLOCK_BYTES if shown["backing"] is not None else 0
        return shown
