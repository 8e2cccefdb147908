"""The check as a whole: what is walked and compared, in which order.

It is a generator (see ``storage.check.steps``), so it neither reads nor waits. Order: metafiles,
vdisk table, configuration, image trees, counters of the entries, associations, splits, maps; then
the places of blocks about which something differs; then, offline, the intent log.
"""

from functools import partial

import numpy as np

from storage import layout
from storage.check.associations import Images, chain_circles, check_associations, owner_label
from storage.check.fields import Fields, block_fault, join_fields, make_fields, place_words
from storage.check.holes import HoleCount
from storage.check.images import Image, parse_image
from storage.check.locate import locate
from storage.check.log import count_records
from storage.check.maps import MapComparison, MetafileBlocks
from storage.check.report import CheckReport
from storage.check.steps import DATA_BATCH_BLOCKS, ENTRY_BATCH, POINTER_BATCH_BLOCKS, Steps
from storage.check.superblock import Superblock
from storage.check.uses import KIND_IMAGE, KIND_METAFILE, Uses
from storage.check.walk import METAFILE_OWNER, Leaves, TreeWalk


class Check:
    """One check of the pool state that ``superblock`` names. ``verify_data`` reads every data block
    and compares its CRC32C.

    ``count_log`` reports how many records of the intent log follow the head; a live pool writes
    there, so a live check leaves it out. ``phase`` and ``report`` may be looked at while it runs.
    """

    def __init__(
        self, superblock: Superblock, verify_data: bool = False, count_log: bool = True
    ) -> None:
        self.phase = "metafiles"
        self.report = CheckReport(superblock.cp, str(superblock.uuid), superblock.size_blocks)
        self._superblock = superblock
        self._verify_data = verify_data
        self._count_log = count_log
        self._uses = Uses()
        self._images: Images = {}
        self._label = partial(owner_label, self._images)
        self._metafile_walk = TreeWalk(
            superblock, self._uses, self.report, KIND_METAFILE, self._label
        )
        self._image_walk = TreeWalk(superblock, self._uses, self.report, KIND_IMAGE, self._label)
        self._metafile_fields: list[Fields] = []
        self._roots: list[tuple[int, Fields]] = []

    def run(self) -> Steps[CheckReport]:
        """The check: yields VBNs to read, is sent their blocks, and returns the report."""
        yield from self._walk_metafiles()
        self.phase = "vdisk table"
        yield from self._read_table()
        yield from self._verify_configuration()
        self.phase = "trees"
        yield from self._walk_images()
        self.phase = "counters"
        yield from self._compare_counters()
        yield from check_associations(self._images, self._superblock.cp, self.report)
        self.phase = "splits"
        yield from self._compare_splits()
        self.phase = "maps"
        yield from self._compare_maps()
        if self._count_log:
            self.phase = "intent log"
            self.report.log_records = yield from count_records(self._superblock)
        return self.report

    def _metafile(self, metafile: int) -> MetafileBlocks:
        parts = [
            fields.select(fields.owners == METAFILE_OWNER + metafile)
            for fields in self._metafile_fields
        ]
        return MetafileBlocks(join_fields(parts))

    def _walk_metafiles(self) -> Steps[None]:
        for metafile, root in enumerate(self._superblock.roots):
            if root.vbn <= layout.ZERO_POINTER:
                continue
            if not 1 <= root.levels <= layout.TREE_LEVELS_MAX:
                self.report.error(
                    f"{layout.METAFILE_NAMES[metafile]}: the superblock says {root.levels} levels,"
                    " which no tree has"
                )
                self._metafile_walk.damaged = True
                continue
            self._reach_roots(
                self._metafile_walk,
                root.levels,
                [(METAFILE_OWNER + metafile, 0, root.vbn, root.crc, root.birth)],
            )
        yield from self._metafile_walk.run(self._keep_metafile_fields)

    def _reach_roots(
        self, walk: TreeWalk, level: int, rows: list[tuple[int, int, int, int, int]]
    ) -> None:
        fields = make_fields(rows)
        self._roots.append((level, fields))
        walk.reach(fields, level)

    def _keep_metafile_fields(self, fields: Fields) -> Steps[None]:
        sizes = np.array([root.size_blocks for root in self._superblock.roots], np.int64)
        owners = fields.owners - METAFILE_OWNER
        for position in np.flatnonzero(fields.indexes >= sizes[owners]).tolist():
            metafile, fbn, vbn = (
                int(owners[position]),
                int(fields.indexes[position]),
                int(fields.vbns[position]),
            )
            place = place_words(layout.METAFILE_NAMES[metafile], 0, fbn, vbn)
            self.report.error(
                f"{place} lies beyond the metafile's size of {sizes[metafile]} blocks"
            )
        self._metafile_fields.append(fields)
        yield ()

    def _read_table(self) -> Steps[None]:
        fields = self._metafile(layout.VDISK_TABLE).fields
        for first in range(0, len(fields), POINTER_BATCH_BLOCKS):
            batch = fields.select(slice(first, first + POINTER_BATCH_BLOCKS))
            blocks = yield batch.vbns.tolist()
            for number, vbn, crc, block in zip(
                batch.indexes.tolist(),
                batch.vbns.tolist(),
                batch.crcs.tolist(),
                blocks,
                strict=True,
            ):
                fault = block_fault(block, crc)
                entry = (
                    parse_image(number, block)
                    if fault is None and block is not None
                    else str(fault)
                )
                self._take_entry(number, vbn, entry)

    def _take_entry(self, number: int, vbn: int, entry: Image | str) -> None:
        if isinstance(entry, str) or number == 0:
            what = entry if isinstance(entry, str) else "is in use, and image number 0 says 'none'"
            self.report.error(
                f"{place_words('vdisk table', 0, number, vbn)} is no entry for image {number}:"
                f" {what}"
            )
            self._image_walk.damaged = True
            return
        self.report.metafile_blocks += 1
        self._images[number] = entry
        counter = {
            layout.KIND_VDISK: "vdisks",
            layout.KIND_SNAPSHOT: "snapshots",
            layout.KIND_DELETED: "deleted_images",
        }[entry.kind]
        setattr(self.report, counter, getattr(self.report, counter) + 1)

    def _verify_configuration(self) -> Steps[None]:
        fields = self._metafile(layout.CONFIGURATION).fields
        for first in range(0, len(fields), POINTER_BATCH_BLOCKS):
            batch = fields.select(slice(first, first + POINTER_BATCH_BLOCKS))
            yield from self._verify(batch, layout.METAFILE_NAMES[layout.CONFIGURATION])
            self.report.metafile_blocks += len(batch)
        yield from self._check_configuration_length(fields.select(fields.indexes == 0))

    def _check_configuration_length(self, head: Fields) -> Steps[None]:
        blocks = yield head.vbns.tolist()
        for block, crc in zip(blocks, head.crcs.tolist(), strict=True):
            if block is None or block_fault(block, crc) is not None:
                return  # reported already
            (length,) = layout.CONFIGURATION_HEAD.unpack_from(block)
            room = (
                self._superblock.roots[layout.CONFIGURATION].size_blocks * layout.BLOCK_BYTES
                - layout.CONFIGURATION_HEAD.size
            )
            if length > min(room, layout.CONFIGURATION_BYTES_MAX):
                self.report.error(
                    f"configuration: it claims {length} bytes, its metafile holds {room}"
                )

    def _verify(self, batch: Fields, name: str | None = None) -> Steps[None]:
        blocks = yield batch.vbns.tolist()
        for position, (block, crc) in enumerate(zip(blocks, batch.crcs.tolist(), strict=True)):
            if (fault := block_fault(block, crc)) is not None:
                label = name or self._label(int(batch.owners[position]))
                index, vbn = int(batch.indexes[position]), int(batch.vbns[position])
                self.report.error(f"{place_words(label, 0, index, vbn)} {fault}")

    def _walk_images(self) -> Steps[None]:
        images = list(self._images.values())
        for first in range(0, len(images), ENTRY_BATCH):
            by_level: dict[int, list[tuple[int, int, int, int, int]]] = {}
            for image in images[first : first + ENTRY_BATCH]:
                if (
                    image.root_vbn > layout.ZERO_POINTER
                    and 1 <= image.levels <= layout.TREE_LEVELS_MAX
                ):
                    row = (
                        image.number,
                        0,
                        _signed(image.root_vbn),
                        image.root_crc,
                        image.root_birth,
                    )
                    by_level.setdefault(image.levels, []).append(row)
            for level, rows in by_level.items():
                self._reach_roots(self._image_walk, level, rows)
            yield ()
        yield from self._image_walk.run(self._verify_leaves)

    def _verify_leaves(self, fields: Fields) -> Steps[None]:
        if not self._verify_data:
            return
        ordered = fields.by_vbn()
        for first in range(0, len(ordered), DATA_BATCH_BLOCKS):
            batch = ordered.select(slice(first, first + DATA_BATCH_BLOCKS))
            yield from self._verify(batch)
            self.report.data_blocks_verified += len(batch)
            self.report.bytes_verified += len(batch) * layout.BLOCK_BYTES

    def _leaves_of(self, image: Image) -> Leaves | None:
        return (
            self._image_walk.leaves(image.root_vbn)
            if image.root_vbn > layout.ZERO_POINTER
            else Leaves(0, -1)
        )

    def _compare_counters(self) -> Steps[None]:
        for position, image in enumerate(self._images.values()):
            if position % ENTRY_BATCH == 0:
                yield ()
            leaves = self._leaves_of(image)
            if leaves is None or image.kind == layout.KIND_DELETED:
                continue  # nobody sees a deleted image any more: its size and counter say nothing
            if leaves.blocks != image.used_blocks:
                self.report.error(
                    f"{self._label(image.number)}: its entry counts {image.used_blocks} blocks, its"
                    f" tree has {leaves.blocks}"
                )
            if leaves.last >= image.size_blocks:
                what = (
                    f"has a block at FBN {leaves.last}, beyond its size of {image.size_blocks}"
                    " blocks"
                )
                self.report.error(f"{self._label(image.number)}: {what}")

    def _compare_splits(self) -> Steps[None]:
        for position, image in enumerate(self._images.values()):
            if (
                image.splits
                and image.split_flags & layout.SPLIT_FLAG_COUNTED
                and not chain_circles(self._images, image)
            ):
                yield from self._compare_split(image)
            if position % ENTRY_BATCH == 0:
                yield ()

    def _compare_split(self, clone: Image) -> Steps[None]:
        chain: list[Image] = []
        front = clone
        while front.backing and front.backing in self._images:
            front = self._images[front.backing]
            chain.append(front)
        levels_fit = all(1 <= image.levels <= layout.TREE_LEVELS_MAX for image in (clone, *chain))
        if not chain or not levels_fit:
            return
        holes = yield from HoleCount(clone, chain, self._image_walk.leaves).run()
        if holes is None:
            self.report.note(
                f"{self._label(clone.number)}: holes_remaining was not compared, because of damage"
                " in its trees"
            )
        elif holes != clone.holes_remaining:
            text = (
                f"its split counts {clone.holes_remaining} remaining holes, its trees have {holes}"
            )
            self.report.error(f"{self._label(clone.number)}: {text}")

    def _compare_maps(self) -> Steps[None]:
        damaged = self._metafile_walk.damaged or self._image_walk.damaged
        comparison = MapComparison(self._superblock, self._uses, self.report, damaged)
        metafiles = (
            self._metafile(metafile)
            for metafile in (layout.ACTIVE_MAP, layout.SHARE_MAP, layout.REGION_SUMMARY)
        )
        yield from comparison.run(*metafiles)
        differences = comparison.differences
        if not differences:
            return
        places = {**self._metafile_walk.places, **self._image_walk.places}
        first_free = self._superblock.first_free_vbn
        wanted = {difference.vbn for difference in differences if difference.vbn >= first_free}
        words = yield from locate(wanted, places, self._roots, self._label)
        for vbn, text in differences:
            fixed = (
                "superblock"
                if vbn in layout.SUPERBLOCK_VBNS
                else "intent log"
                if vbn < first_free
                else "the block"
            )
            self.report.error(f"{words.get(vbn, f'{fixed} at VBN {vbn}')} {text}")


def _signed(vbn: int) -> int:
    """A VBN as a signed 64-bit number: one that no pool can have turns negative, and is then
    outside, as it should be.
    """
    return vbn - (1 << 64) if vbn >> 63 else vbn
