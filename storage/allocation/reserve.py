"""The reserve: what a pool keeps back, so that a full one can still do what must be possible on it
(design section 6, invariant 6), whatever clients did before.

What is kept back is not given to whatever comes first. From top to bottom,
- the trees of clients may grow in the first part (a trim in a clone, say, that needs no block for
  data);
- the second is *lent*: a change that gives back with its consistency point what it takes (it moves
  nodes that are not shared, or overwrites data of its own) may go down here, and waits for that
  consistency point where others have borrowed all. So trims, shrinking and overwriting what is not
  shared go on for ever. Data leaves half of it to nodes, and both leave a quarter to deletions;
- the rest is for consistency points: every block of the maps once (one may have to rewrite them
  all), and the upper part of the vdisk table. Table entries are not in it: a change that touches an
  image has promised the blocks that its entry takes.
"""

from typing import NamedTuple

from storage.layout import (
    FIELDS_PER_BLOCK,
    SHARES_PER_BLOCK,
    SUMMARIES_PER_BLOCK,
    region_count,
    tree_levels,
)

POINT_BLOCKS_EXTRA = 48
# Each of the first two: 1/256 of the pool, up to 16 MiB; on a small pool so much that half of it is
# an atomic write (128 KiB).
PART_BLOCKS_MIN = 64
PART_BLOCKS_MAX = 4096


class Floors(NamedTuple):
    """How many free blocks must be left, by what takes some: a consistency point that others follow
    (``point``), what moves nodes (``move``), borrowed data (``borrow``), trees of clients that grow
    (``client``), new data (``data``).
    """

    point: int
    move: int
    borrow: int
    client: int
    data: int


def floors_of(size_blocks: int) -> Floors:
    """The floors of a pool of ``size_blocks`` blocks."""
    part = max(PART_BLOCKS_MIN, min(PART_BLOCKS_MAX, size_blocks // 256))
    point = map_blocks(size_blocks) + POINT_BLOCKS_EXTRA
    return Floors(point, point + part // 4, point + part // 2, point + part, point + 2 * part)


def tree_blocks(size_blocks: int) -> int:
    """Blocks of a metafile of that size, its pointer blocks included."""
    total = blocks = size_blocks
    for _ in range(tree_levels(size_blocks)):
        blocks = -(-blocks // FIELDS_PER_BLOCK)
        total += blocks
    return total


def map_blocks(size_blocks: int) -> int:
    """Blocks of all the maps of a pool of ``size_blocks`` blocks."""
    regions = region_count(size_blocks)
    return (
        tree_blocks(regions)
        + tree_blocks(-(-regions // SUMMARIES_PER_BLOCK))
        + tree_blocks(-(-size_blocks // SHARES_PER_BLOCK))
    )
