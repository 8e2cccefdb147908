"""Comparing the block allocation structures with what the walk reached: active map, share map,
region summary, used blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage import layout
from storage.check.fields import Fields, block_fault, place_words
from storage.check.report import ERRORS_MAX, CheckReport
from storage.check.steps import Block, Steps
from storage.check.superblock import Superblock
from storage.check.uses import Mask, Uses

SHARE_BLOCKS_PER_REGION = layout.REGION_BLOCKS // layout.SHARES_PER_BLOCK
Counts = npt.NDArray[np.int64]


class MetafileBlocks:
    """The level-0 fields of one metafile, in the order of FBN."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields.select(np.argsort(fields.indexes, kind="stable"))

    def between(self, first_fbn: int, end_fbn: int) -> Fields:
        """Fields of the blocks that exist from ``first_fbn`` up to, and without, ``end_fbn``."""
        first, end = np.searchsorted(self.fields.indexes, [first_fbn, end_fbn]).tolist()
        return self.fields.select(slice(first, end))


class Difference(NamedTuple):
    """A VBN about which the maps and the walk disagree; ``text`` wants the words for where the
    block stands.
    """

    vbn: int
    text: str


@dataclass(frozen=True)
class _Region:
    first_vbn: int
    blocks: int
    references: Counts
    used: Mask


