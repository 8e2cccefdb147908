"""The check: clean pools are clean, and each kind of damage is reported in words that name where it
is.
"""

import re
from collections.abc import Mapping
from uuid import UUID

import pytest

from storage import layout
from storage.check.report import ERRORS_MAX
from storage.check.superblock import parse_superblock
from tests.storage.checking import (
    COUNTED,
    SNAPSHOT,
    VDISK,
    assert_finds,
    check,
    errors_of,
    flip,
    rich_pool,
)
from tests.storage.pool_writer import BLOCK, CP, LOG_BLOCKS, Entry, PoolWriter


def test_empty_pool_is_clean() -> None:
    report = check(PoolWriter().build())
    assert report.ok and report.errors == [] and report.images == 0
    assert (
        report.blocks_used == 2 + LOG_BLOCKS + 3 + 3
    )  # configuration, active map, summary: a block and a root each


@pytest.mark.parametrize("verify_data", [False, True])
def test_rich_pool_is_clean(verify_data: bool) -> None:
    pool, _ = rich_pool()
    report = check(pool.build(), verify_data)
    assert report.errors == []
    # What the writer of these pools leaves at VBN 0, as a lost write of the second copy does.
    assert report.notes == [
        "the superblock at VBN 0 is of consistency point 6, the other one of 7: a start repairs it"
    ]
    assert (report.vdisks, report.snapshots, report.deleted_images, report.cp_number) == (
        4,
        1,
        1,
        CP,
    )
    assert report.bytes_verified == (7 * BLOCK if verify_data else 0)
    assert report.as_dict()["ok"] is True and report.as_dict()["blocks_used"] == report.blocks_used


def test_metafile_roots_may_be_holes() -> None:
    pool = PoolWriter()
    pool.entries = {1: Entry(VDISK, "a", pool.tree({0: pool.data("a")}, 1))}
    report = check(pool.build())
    assert report.ok and pool.pointers and report.pointer_blocks == 5


def test_leaked_blocks_are_named_as_a_run() -> None:
    def leak(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.active_flips = {1500, 1501, 1502, 1700}

    assert_finds(
        errors_of(leak),
        r"VBN 1500 to 1502 \(3 blocks\) are in use .* nothing reaches",
        r"VBN 1700 is in use",
    )


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("b0", r"vdisk 'alpha': block at FBN 256 "),
        ("a0", r"(vdisk 'alpha'|snapshot 'alpha@monday'): block at FBN 0 "),
        ("c0", r"vdisk 'beta': block at FBN 0 "),
        ("d0", r"deleted image 4: block at FBN 3 "),
        ("vdisk_only", r"vdisk 'alpha': level-1 pointer block for FBN 256 to 511 "),
        ("vdisk_root", r"vdisk 'alpha': level-2 pointer block for FBN 0 to 65535 "),
    ],
)
def test_block_free_in_the_map_is_located(name: str, where: str) -> None:
    def free(pool: PoolWriter, vbns: dict[str, int]) -> None:
        pool.active_flips = {vbns[name]}

    assert_finds(errors_of(free), where + r"\(VBN \d+\) is in use, but free in the active map")


def test_metafile_block_free_in_the_map_is_located() -> None:
    pool, _ = rich_pool()
    pool.active_flips = {pool.next_vbn}  # build places the table's entries first
    assert_finds(
        check(pool.build()).errors, r"vdisk table: block at FBN 1 .* free in the active map"
    )


