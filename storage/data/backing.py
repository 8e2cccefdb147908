"""What lies behind a clone: its backing store, that one's own backing store, and so on, each only
below its ``backing_blocks``.

A clone and what is behind it are looked through in one step, never with a wait in between: a split
moves data from behind to the clone and then ends the association, so that who looked at the clone
before and behind it afterwards would see the data nowhere.
"""

import numpy as np
import numpy.typing as npt

from storage.fields import FIELD_DTYPE
from storage.images.image import Image
from storage.layout import FIELDS_PER_BLOCK, FIELDS_SHIFT, HOLE
from storage.tree.attempt import when_possible
from storage.tree.search import NOWHERE, peek_first

SLOTS = np.arange(FIELDS_PER_BLOCK)
# A whole field as one item: numpy moves those eight times faster than structured ones.
WHOLE_FIELD = np.dtype("V16")


def visible_slots(image: Image, index: int) -> npt.NDArray[np.bool_]:
    """Which slots of level-1 block ``index`` lie below ``backing_blocks``."""
    return image.backing_blocks - (index << FIELDS_SHIFT) > SLOTS


def fields_behind(
    clone: Image, index: int, wanted: npt.NDArray[np.bool_]
) -> npt.NDArray[np.void] | None:
    """The fields of level-1 block ``index`` that are seen through the ``wanted`` slots; None when a
    pointer block must be loaded first.

    Structured fields (vbn, crc, birth); a slot that is not wanted, or behind which there is
    nothing, is a hole.
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


def peek_next(clone: Image, index: int) -> int | None:
    """The first level-1 index from ``index`` on where anything behind the clone has a pointer
    block, NOWHERE if there is none.

    None: ``state.missing`` is what to wait for.
    """
    limit = clone.backing_blocks
    found = NOWHERE
    image = clone.backing
    while image is not None and limit:
        here = peek_first(image.tree, index)
        if here is None:
            return None
        if here << FIELDS_SHIFT < limit:
            found = min(found, here)
        limit = min(limit, image.backing_blocks)
        image = image.backing
    return found


async def next_index(clone: Image, index: int) -> int | None:
    """``peek_next``, waiting where it must; None when there is none. Raises BlockDamaged,
    DeviceFailed.
    """
    found = await when_possible(clone.state, lambda: peek_next(clone, index))
    return None if found == NOWHERE else found