class MapComparison:
    """Compares region by region. ``differences`` are those whose text still wants the place of a
    VBN.
    """

    def __init__(
        self, superblock: Superblock, uses: Uses, report: CheckReport, walk_damaged: bool
    ) -> None:
        self._superblock = superblock
        self._uses = uses
        self._report = report
        self._walk_damaged = walk_damaged
        self._unreached_blocks = 0
        self._total_known = True
        self.differences: list[Difference] = []

    def run(
        self, active: MetafileBlocks, shares: MetafileBlocks, summary: MetafileBlocks
    ) -> Steps[None]:
        """Compare everything. The three metafiles are given by the level-0 fields that the walk
        reached.
        """
        regions = layout.region_count(self._superblock.size_blocks)
        set_bits = np.zeros(regions, np.int64)
        for region in range(regions):
            fields = active.between(region, region + 1)
            shared = shares.between(
                region * SHARE_BLOCKS_PER_REGION, (region + 1) * SHARE_BLOCKS_PER_REGION
            )
            if len(fields) or len(shared) or self._region_uses(region):
                set_bits[region] = yield from self._compare_region(region, fields, shared)
            elif region % layout.SUMMARIES_PER_BLOCK == 0:
                yield ()
        self._report_beyond(active, regions, "active map")
        self._report_beyond(
            shares, -(-self._superblock.size_blocks // layout.SHARES_PER_BLOCK), "share map"
        )
        yield from self._compare_summary(summary, set_bits)
        self._compare_totals(int(set_bits.clip(0).sum()))

    def _region_uses(self, region: int) -> bool:
        first = region * layout.REGION_BLOCKS
        return first < self._superblock.first_free_vbn or self._uses.region(region) is not None

    def _expect(self, region: int) -> _Region:
        first = region * layout.REGION_BLOCKS
        references = self._uses.region(region)
        if references is None:
            references = np.zeros(layout.REGION_BLOCKS, np.int64)
        used = references > 0
        used[: max(0, self._superblock.first_free_vbn - first)] = True
        return _Region(
            first, min(layout.REGION_BLOCKS, self._superblock.size_blocks - first), references, used
        )

    def _compare_region(self, region: int, active: Fields, shares: Fields) -> Steps[int]:
        expected = self._expect(region)
        blocks = yield [*active.vbns.tolist(), *shares.vbns.tolist()]
        stored = self._load(active, blocks[: len(active)], "active map", 1, region)
        counts = self._load(
            shares, blocks[len(active) :], "share map", SHARE_BLOCKS_PER_REGION, region
        )
        if counts is not None:
            self._compare_shares(expected, counts.view("<u4").astype(np.int64))
        if stored is None:
            self._total_known = False
            return -1
        bits = np.unpackbits(stored, bitorder="little").view(np.bool_)
        self._compare_bits(expected, bits)
        return int(bits.sum())

    def _load(
        self, fields: Fields, blocks: list[Block], name: str, per_region: int, region: int
    ) -> npt.NDArray[np.uint8] | None:
        """Contents of the region's part of a metafile, zeros where it has no block; None when one
        of them is damaged.
        """
        contents = np.zeros((per_region, layout.BLOCK_BYTES), np.uint8)
        faults = 0
        for position, (block, crc) in enumerate(zip(blocks, fields.crcs.tolist(), strict=True)):
            fbn, vbn = int(fields.indexes[position]), int(fields.vbns[position])
            fault = block_fault(block, crc)
            if fault is None and block is not None:
                self._report.metafile_blocks += 1
                contents[fbn - region * per_region] = np.frombuffer(block, np.uint8)
            else:
                faults += 1
                self._report.error(
                    f"{place_words(name, 0, fbn, vbn)} {fault}; its part of the pool is not"
                    " compared"
                )
        return None if faults else contents.reshape(-1)

    def _compare_bits(self, expected: _Region, bits: Mask) -> None:
        for vbn in (expected.first_vbn + np.flatnonzero(expected.used & ~bits)).tolist():
            self._differ(vbn, "is in use, but free in the active map")
        surplus = bits & ~expected.used
        for first, last in _runs(np.flatnonzero(surplus[: expected.blocks])):
            self._report_unreached(expected.first_vbn + first, expected.first_vbn + last)
        beyond = int(bits[expected.blocks :].sum())
        if beyond:
            end = self._superblock.size_blocks
            self._report.error(
                f"the active map has {beyond} bits set beyond the end of the pool (VBN {end})",
                beyond,
            )

    def _report_unreached(self, first: int, last: int) -> None:
        count = last - first + 1
        self._unreached_blocks += count
        if not self._walk_damaged:
            which = (
                f"VBN {first} is" if count == 1 else f"VBN {first} to {last} ({count} blocks) are"
            )
            self._report.error(
                f"{which} in use in the active map, but nothing reaches there", count
            )

    def _compare_shares(self, expected: _Region, stored: Counts) -> None:
        wanted = np.maximum(expected.references - 1, 0)
        different = stored != wanted
        if self._walk_damaged:
            # References from what could not be read are missing in our count, so only a count that
            # is too low says something.
            different = stored < wanted
        for local in np.flatnonzero(different).tolist():
            vbn = expected.first_vbn + local
            self._differ(
                vbn,
                f"has {int(stored[local])} extra references in the share map, the walk found"
                f" {int(wanted[local])}",
            )

    def _differ(self, vbn: int, text: str) -> None:
        if len(self.differences) < ERRORS_MAX:
            self.differences.append(Difference(vbn, text))
        else:
            self._report.error(f"VBN {vbn} {text}")

    def _report_beyond(self, blocks: MetafileBlocks, end_fbn: int, name: str) -> None:
        for fbn, vbn in zip(*(column.tolist() for column in _beyond(blocks, end_fbn)), strict=True):
            self._report.error(
                f"{place_words(name, 0, fbn, vbn)} lies beyond what a pool of"
                f" {self._superblock.size_blocks} blocks has"
            )

    def _compare_summary(self, summary: MetafileBlocks, set_bits: Counts) -> Steps[None]:
        blocks_needed = -(-len(set_bits) // layout.SUMMARIES_PER_BLOCK)
        stored = np.zeros(blocks_needed * layout.SUMMARIES_PER_BLOCK, np.int64)
        known = np.ones(len(stored), np.bool_)
        known[: len(set_bits)] = set_bits >= 0
        fields = summary.between(0, blocks_needed)
        for position, fbn in enumerate(fields.indexes.tolist()):
            field = fields.select(slice(position, position + 1))
            blocks = yield field.vbns.tolist()
            part = slice(fbn * layout.SUMMARIES_PER_BLOCK, (fbn + 1) * layout.SUMMARIES_PER_BLOCK)
            contents = self._load(field, blocks, "region summary", 1, fbn)
            if contents is None:
                known[part] = False
            else:
                stored[part] = contents.view("<u2")
        wanted = np.zeros(len(stored), np.int64)
        wanted[: len(set_bits)] = set_bits
        for region in np.flatnonzero(known & (stored != wanted)).tolist():
            text = (
                f"the region summary counts {stored[region]} blocks in use, the active map"
                f" {wanted[region]}"
            )
            self._report.error(f"region {region}: {text}")
        self._report_beyond(summary, blocks_needed, "region summary")

    def _compare_totals(self, total: int) -> None:
        self._report.blocks_used = total
        if self._unreached_blocks and self._walk_damaged:
            text = (
                "blocks are in use in the active map and were not reached; they may belong to what"
                " could not be read"
            )
            self._report.error(f"{self._unreached_blocks} {text}")
        if self._total_known and total != self._superblock.used_blocks:
            self._report.error(
                f"the superblock counts {self._superblock.used_blocks} blocks in use, the active"
                f" map {total}"
            )


def _beyond(blocks: MetafileBlocks, end_fbn: int) -> tuple[Counts, Counts]:
    beyond = blocks.fields.select(blocks.fields.indexes >= end_fbn)
    return beyond.indexes, beyond.vbns


def _runs(positions: Counts) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of consecutive positions."""
    if len(positions):
        breaks = np.flatnonzero(np.diff(positions) > 1)
        firsts = positions[np.concatenate(([0], breaks + 1))].tolist()
        lasts = positions[np.concatenate((breaks, [len(positions) - 1]))].tolist()
        yield from zip(firsts, lasts, strict=True)
