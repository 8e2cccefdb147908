"""The walk over buffer trees, level by level, all trees at once: each distinct pointer block is
read once, however many share it.

- Uses are claimed for the children of a pointer block when it is read, so each distinct pointer
  block counts once for each child.
- A block is read only by the claim that reached it first. What lies below a block that is damaged
  stays unknown, and is never guessed: ``TreeWalk.damaged`` says that it happened, and comparisons
  that would depend on it are left out.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from storage import layout
from storage.check.fields import Fields, Label, block_fault, field_table, place_words
from storage.check.report import CheckReport
from storage.check.steps import POINTER_BATCH_BLOCKS, UPPER_BATCH_BLOCKS, Steps
from storage.check.superblock import Superblock
from storage.check.uses import KIND_IMAGE, KIND_METAFILE, Claim, Uses, Vbns

# A place (owner, level, index of a pointer block) is kept as one int, and so are leaves: a dict of
# millions of tuples would be walked by every full garbage collection, and that would stall the
# event loop of a live check. An index at level 1 is below 256 ** 4.
PLACE_INDEX_BITS = 32
PLACE_LEVEL_BITS = 3
LEAVES_LAST_BITS = 48
# Owners of metafile blocks stand above every image number, which are 32 bits wide in the intent
# log.
METAFILE_OWNER = 1 << 32


class Leaves(NamedTuple):
    """Level-0 fields with a VBN below one pointer block: how many, and the last one's position from
    the block's first (-1: none).
    """

    blocks: int
    last: int


def pack_place(owner: int, level: int, index: int) -> int:
    """Where a pointer block stands, as one int."""
    return (owner << PLACE_LEVEL_BITS | level) << PLACE_INDEX_BITS | index


def unpack_place(place: int) -> tuple[int, int, int]:
    """Owner, level and index of a packed place."""
    head, index = place >> PLACE_INDEX_BITS, place & ((1 << PLACE_INDEX_BITS) - 1)
    return head >> PLACE_LEVEL_BITS, head & ((1 << PLACE_LEVEL_BITS) - 1), index


class TreeWalk:
    """One walk over a set of trees of the same sort: the metafiles' (``kind`` KIND_METAFILE) or the
    images' (KIND_IMAGE).
    """

    def __init__(
        self, superblock: Superblock, uses: Uses, report: CheckReport, kind: int, label: Label
    ) -> None:
        self._superblock = superblock
        self._uses = uses
        self._report = report
        self._kind = kind
        self._label = label
        self._pending: dict[int, list[Fields]] = {
            level: [] for level in range(1, layout.TREE_LEVELS_MAX + 1)
        }
        self._children: dict[int, list[tuple[int, Vbns, Vbns]]] = {
            level: [] for level in range(2, layout.TREE_LEVELS_MAX + 1)
        }
        self.places: dict[int, int] = {}
        self._leaves: dict[int, int] = {}
        self.damaged = False

    def leaves(self, vbn: int) -> Leaves | None:
        """What lies below the pointer block at ``vbn``; None when damage keeps it from
        being known.
        """
        packed = self._leaves.get(vbn)
        return (
            None
            if packed is None
            else Leaves(packed >> LEAVES_LAST_BITS, (packed & ((1 << LEAVES_LAST_BITS) - 1)) - 1)
        )

    def _keep_leaves(self, vbn: int, blocks: int, last: int) -> None:
        self._leaves[vbn] = blocks << LEAVES_LAST_BITS | last + 1

    def reach(self, fields: Fields, level: int) -> Fields:
        """Claim what ``fields`` name as blocks of ``level``, report what is wrong with that, and
        return those reached first.
        """
        fields = self._within_pool(fields, level)
        claim = self._uses.claim(fields.vbns, fields.crcs, self._kind + level)
        self._report_conflicts(fields, level, claim)
        fresh = fields.select(claim.fresh)
        if level:
            for vbn, owner, index in zip(
                fresh.vbns.tolist(), fresh.owners.tolist(), fresh.indexes.tolist(), strict=True
            ):
                self.places[vbn] = pack_place(owner, level, index)
            self._pending[level].append(fresh)
            self._compare_indexes(fields.select(~claim.fresh & ~claim.kind_differs), level)
        return fresh

    def run(self, on_leaves: Callable[[Fields], Steps[None]]) -> Steps[None]:
        """Walk down from the roots that ``reach`` was given. ``on_leaves`` gets the level-0 fields
        reached first, batch by batch.
        """
        for level in range(layout.TREE_LEVELS_MAX, 0, -1):
            batch = POINTER_BATCH_BLOCKS if level == 1 else UPPER_BATCH_BLOCKS
            while self._pending[level]:
                fields = self._pending[level].pop().by_vbn()
                for first in range(0, len(fields), batch):
                    yield from self._walk_batch(
                        fields.select(slice(first, first + batch)), level, on_leaves
                    )
        yield from self._sum_leaves()

    def _within_pool(self, fields: Fields, level: int) -> Fields:
        superblock = self._superblock
        for position in np.flatnonzero(fields.births > superblock.cp).tolist():
            birth = int(fields.births[position])
            self._fault(
                fields,
                position,
                level,
                f"is born in consistency point {birth}, the pool is only at {superblock.cp}",
            )
        inside = (fields.vbns >= superblock.first_free_vbn) & (fields.vbns < superblock.size_blocks)
        if inside.all():
            return fields
        self.damaged = True
        for position in np.flatnonzero(~inside).tolist():
            self._fault(fields, position, level, self._why_outside(int(fields.vbns[position])))
        return fields.select(inside)

    def _why_outside(self, vbn: int) -> str:
        if 0 <= vbn < self._superblock.size_blocks:
            return "lies in the superblocks or the intent log"
        return f"lies outside the pool, which has {self._superblock.size_blocks} blocks"

    def _report_conflicts(self, fields: Fields, level: int, claim: Claim) -> None:
        for position in np.flatnonzero(claim.kind_differs).tolist():
            self.damaged = True
            first = kind_words(self._uses.kind(int(fields.vbns[position])))
            self._fault(fields, position, level, f"is in use as {first} already")
        for position in np.flatnonzero(claim.crc_differs & ~claim.kind_differs).tolist():
            crc = int(fields.crcs[position])
            self._fault(
                fields,
                position,
                level,
                f"has the CRC32C {crc:#010x} in this field, and another one in a field met earlier",
            )
        if self._kind == KIND_METAFILE:
            for position in np.flatnonzero(~claim.fresh & ~claim.kind_differs).tolist():
                self._fault(
                    fields, position, level, "is reached twice, and metafiles share nothing"
                )

    def _compare_indexes(self, shared: Fields, level: int) -> None:
        for position, (vbn, index) in enumerate(
            zip(shared.vbns.tolist(), shared.indexes.tolist(), strict=True)
        ):
            first = unpack_place(self.places[vbn])[2]
            if first != index:
                elsewhere = place_words("another tree", level, first, vbn)
                self._fault(shared, position, level, f"stands at another position in {elsewhere}")

    def _walk_batch(
        self, batch: Fields, level: int, on_leaves: Callable[[Fields], Steps[None]]
    ) -> Steps[None]:
        blocks = yield batch.vbns.tolist()
        sound, good = [], []
        for position, (block, crc) in enumerate(zip(blocks, batch.crcs.tolist(), strict=True)):
            fault = block_fault(block, crc)
            if fault is None and block is not None:
                sound.append(position)
                good.append(block)
            else:
                self.damaged = True
                self._fault(batch, position, level, f"{fault}; what lies below is unknown")
        self._report.pointer_blocks += len(good)
        if good:
            yield from self._take_batch(
                batch.select(np.array(sound, np.int64)), good, level, on_leaves
            )

    def _take_batch(
        self,
        parents: Fields,
        blocks: list[memoryview],
        level: int,
        on_leaves: Callable[[Fields], Steps[None]],
    ) -> Steps[None]:
        table = field_table(blocks)
        named = table["vbn"] > layout.ZERO_POINTER
        rows, slots = np.nonzero(named)
        fields = table[named]
        indexes = (parents.indexes[rows] << layout.FIELDS_SHIFT) + slots
        # A VBN of 2**63 and above turns negative here, and is then outside the pool, as it should
        # be.
        children = Fields(
            parents.owners[rows],
            indexes,
            fields["vbn"].astype(np.int64),
            fields["crc"],
            fields["birth"],
        )
        if level > 1:
            self._keep_children(
                parents, children, level, np.searchsorted(rows, np.arange(len(blocks) + 1))
            )
            self.reach(children, level - 1)
            return
        counts = named.sum(axis=1)
        lasts = np.where(counts > 0, layout.FIELDS_MASK - named[:, ::-1].argmax(axis=1), -1)
        for vbn, blocks_below, last in zip(
            parents.vbns.tolist(), counts.tolist(), lasts.tolist(), strict=True
        ):
            self._keep_leaves(vbn, blocks_below, last)
        yield from on_leaves(self.reach(children, 0))

    def _keep_children(self, parents: Fields, children: Fields, level: int, bounds: Vbns) -> None:
        for parent, first, end in zip(
            parents.vbns.tolist(), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True
        ):
            slots = children.indexes[first:end] & layout.FIELDS_MASK
            self._children[level].append((parent, slots, children.vbns[first:end]))

    def _sum_leaves(self) -> Steps[None]:
        for level, kept in self._children.items():
            span_shift = layout.FIELDS_SHIFT * (level - 1)
            for number, (parent, slots, vbns) in enumerate(kept):
                below = [self.leaves(vbn) for vbn in vbns.tolist()]
                if None not in below:
                    known = [leaves for leaves in below if leaves is not None]
                    lasts = [
                        (slot << span_shift) + one.last
                        for slot, one in zip(slots.tolist(), known, strict=True)
                        if one.blocks
                    ]
                    self._keep_leaves(
                        parent, sum(one.blocks for one in known), max(lasts, default=-1)
                    )
                if number % UPPER_BATCH_BLOCKS == 0:
                    yield ()
            kept.clear()

    def _fault(self, fields: Fields, position: int, level: int, what: str) -> None:
        label = self._label(int(fields.owners[position]))
        where = place_words(label, level, int(fields.indexes[position]), int(fields.vbns[position]))
        self._report.error(f"{where} {what}")


def kind_words(kind: int) -> str:
    """A kind of use, in words."""
    base, owner, level_0 = (
        (KIND_METAFILE, "a metafile", "metafile block")
        if kind >= KIND_METAFILE
        else (KIND_IMAGE, "an image", "data block")
    )
    return f"a level-{kind - base} pointer block of {owner}" if kind > base else f"a {level_0}"
