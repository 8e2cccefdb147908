"""docs/on-disk-format.md against storage/layout.py: the tables of structures, and the numbers that
the prose names.
"""

import re
import struct
from pathlib import Path

import pytest

from storage import layout

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "on-disk-format.md").read_text()
# A sentence may go on in the next line.
PROSE = re.sub(r"\s+", " ", PAGE)
STRUCTURES = [
    name
    for name, value in vars(layout).items()
    if isinstance(value, struct.Struct) and not name.endswith("_CRC")
]
CODES = {"u8": "B", "u32": "I", "u64": "Q"}


def table_after(name: str) -> list[tuple[int, str]]:
    """(offset, type) of each row of the table that follows the marker of a structure."""
    _, marker, rest = PAGE.partition(f"<!-- {name} -->\n")
    assert marker, f"docs/on-disk-format.md has no table of {name}"
    rows = re.match(r"(?:\|.*\n)+", rest)
    assert rows is not None
    cells = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in rows.group().splitlines()[2:]
    ]
    return [(int(offset), kind) for offset, kind, _ in cells]


def code_of(kind: str) -> str:
    return CODES[kind] if kind in CODES else f"{kind.removesuffix(' bytes')}s"


@pytest.mark.parametrize("name", STRUCTURES)
def test_tables_are_the_structures(name: str) -> None:
    structure: struct.Struct = getattr(layout, name)
    rows = table_after(name)
    assert "<" + "".join(code_of(kind) for _, kind in rows) == re.sub(
        r"(?<!\d)(\d*)([BIQ])", spelled_out, structure.format
    )
    at = 0
    for offset, kind in rows:
        assert offset == at, f"{name}: {kind} at {offset}, it stands at {at}"
        at += struct.calcsize("<" + code_of(kind))
    assert at == structure.size


def spelled_out(match: "re.Match[str]") -> str:
    return match[2] * int(match[1] or 1)


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (r"blocks of (\d+) bytes, counted from 0", layout.BLOCK_BYTES),
        (r"A pointer block is (\d+) fields", layout.FIELDS_PER_BLOCK),
        (r"has 1 to (\d+) levels", layout.TREE_LEVELS_MAX),
        (r"format version, (\d+)", layout.FORMAT_VERSION),
        (r"From byte (\d+) on, the roots", layout.METAFILE_ROOTS_OFFSET),
        (r"\(offset (\d+)\) are the CRC32C", layout.SUPERBLOCK_CRC_OFFSET),
        (r"At offset (\d+): who has the pool open", layout.OWNER_OFFSET),
        (r"48 \| (\d+) bytes \| host name", layout.OWNER_HOST_BYTES_MAX),
        (r"Each has (\d+) bytes:", layout.METAFILE_ROOT.size),
        (r"covers ([\d,]+) VBNs, a \*region\*", layout.REGION_BLOCKS),
        (r"how many of its bits are set. (\d+) to a block", layout.SUMMARIES_PER_BLOCK),
        (r"beyond the first. (\d+) to a block", layout.SHARES_PER_BLOCK),
        (r"first VBN of the intent log, (\d+)", layout.LOG_FIRST_VBN),
        (r"1/64 of the pool, at least (\d+)", layout.LOG_BLOCKS_MIN),
        (r"1/64 of the pool, at least \d+, at most (\d+)", layout.LOG_BLOCKS_MAX),
        (r"length of the name in bytes, at most (\d+)", layout.NAME_BYTES_MAX),
        (r"length of the reason in bytes, at most (\d+)", layout.REASON_BYTES_MAX),
        (r"At offset (\d+): the name", layout.IMAGE_NAME_OFFSET),
        (r"At offset (\d+): the last split", layout.IMAGE_SPLIT_OFFSET),
        (r"At offset (\d+): the reason", layout.IMAGE_REASON_OFFSET),
        (r"From offset (\d+) on: zeros", layout.IMAGE_RESERVED_OFFSET),
        (r"The entries follow, (\d+) bytes each", layout.RECORD_ENTRY.size),
        (r"At most (\d+) MiB", layout.CONFIGURATION_BYTES_MAX >> 20),
    ],
)
def test_numbers_in_the_prose(words: str, number: int) -> None:
    found = re.search(words, PROSE)
    assert found is not None, words
    assert int(found[1].replace(",", "")) == number


def test_names_of_states_and_kinds() -> None:
    states = ", ".join(f"{number} {name}" for number, name in enumerate(layout.SPLIT_STATES))
    modes = ", ".join(f"{number} {name}" for number, name in enumerate(layout.SPLIT_MODES))
    kinds = (
        f"{layout.KIND_VDISK} vdisk, {layout.KIND_SNAPSHOT} snapshot, {layout.KIND_DELETED} deleted"
    )
    assert all(
        words in PROSE
        for words in (
            f"state: {states}",
            f"mode: {modes}",
            f"kind: {kinds}",
            ", ".join(layout.METAFILE_NAMES),
        )
    )
