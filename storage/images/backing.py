"""What lies behind a clone: its backing store, that one's own backing store, and so on, each only below its ``backing_blocks``."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from storage.layout import FIELDS_PER_BLOCK, FIELDS_SHIFT, HOLE
from storage.tree.node import FIELD_DTYPE
from storage.tree.search import first_block

if TYPE_CHECKING:
    from storage.images.image import Image

SLOTS = np.arange(FIELDS_PER_BLOCK)
# A whole field as one item: numpy moves those eight times faster than structured ones.
WHOLE_FIELD = np.dtype("V16")


def visible_slots(image: "Image", index: int) -> npt.NDArray[np.bool_]:
    """Which slots of level-1 block ``index`` lie below ``backing_blocks``."""
    return image.backing_blocks - (index << FIELDS_SHIFT) > SLOTS


def fields_behind(clone: "Image", index: int, wanted: npt.NDArray[np.bool_]) -> npt.NDArray[np.void] | None:
    """The fields of level-1 block ``index`` that are seen through the ``wanted`` slots; None when a pointer block must be loaded first.

    Structured fields (vbn, crc, birth); a slot that is not wanted, or behind which there is nothing, is a hole.
    """
    fields = np.zeros(FIELDS_PER_BLOCK, dtype=FIELD_DTYPE)
    whole = fields.view(WHOLE_FIELD)
    image, behind, missing = clone, clone.backing, wanted.copy()
    while behind is not None and missing.any():
        node = behind.tree.peek(index)
        if node is None:
            return None
        whole[missing] = node.fields().view(WHOLE_FIELD)[missing]
        image, behind = behind, behind.backing
        missing &= (fields["vbn"] == HOLE) & visible_slots(image, index)
    return fields


async def load_chain(clone: "Image", index: int) -> None:
    """Load the pointer blocks of the clone and of everything behind it. Raises BlockDamaged, DeviceFailed."""
    image: Image | None = clone
    while image is not None:
        await image.tree.load(index)
        image = image.backing


async def next_index(clone: "Image", index: int) -> int | None:
    """The first level-1 index from ``index`` on where anything behind the clone has a pointer block; None when there is none."""
    limit = clone.backing_blocks
    found: int | None = None
    image = clone.backing
    while image is not None and limit:
        here = await first_block(image.tree, image.tree.levels, 0, index)
        if here is not None and here << FIELDS_SHIFT < limit and (found is None or here < found):
            found = here
        limit = min(limit, image.backing_blocks)
        image = image.backing
    return found