def test_superblocks_and_log_must_be_in_use() -> None:
    def free(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.active_flips = {1, layout.LOG_FIRST_VBN + 5}

    assert_finds(
        errors_of(free),
        r"^superblock at VBN 1 is in use, but free",
        r"^intent log at VBN 7 is in use, but free",
    )


def test_bits_beyond_the_pool_are_reported() -> None:
    def beyond(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.active_flips = {pool.size_blocks + 3, pool.size_blocks + 4}
        pool.summary_deltas = {0: 2}

    assert_finds(errors_of(beyond), r"2 bits set beyond the end of the pool \(VBN 2048\)")


def test_summary_and_superblock_counts_are_compared() -> None:
    def shift(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.summary_deltas = {0: 4}
        pool.used_delta = -1

    assert_finds(
        errors_of(shift),
        r"region 0: the region summary counts \d+ .* the active map \d+",
        r"the superblock counts \d+ blocks",
    )


def test_share_counts_are_compared() -> None:
    def shift(pool: PoolWriter, vbns: dict[str, int]) -> None:
        pool.share_deltas = {vbns["shared"]: 1, vbns["a3"]: -1, vbns["c0"]: 2}

    assert_finds(
        errors_of(shift),
        r"level-1 pointer block for FBN 0 to 255 .* has 2 extra references in the share map, the"
        r" walk found 1",
        r"block at FBN 263 .* has 0 extra references in the share map, the walk found 1",
        r"vdisk 'beta': block at FBN 0 .* has 2 extra references in the share map, the walk"
        r" found 0",
    )


def test_entry_counter_and_holes_are_compared() -> None:
    def shift(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.entries[1].used_blocks = 9
        pool.entries[3].split = (layout.SPLIT_PAUSED, 1, COUNTED, 5)

    assert_finds(
        errors_of(shift),
        r"vdisk 'alpha': its entry counts 9 blocks, its tree has 4",
        r"vdisk 'beta': its split counts 5 remaining holes, its trees have 2",
    )


def test_holes_that_were_not_counted_yet_are_not_compared() -> None:
    def uncounted(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.entries[3].split = (layout.SPLIT_RUNNING, 0, 0, 77)

    assert errors_of(uncounted) == []


@pytest.mark.parametrize(
    ("limit_blocks", "holes"), [(1024, 2), (263, 1), (257, 1), (256, 0), (0, 0)]
)
def test_holes_end_where_the_backing_store_is_no_longer_seen(limit_blocks: int, holes: int) -> None:
    def shrink(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.entries[3].backing_blocks = limit_blocks
        pool.entries[3].split = (layout.SPLIT_RUNNING, 0, COUNTED, holes)

    assert errors_of(shrink) == []


def test_damaged_pointer_block_is_named_and_what_lies_below_is_not_guessed() -> None:
    pool, vbns = rich_pool()
    report = check(flip(pool.build(), vbns["vdisk_only"]))
    assert_finds(
        report.errors,
        r"vdisk 'alpha': level-1 pointer block for FBN 256 to 511 .* is damaged: its CRC32C is"
        r" 0x[0-9a-f]{8}, .* below is unknown",
        r"1 blocks are in use .* were not reached",
    )


def test_damaged_root_leaves_the_split_uncompared() -> None:
    pool, vbns = rich_pool()
    report = check(flip(pool.build(), vbns["snapshot_root"]))
    assert_finds(
        report.errors,
        r"snapshot 'alpha@monday': level-2 pointer block .* is damaged",
        r"2 blocks are in use .* not reached",
    )
    assert any("holes_remaining was not compared" in note for note in report.notes)


def test_unreadable_blocks_are_reported_and_the_rest_is_checked() -> None:
    pool, vbns = rich_pool()
    report = check(
        pool.build(), verify_data=True, unreadable=frozenset({vbns["b0"], vbns["vdisk_root"]})
    )
    assert_finds(
        report.errors,
        r"vdisk 'alpha': level-2 pointer block .* cannot be read from the device",
        r"2 blocks are in use .* were not reached",
    )
    report = check(pool.build(), verify_data=True, unreadable=frozenset({vbns["b0"]}))
    assert_finds(
        report.errors, r"vdisk 'alpha': block at FBN 256 .* cannot be read from the device"
    )


def test_damaged_data_is_found_when_asked_for() -> None:
    pool, vbns = rich_pool()
    damaged = flip(pool.build(), vbns["c0"])
    assert check(damaged).ok
    assert_finds(
        check(damaged, verify_data=True).errors,
        rf"vdisk 'beta': block at FBN 0 \(VBN {vbns['c0']}\) is damaged: its CRC32C",
    )


@pytest.mark.parametrize("metafile", layout.METAFILES)
def test_damaged_metafile_block_and_root_are_named(metafile: int) -> None:
    pool, _ = rich_pool()
    built = pool.build()
    superblock = parse_superblock(built[BLOCK : 2 * BLOCK])
    assert superblock is not None
    root = superblock.roots[metafile].vbn
    first_block = next(
        vbn
        for vbn, _, _ in layout.FIELD.iter_unpack(built[root * BLOCK : (root + 1) * BLOCK])
        if vbn
    )
    name = layout.METAFILE_NAMES[metafile]
    errors = check(flip(bytearray(built), first_block)).errors
    assert any(
        re.search(rf"^{name}: block at FBN \d+ \(VBN {first_block}\).* is damaged", error)
        for error in errors
    ), errors
    errors = check(flip(bytearray(built), root)).errors
    assert any(
        re.search(rf"^{name}: level-1 pointer block .*\(VBN {root}\) is damaged", error)
        for error in errors
    ), errors


def test_two_uses_of_one_block_are_a_conflict() -> None:
    def cross(pool: PoolWriter, vbns: dict[str, int]) -> None:
        # A data field of the clone names a pointer block of alpha.
        pool.entries[5].root = pool.tree({9: vbns["vdisk_only"]}, 1)

    errors = errors_of(cross)
    assert any(
        re.search(
            r"vdisk 'empty': block at FBN 9 .* is in use as a level-1 pointer block of an image"
            r" already",
            error,
        )
        for error in errors
    )


def test_pointer_block_at_two_levels_is_a_conflict() -> None:
    pool, vbns = rich_pool()
    pool.entries[5].root = pool.pointer({4: vbns["vdisk_only"]})
    pool.entries[5].levels = 3
    errors = check(pool.build()).errors
    assert any(
        re.search(
            r"level-2 pointer block for FBN 262144 to .* in use as a level-1|level-1 .* is in use"
            r" as a level-2",
            e,
        )
        for e in errors
    ), errors


def test_pointer_block_at_another_index_is_reported() -> None:
    pool, vbns = rich_pool()
    pool.entries[5].root = pool.pointer({3: vbns["vdisk_only"]})
    pool.entries[5].levels = 2
    assert_finds(
        check(pool.build()).errors,
        r"level-1 pointer block for FBN (256|768) .* stands at another position in another tree",
    )


def test_two_fields_with_different_checksums_for_one_block() -> None:
    pool = PoolWriter()
    block = pool.data("once")
    first = pool.pointer({0: block})
    pool.crc_overrides[block] = 0xDEADBEEF
    second = pool.pointer({0: block})
    pool.entries = {1: Entry(VDISK, "a", first), 2: Entry(VDISK, "b", second)}
    assert_finds(
        check(pool.build()).errors,
        r"vdisk '[ab]': block at FBN 0 .* has the CRC32C 0x[0-9a-f]{8} in this field, and"
        r" another one",
    )


@pytest.mark.parametrize(
    ("vbn", "why"),
    [
        (2, "lies in the superblocks or the intent log"),
        (LOG_BLOCKS + 1, "lies in the superblocks or the intent log"),
        (2048, "lies outside the pool, which has 2048 blocks"),
        (1 << 63, "lies outside the pool"),
    ],
)
def test_fields_that_name_no_pool_block(vbn: int, why: str) -> None:
    pool = PoolWriter()
    pool.entries = {1: Entry(VDISK, "a", pool.pointer({9: vbn, 10: pool.data("sound")}))}
    assert_finds(check(pool.build()).errors, rf"vdisk 'a': block at FBN 9 \(VBN -?\d+\) {why}")


def test_birth_in_the_future() -> None:
    pool = PoolWriter()
    block = pool.data("later")
    pool.births[block] = CP + 1
    pool.entries = {1: Entry(VDISK, "a", pool.pointer({0: block}))}
    assert_finds(
        check(pool.build()).errors,
        r"vdisk 'a': block at FBN 0 .* is born in consistency point 8, the pool is only at 7",
    )


def test_a_root_that_hundreds_of_snapshots_share() -> None:
    pool = PoolWriter(size_blocks=4096)
    root = pool.tree({0: pool.data("popular")}, 1)
    pool.entries = {1: Entry(VDISK, "a", root)} | {
        2 + n: Entry(SNAPSHOT, f"s{n}", root, origin=1) for n in range(600)
    }
    assert check(pool.build()).ok
    pool.share_deltas = {root: -256}
    assert_finds(
        check(pool.build()).errors, r"has 344 extra references in the share map, the walk found 600"
    )


class CrossedWriter(PoolWriter):
    """Names the table entry of image 1 for image 2 as well."""

    def tree(self, contents: Mapping[int, int], levels: int) -> int:
        return super().tree(
            {1: contents[1], 2: contents[1]} if set(contents) == {1, 2} else contents, levels
        )


def test_metafiles_share_nothing() -> None:
    pool = CrossedWriter(entries={1: Entry(VDISK, "a"), 2: Entry(VDISK, "b")})
    errors = check(pool.build()).errors
    assert any(
        re.search(
            r"vdisk table: block at FBN 2 .* is reached twice, and metafiles share nothing", error
        )
        for error in errors
    ), errors


ENTRY_FAULTS: list[tuple[str, dict[str, object], str]] = [
    ("levels", {"levels": 9}, r"vdisk 'victim' \(image 9\) has 9 levels of pointer blocks"),
    ("created later", {"created_cp": CP + 1}, r"'victim' .* was created in consistency point 8"),
    ("split state", {"split": (9, 0, 0, 0)}, r"'victim' .* has split state 9"),
    ("split mode", {"split": (3, 7, 0, 0)}, r"'victim' .* split state 3 and mode 7"),
    ("no name", {"name": ""}, r"vdisk '' \(image 9\) has no name"),
    ("size", {"size_bytes": 4097}, r"'victim' .* has a size of 4097 bytes"),
    (
        "split without backing",
        {"split": (1, 0, 0, 0)},
        r"'victim' .* has a running split, but no backing store",
    ),
    (
        "snapshot's split",
        {"kind": SNAPSHOT, "origin": 1, "split": (3, 0, 0, 0)},
        r"'alpha@victim' .* is a snapshot and has a split",
    ),
    (
        "origin is missing",
        {"kind": SNAPSHOT, "origin": 88},
        r"names image 88 as its origin, and there is none",
    ),
    (
        "origin is a snapshot",
        {"kind": SNAPSHOT, "origin": 2},
        r"names snapshot 'alpha@monday' as its origin, which must be a vdisk",
    ),
    (
        "backing is a vdisk",
        {"backing": 1},
        r"names vdisk 'alpha' as its backing store, which must be a snapshot",
    ),
    (
        "backing is missing",
        {"backing": 77},
        r"names image 77 as its backing store, and there is none",
    ),
    (
        "backing too long",
        {"backing": 2, "backing_blocks": 1025},
        r"sees 1025 blocks of its backing store, which has only 1024",
    ),
    ("vdisk name twice", {"name": "alpha"}, r"vdisk 'alpha': images 1 and 9 have the same name"),
    (
        "snapshot name twice",
        {"name": "monday", "kind": SNAPSHOT, "origin": 1},
        r"snapshot 'alpha@monday': images 2 and 9 have the same name",
    ),
    (
        "magic",
        {"magic": b"oops"},
        r"vdisk table: block at FBN 9 .* is no entry for image 9: magic b'oops' and kind 1",
    ),
    ("kind", {"kind": 7}, r"is no entry for image 9: magic b'cIMG' and kind 7"),
]


@pytest.mark.parametrize(
    ("values", "pattern"), [row[1:] for row in ENTRY_FAULTS], ids=[row[0] for row in ENTRY_FAULTS]
)
def test_entry_faults(values: dict[str, object], pattern: str) -> None:
    def plant(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.entries[9] = Entry(**{"kind": VDISK, "name": "victim", **values})  # type: ignore[arg-type]

    assert_finds(errors_of(plant), pattern)


def test_same_uuid_twice() -> None:
    def plant(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.entries[5].uuid = pool.entries[6].uuid = UUID(int=5)

    assert_finds(errors_of(plant), r"vdisk 'trimmed': images 5 and 6 have the same UUID")


def test_snapshots_of_two_vdisks_may_have_one_name() -> None:
    def name(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.entries[9] = Entry(SNAPSHOT, "monday", origin=3)
        pool.entries[10] = Entry(SNAPSHOT, "alpha", origin=3)

    assert errors_of(name) == []


def test_backing_stores_in_a_circle() -> None:
    def circle(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.entries[7] = Entry(SNAPSHOT, "one", origin=1, backing=8)
        pool.entries[8] = Entry(SNAPSHOT, "two", origin=1, backing=7)
        pool.entries[3].backing = 7
        pool.entries[3].backing_blocks = 0

    errors = errors_of(circle)
    assert_finds(
        errors,
        r"'(alpha@one|alpha@two|beta)' .* is, by way of its backing stores, its own backing store",
    )
    assert len(errors) == 3


def test_configuration_that_claims_more_than_there_is() -> None:
    pool = PoolWriter(configuration_bytes=BLOCK - 8)
    assert check(pool.build()).ok
    pool.configuration_bytes = BLOCK - 7
    assert_finds(
        check(pool.build()).errors, r"configuration: it claims 4089 bytes, its metafile holds 4088"
    )


def test_image_number_zero_stays_free() -> None:
    def plant(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.entries[0] = Entry(VDISK, "zero")

    assert_finds(
        errors_of(plant), r"is no entry for image 0: is in use, and image number 0 says 'none'"
    )


def test_block_beyond_the_end_of_a_vdisk() -> None:
    def shrink(pool: PoolWriter, _: dict[str, int]) -> None:
        pool.entries[1].size_bytes = 263 * BLOCK

    assert_finds(
        errors_of(shrink), r"vdisk 'alpha': has a block at FBN 263, beyond its size of 263 blocks"
    )
    pool, _ = rich_pool()
    pool.entries[1].size_bytes = 263 * BLOCK + layout.SECTOR_BYTES
    assert check(pool.build()).ok


def test_errors_are_limited_but_all_counted() -> None:
    pool = PoolWriter(size_blocks=16384)
    leaf = {slot: pool.data("x") for slot in range(256)}
    pool.entries = {1: Entry(VDISK, "a", pool.pointer(leaf))}
    pool.active_flips = {4000 + 2 * n for n in range(ERRORS_MAX + 500)}
    report = check(pool.build())
    assert len(report.errors) == ERRORS_MAX and report.errors_total == ERRORS_MAX + 500
