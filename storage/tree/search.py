"""Searching a buffer tree for what exists: whole empty subtrees are skipped."""

import numpy as np

from storage.layout import FIELDS_SHIFT, ZERO_POINTER
from storage.tree.buffer_tree import BufferTree


async def first_block(tree: BufferTree, level: int, at: int, index: int) -> int | None:
    """The first level-1 index from ``index`` on that exists below the block ``at`` of ``level``."""
    if index >> FIELDS_SHIFT * (level - 1) > at:
        return None
    node = await tree.load(at, level)
    if node.tree is None:
        return None
    if level == 1:
        return at
    low = max(0, (index >> FIELDS_SHIFT * (level - 2)) - (at << FIELDS_SHIFT))
    for slot in (np.flatnonzero(node.vbns()[low:] > ZERO_POINTER) + low).tolist():
        found = await first_block(tree, level - 1, at << FIELDS_SHIFT | slot, index)
        if found is not None:
            return found
    return None
