"""Which ranges of a volume are allocated: what GET LBA STATUS and block status ask. Empty subtrees are skipped, whatever their size."""

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from storage.images.backing import fields_behind, load_chain, next_index
from storage.layout import FIELDS_PER_BLOCK, FIELDS_SHIFT, HOLE, ZERO_POINTER
from storage.slices import Slicer
from storage.tree.search import first_block

if TYPE_CHECKING:
    from storage.images.image import Image

# (blocks, whether they are allocated); neighbours differ.
Run = tuple[int, bool]
# A report may end early. This many level-1 blocks are 64 MiB of data, and less than a millisecond; what is empty costs nothing.
INDEXES_MAX = 64


async def allocated_runs(image: "Image", first: int, count: int, runs_max: int) -> list[Run]:
    """Runs from block ``first`` on, in order, for ``count`` blocks or fewer: at least one, and ``runs_max`` whole ones if there are.

    Raises BlockDamaged, DeviceFailed.
    """
    runs: list[Run] = []
    at, end, slicer = first, first + count, Slicer()
    for _ in range(INDEXES_MAX):
        index = await _next_existing(image, at >> FIELDS_SHIFT)
        start = end if index is None else min(end, max(at, index << FIELDS_SHIFT))
        _append(runs, start - at, False)
        if index is None or start == end or len(runs) > runs_max:
            break
        at = min(end, (index + 1) << FIELDS_SHIFT)
        await _append_block(image, index, start, at, runs)
        if at == end:
            break
        await slicer.breathe()
    return runs


async def _next_existing(image: "Image", index: int) -> int | None:
    """The first level-1 index from there on that exists in the image or behind it."""
    found = [await first_block(image.tree, image.tree.levels, 0, index), await next_index(image, index)]
    return min((here for here in found if here is not None), default=None)


async def _append_block(image: "Image", index: int, start: int, end: int, runs: list[Run]) -> None:
    """Add the runs of blocks [start, end), which lie in level-1 block ``index``."""
    while True:
        own = image.tree.peek(index)
        if own is not None:
            holes = own.vbns() == HOLE
            holes &= image.backing_blocks - (index << FIELDS_SHIFT) > np.arange(FIELDS_PER_BLOCK)
            behind = fields_behind(image, index, holes)
            if behind is not None:
                break
        await load_chain(image, index)
    low = start - (index << FIELDS_SHIFT)
    flags = ((own.vbns() > ZERO_POINTER) | (behind["vbn"] > ZERO_POINTER))[low : low + end - start]
    breaks = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    for here, following in pairwise(breaks):
        _append(runs, following - here, bool(flags[here]))


def _append(runs: list[Run], blocks: int, allocated: bool) -> None:
    if not blocks:
        return
    if runs and runs[-1][1] == allocated:
        runs[-1] = (runs[-1][0] + blocks, allocated)
    else:
        runs.append((blocks, allocated))
