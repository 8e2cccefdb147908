"""How much of an image is its own: blocks that would come free with it, against blocks that others refer to as well.

Only what the image holds alone is walked: below a shared pointer block everything is shared.
"""

from typing import TYPE_CHECKING

import numpy as np

from storage.layout import FIELDS_PER_BLOCK, SHARES_PER_BLOCK, ZERO_POINTER
from storage.slices import Slicer

if TYPE_CHECKING:
    from storage.images.image import Image


async def exclusive_blocks(image: "Image") -> int:
    """Data blocks that no other image refers to, as of the last consistency point. Raises BlockDamaged, DeviceFailed."""
    if not image.tree.shared_cp:
        return image.used_blocks
    return await _exclusive_below(image, image.tree.levels, 0, Slicer())


async def _exclusive_below(image: "Image", level: int, index: int, slicer: Slicer) -> int:
    tree, share_map = image.tree, image.state.share_map
    node = await tree.load(index, level)
    if node.tree is None:
        return 0
    if node.birth <= tree.shared_cp and await share_map.count(node.vbn):
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


async def _unshared(image: "Image", vbns: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> int:
    """How many of these data blocks have no reference beside this one."""
    count = 0
    blocks = vbns // SHARES_PER_BLOCK
    for block in np.unique(blocks).tolist():
        node = await image.state.share_map.tree.load(block, 0)
        shares = np.frombuffer(node.buf, dtype="<u4")
        count += int((shares[(vbns[blocks == block] % SHARES_PER_BLOCK).astype(np.intp)] == 0).sum())
    return count
