"""Fields of pointer blocks, many at a time, as numpy columns, with the words for where a field
stands.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage import layout
from storage.check.steps import Block
from storage.check.uses import Crcs, Mask, Vbns
from storage.checksum import crc32c
from storage.fields import FIELD_DTYPE

Label = Callable[[int], str]


@dataclass(frozen=True)
class Fields:
    """Columns of fields that name blocks of one level: owner (image number or metafile), index at
    that level, and the field.
    """

    owners: Vbns
    indexes: Vbns
    vbns: Vbns
    crcs: Crcs
    births: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.vbns)

    def select(self, which: "Mask | Vbns | slice") -> "Fields":
        """The fields that a mask, positions or a slice picks."""
        return Fields(
            self.owners[which],
            self.indexes[which],
            self.vbns[which],
            self.crcs[which],
            self.births[which],
        )

    def by_vbn(self) -> "Fields":
        """The same fields in the order of their VBNs: the order in which a device reads fastest."""
        return self.select(np.argsort(self.vbns, kind="stable"))


def make_fields(rows: Iterable[tuple[int, int, int, int, int]]) -> Fields:
    """Fields from rows of (owner, index, VBN, CRC32C, birth)."""
    table = np.array(list(rows), np.int64).reshape(-1, 5)
    owners, indexes, vbns, crcs, births = (np.ascontiguousarray(column) for column in table.T)
    return Fields(owners, indexes, vbns, crcs.astype(np.uint32), births.astype(np.uint32))


def join_fields(parts: list[Fields]) -> Fields:
    """One table of all parts."""
    if not parts:
        return make_fields([])
    columns = ([getattr(part, name) for part in parts] for name in Fields.__dataclass_fields__)
    return Fields(*(np.concatenate(column) for column in columns))


def field_table(blocks: list[memoryview]) -> npt.NDArray[np.void]:
    """The fields of pointer blocks, one row a block."""
    return np.frombuffer(b"".join(blocks), FIELD_DTYPE).reshape(-1, layout.FIELDS_PER_BLOCK)


def block_fault(block: Block, crc: int) -> str | None:
    """What is wrong with a block whose field holds ``crc``, in words; None when nothing is."""
    if block is None:
        return "cannot be read from the device"
    found = crc32c(block)
    return (
        None
        if found == crc
        else f"is damaged: its CRC32C is {found:#010x}, the field that points to it has {crc:#010x}"
    )


def place_words(label: str, level: int, index: int, vbn: int) -> str:
    """Where a block stands, in words: owner, level, FBN and VBN."""
    first = index << (layout.FIELDS_SHIFT * level)
    if level == 0:
        return f"{label}: block at FBN {first} (VBN {vbn})"
    last = first + (1 << (layout.FIELDS_SHIFT * level)) - 1
    return f"{label}: level-{level} pointer block for FBN {first} to {last} (VBN {vbn})"
