"""The exact count of what a split still has to do: holes of the clone behind which the backing
chain has a block.

All trees go down together, level by level. A node is one position (index at a level) with what each
tree of the chain has there; it is dropped as soon as nothing below can count, and counted whole
when only one tree of the chain is left and the clone has a hole there.

Design section 5 (split), and the terms hole, zero pointer and backing store of section 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage import layout
from storage.check.fields import field_table
from storage.check.images import Image
from storage.check.steps import POINTER_BATCH_BLOCKS, Steps
from storage.check.walk import Leaves

# A position above the root of a tree that is lower than the highest: its child 0 goes on towards
# the root, all others are holes.
ABOVE_ROOT = -1
# Nodes that one slice expands above level 1: each makes up to 256 positions, in Python.
EXPAND_BATCH = 8

Row = npt.NDArray[np.int64]
HOLES: Row = np.zeros(layout.FIELDS_PER_BLOCK, np.int64)


@dataclass(frozen=True, slots=True)
class _Tree:
    root_vbn: int
    levels: int
    limit_blocks: int  # FBNs from here on are not seen


@dataclass(frozen=True, slots=True)
class _Node:
    index: int
    own: int
    behind: tuple[tuple[int, int], ...]  # (tree number, VBN or ABOVE_ROOT), nearest first


class HoleCount:
    """Counts for one clone, whose backing chain is ``chain`` (nearest first, no circle). ``leaves``
    is the walk's.
    """

    def __init__(
        self, clone: Image, chain: Sequence[Image], leaves: Callable[[int], Leaves | None]
    ) -> None:
        self._leaves = leaves
        self._trees = [_Tree(clone.root_vbn, clone.levels, clone.size_blocks)]
        limit, front = clone.size_blocks, clone
        for backing in chain:
            limit = min(limit, front.backing_blocks)
            self._trees.append(_Tree(backing.root_vbn, backing.levels, limit))
            front = backing
        self._total = 0
        self._nodes: list[_Node] = []
        self._complete = True

    def run(self) -> Steps[int | None]:
        """The number of holes to fill; None when damage keeps it from being known."""
        top = max(tree.levels for tree in self._trees) + 1
        own, *behind = (ABOVE_ROOT for _ in self._trees)
        self._nodes.append(_Node(0, own, tuple(enumerate(behind, 1))))
        for level in range(top, 0, -1):
            nodes, self._nodes = self._nodes, []
            batch = EXPAND_BATCH if level > 1 else POINTER_BATCH_BLOCKS
            for first in range(0, len(nodes), batch):
                yield from self._expand(nodes[first : first + batch], level)
        return self._total if self._complete else None

    def _expand(self, nodes: list[_Node], level: int) -> Steps[None]:
        wanted = sorted(
            {
                vbn
                for node in nodes
                for vbn in (node.own, *(vbn for _, vbn in node.behind))
                if vbn > layout.ZERO_POINTER
            }
        )
        if any(self._leaves(vbn) is None for vbn in wanted):
            self._complete = False
            return
        blocks = yield wanted
        sound = [block for block in blocks if block is not None]
        if len(sound) != len(wanted):
            self._complete = False
            return
        rows = (
            dict(zip(wanted, field_table(sound)["vbn"].astype(np.int64), strict=True))
            if wanted
            else {}
        )
        for node in nodes:
            own = self._row(0, node.own, level, rows)
            behind = [(number, self._row(number, vbn, level, rows)) for number, vbn in node.behind]
            if level == 1:
                self._total += self._count(node.index, own, behind)
            else:
                self._descend(node.index, own, behind, level - 1)

    def _row(self, number: int, vbn: int, level: int, rows: Mapping[int, Row]) -> Row:
        if vbn > layout.ZERO_POINTER:
            return rows[vbn]
        if vbn == layout.HOLE:
            return HOLES
        tree = self._trees[number]
        row = HOLES.copy()
        row[0] = tree.root_vbn if tree.levels == level - 1 else ABOVE_ROOT
        return row

    def _count(self, index: int, own: Row, behind: list[tuple[int, Row]]) -> int:
        fbns = (index << layout.FIELDS_SHIFT) + np.arange(layout.FIELDS_PER_BLOCK)
        seen = HOLES
        for number, row in reversed(behind):
            seen = np.where(row != layout.HOLE, row, seen)
            # A limit bounds its tree and all behind it, so what lies beyond is a hole again.
            seen = np.where(fbns < self._trees[number].limit_blocks, seen, layout.HOLE)
        return int(((own == layout.HOLE) & (seen > layout.ZERO_POINTER)).sum())

    def _descend(self, index: int, own: Row, behind: list[tuple[int, Row]], level: int) -> None:
        anything = np.logical_or.reduce([row != layout.HOLE for _, row in behind])
        columns = [(number, row.tolist()) for number, row in behind]
        for slot in np.flatnonzero((own != layout.ZERO_POINTER) & anything).tolist():
            child = (index << layout.FIELDS_SHIFT) + slot
            self._take(
                child, int(own[slot]), [(number, column[slot]) for number, column in columns], level
            )

    def _take(self, index: int, own: int, behind: list[tuple[int, int]], level: int) -> None:
        span = 1 << (layout.FIELDS_SHIFT * level)
        left: list[tuple[int, int]] = []
        for number, vbn in behind:
            if index * span >= self._trees[number].limit_blocks or vbn == layout.ZERO_POINTER:
                break
            if vbn != layout.HOLE:
                left.append((number, vbn))
        if not left:
            return
        number, vbn = left[0]
        whole = (
            own == layout.HOLE
            and len(left) == 1
            and (index + 1) * span <= self._trees[number].limit_blocks
        )
        leaves = self._leaves(vbn) if whole and vbn != ABOVE_ROOT else None
        if leaves is not None:
            self._total += leaves.blocks
        else:
            self._nodes.append(_Node(index, own, tuple(left)))
