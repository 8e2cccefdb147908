"""Which ranges of a volume are allocated: what GET LBA STATUS and block status ask. Empty subtrees
are skipped, whatever their size.
"""

from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from storage.data.backing import fields_behind, peek_next, visible_slots
from storage.images.image import Image
from storage.layout import BLOCK_MASK, BLOCK_SHIFT, FIELDS_SHIFT, HOLE, ZERO_POINTER
from storage.slicer import Slicer
from storage.tree.attempt import when_possible
from storage.tree.search import peek_first

# (blocks, whether they are allocated); neighbours differ.
Run = tuple[int, bool]
# A report may end early. This many level-1 blocks are 64 MiB of data, and less than a millisecond;
# what is empty costs nothing.
INDEXES_MAX = 64


async def allocated_runs(image: Image, first: int, count: int, runs_max: int) -> list[Run]:
    """Runs from block ``first`` on, in order, for ``count`` blocks or fewer: at least one, and
    ``runs_max`` whole ones if there are.

    Raises BlockDamaged, DeviceFailed.
    """
    runs: list[Run] = []
    at, end, slicer = first, first + count, Slicer()
    for _ in range(INDEXES_MAX):
        index = await when_possible(image.state, partial(_next_existing, image, at >> FIELDS_SHIFT))
        start = min(end, max(at, index << FIELDS_SHIFT))
        _append(runs, start - at, False)
        if start == end or len(runs) > runs_max:
            break
        at = min(end, (index + 1) << FIELDS_SHIFT)
        await _append_block(image, index, start, at, runs)
        if at == end:
            break
        await slicer.breathe()
    return runs


async def allocated_bytes(
    image: Image, offset: int, length: int, runs_max: int
) -> list[tuple[int, bool]]:
    """The same for a range of bytes: (bytes, whether they are allocated)."""
    first = offset >> BLOCK_SHIFT
    end, at = offset + length, first << BLOCK_SHIFT
    count = (end + BLOCK_MASK >> BLOCK_SHIFT) - first
    found = []
    for blocks, allocated in await allocated_runs(image, first, count, runs_max):
        following = at + (blocks << BLOCK_SHIFT)
        found.append((min(following, end) - max(at, offset), allocated))
        at = following
    return found


def _next_existing(image: Image, index: int) -> int | None:
    """The first level-1 index from there on that exists in the image or behind it, else NOWHERE;
    None: it has to be waited for.
    """
    own = peek_first(image.tree, index)
    behind = peek_next(image, index) if own is not None else None
    return min(own, behind) if own is not None and behind is not None else None


def _flags(image: Image, index: int) -> npt.NDArray[np.bool_] | None:
    """Which blocks of level-1 block ``index`` have data, in the image or behind it; None: it has to
    be waited for.
    """
    own = image.tree.peek(index)
    behind = (
        fields_behind(image, index, (own.vbns() == HOLE) & visible_slots(image, index))
        if own is not None
        else None
    )
    return (
        (own.vbns() > ZERO_POINTER) | (behind["vbn"] > ZERO_POINTER)
        if own is not None and behind is not None
        else None
    )


async def _append_block(image: Image, index: int, start: int, end: int, runs: list[Run]) -> None:
    """Add the runs of blocks [start, end), which lie in level-1 block ``index``."""
    low = start - (index << FIELDS_SHIFT)
    flags = (await when_possible(image.state, lambda: _flags(image, index)))[
        low : low + end - start
    ]
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
