"""Fields of pointer blocks: how VBN, CRC32C and birth stand in the 16 bytes of one (the format is
storage.layout's).

There are two ways to the fields of a block. ``q`` is the block as 512 u64, for single fields: the
VBN of field i stands at 2i, and its *tail* at 2i + 1, the birth above the CRC32C. FIELD_DTYPE is a
field as numpy has it, for many at a time. ``index`` is the index of the block that a field names,
at its level: the low bits of it are the slot.

The paths of single reads and writes inline these functions, and say so where they do;
``tests/storage/test_fields.py`` compares.
"""

from typing import Final

import numpy as np

from storage.layout import FIELD_BYTES, FIELDS_MASK

FIELD_DTYPE: Final = np.dtype([("vbn", "<u8"), ("crc", "<u4"), ("birth", "<u4")])
# Within a tail.
CRC_MASK: Final = 0xFFFFFFFF
BIRTH_SHIFT: Final = 32

# VBN, CRC32C, birth.
Field = tuple[int, int, int]

assert FIELD_DTYPE.itemsize == FIELD_BYTES


def vbn_at(q: memoryview, index: int) -> int:
    """The VBN in the field of ``index``."""
    return q[(index & FIELDS_MASK) * 2]


def field_at(q: memoryview, index: int) -> Field:
    """The whole field of ``index``."""
    slot = (index & FIELDS_MASK) * 2
    tail = q[slot + 1]
    return q[slot], tail & CRC_MASK, tail >> BIRTH_SHIFT


def set_field(q: memoryview, index: int, field: Field) -> None:
    """Make the field of ``index`` this one."""
    slot = (index & FIELDS_MASK) * 2
    q[slot] = field[0]
    q[slot + 1] = field[1] | field[2] << BIRTH_SHIFT


def set_crc(q: memoryview, index: int, vbn: int, crc: int) -> None:
    """Enter the CRC32C in the field of ``index``, if that field names ``vbn``."""
    slot = (index & FIELDS_MASK) * 2
    if q[slot] == vbn:
        q[slot + 1] = q[slot + 1] >> BIRTH_SHIFT << BIRTH_SHIFT | crc
