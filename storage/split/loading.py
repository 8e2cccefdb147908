"""The special loading function: finds, for one level-1 pointer block of a clone, the fields that
are holes and set behind it.

"Behind" is the chain: the backing store's corresponding field, else that of the backing store's own
backing store, and so on, each only below its ``backing_blocks``. Where nothing is set there is
nothing to replace: the hole reads as zeros with and without a backing store.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.data.backing import fields_behind, visible_slots
from storage.fields import Field, field_at
from storage.images.image import Image
from storage.layout import FIELDS_SHIFT, HOLE, ZERO_POINTER
from storage.tree.attempt import when_possible
from storage.tree.buffer_tree import BufferTree
from storage.tree.node import HOLES


@dataclass(slots=True)
class Holes:
    """The holes of one level-1 block that must be replaced: slots, and the fields behind them (as
    structured fields).
    """

    index: int
    slots: npt.NDArray[np.intp]
    fields: npt.NDArray[np.void]

    def __len__(self) -> int:
        return len(self.slots)


def find_holes(clone: Image, index: int) -> Holes | None:
    """The special loading function for level-1 block ``index``, or None: ``state.missing`` is what
    to wait for.
    """
    own = clone.tree.peek(index)
    if own is None:
        return None
    open_slots = (own.vbns() == HOLE) & visible_slots(clone, index)
    fields = fields_behind(clone, index, open_slots)
    if fields is None:
        return None
    slots = np.flatnonzero(open_slots & (fields["vbn"] > ZERO_POINTER))
    return Holes(index, slots, fields[slots])


async def holes_at(clone: Image, index: int) -> Holes:
    """``find_holes``, waiting where it must."""
    return await when_possible(clone.state, lambda: find_holes(clone, index))


def shared_block(clone: Image, index: int, level: int) -> Field | None:
    """VBN, CRC32C and birth of the backing store's pointer block that can be shared as one: the
    clone has a hole there, the range is wholly visible, and the backing store has nothing behind
    itself. None otherwise, or when something is not in memory.
    """
    backing = clone.backing
    end = (index + 1) << FIELDS_SHIFT * level
    if (
        backing is None
        or backing.backing is not None
        or end > min(clone.backing_blocks, clone.size_blocks)
    ):
        return None
    if level > min(backing.tree.levels, clone.tree.levels) or not is_hole(clone.tree, index, level):
        return None
    return field_of(backing.tree, index, level)


def is_hole(tree: BufferTree, index: int, level: int) -> bool:
    """Whether a field above block ``index`` of ``level`` is known to be a hole."""
    return tree.peek(index, level) is HOLES


def field_of(tree: BufferTree, index: int, level: int) -> Field | None:
    """The field that names block ``index`` of ``level``, if it names one and the block above it is
    in memory.
    """
    if level == tree.levels:
        return (
            (tree.root_vbn, tree.root_crc, tree.root_birth)
            if tree.root_vbn > ZERO_POINTER
            else None
        )
    parent = tree.peek(index >> FIELDS_SHIFT, level + 1)
    if parent is None or parent.tree is None:
        return None
    field = field_at(parent.q, index)
    return field if field[0] > ZERO_POINTER else None
