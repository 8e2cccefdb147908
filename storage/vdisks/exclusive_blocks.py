"""How much of an image is its own: blocks that would come free with it, against blocks that others
refer to as well.

Only what the image holds alone is walked: below a shared pointer block everything is shared.
"""

import numpy as np

from storage.images.image import Image
from storage.layout import FIELDS_PER_BLOCK, SHARES_PER_BLOCK, ZERO_POINTER
from storage.slicer import Slicer
from storage.tree.attempt import when_possible
from storage.tree.node import HOLES, Node


async def exclusive_blocks(image: Image) -> int:
    """Data blocks that no other image refers to, as of the last consistency point. Raises
    BlockDamaged, DeviceFailed.
    """
    if not image.tree.shared_cp:
        return image.used_blocks
    return await _exclusive_below(image, image.tree.levels, 0, Slicer())


def _own_node(image: Image, level: int, index: int) -> Node | None:
    """The pointer block if it is the image's alone, HOLES if it is shared or does not exist; None:
    it has to be waited for.
    """
    tree = image.tree
    node = tree.peek(index, level)
    if node is None or node.tree is None or node.birth > tree.shared_cp:
        return node
    count = image.share_map.try_count(node.vbn)
    return None if count is None else HOLES if count else node


async def _exclusive_below(image: Image, level: int, index: int, slicer: Slicer) -> int:
    tree = image.tree
    node = await when_possible(image.state, lambda: _own_node(image, level, index))
    if node.tree is None:
        return 0
    if level == 1:
        fields = node.fields()
        own = int(((fields["vbn"] > ZERO_POINTER) & (fields["birth"] > tree.shared_cp)).sum())
        maybe = fields["vbn"][(fields["vbn"] > ZERO_POINTER) & (fields["birth"] <= tree.shared_cp)]
        return own + await _unshared(image, maybe)
    total = 0
    for slot in np.flatnonzero(node.vbns() > ZERO_POINTER).tolist():
        total += await _exclusive_below(image, level - 1, index * FIELDS_PER_BLOCK + slot, slicer)
        await slicer.breathe()
    return total


async def _unshared(image: Image, vbns: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> int:
    """How many of these data blocks have no reference beside this one."""
    count = 0
    blocks = vbns // SHARES_PER_BLOCK
    for block in np.unique(blocks).tolist():
        node = await image.share_map.tree.load(block, 0)
        shares = np.frombuffer(node.buf, dtype="<u4")
        count += int(
            (shares[(vbns[blocks == block] % SHARES_PER_BLOCK).astype(np.intp)] == 0).sum()
        )
    return count
