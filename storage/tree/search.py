"""Searching a buffer tree for what exists: whole empty subtrees are skipped."""

from typing import Final

import numpy as np

from storage.layout import FIELDS_SHIFT, ZERO_POINTER
from storage.tree.attempt import when_possible
from storage.tree.buffer_tree import BufferTree

# The answer where nothing exists any more: beyond every index that a tree can have.
NOWHERE: Final = 1 << 62


def peek_first(tree: BufferTree, index: int) -> int | None:
    """The first level-1 index from ``index`` on that exists, NOWHERE if there is none. None:
    ``state.missing`` is what to wait for.
    """
    return _below(tree, tree.levels, 0, index)


def _below(tree: BufferTree, level: int, at: int, index: int) -> int | None:
    """The same below block ``at`` of ``level``."""
    if index >> FIELDS_SHIFT * (level - 1) > at:
        return NOWHERE
    node = tree.peek(at, level)
    if node is None:
        return None
    if node.tree is None:
        return NOWHERE
    if level == 1:
        return at  # a tree of one level
    low = max(0, (index >> FIELDS_SHIFT * (level - 2)) - (at << FIELDS_SHIFT))
    for slot in (np.flatnonzero(node.vbns()[low:] > ZERO_POINTER) + low).tolist():
        child = at << FIELDS_SHIFT | slot
        # That a level-1 block exists its field says, and the block need not be there for it.
        found = _below(tree, level - 1, child, index) if level > 2 else child
        if found != NOWHERE:
            return found
    return NOWHERE


async def first_block(tree: BufferTree, index: int) -> int | None:
    """``peek_first``, waiting where it must; None when there is none. Raises BlockDamaged,
    DeviceFailed.
    """
    found = await when_possible(tree.state, lambda: peek_first(tree, index))
    return None if found == NOWHERE else found
