"""What a device holds is found by its marks, wherever those stand; what has none and is not blank
is data all the same.
"""

import pytest

from storage.device.signatures import HEAD_BYTES, MARKS, TAIL_BYTES, UNKNOWN, Mark, identify
from storage.layout import BLOCK_BYTES, UNFINISHED_MAGIC

SIZE_BYTES = 5 << 20


def identified(content: bytes | bytearray) -> str | None:
    return identify(bytes(content[:HEAD_BYTES]), bytes(content[-TAIL_BYTES:]), len(content))


def holding(magic: bytes, offset: int, size_bytes: int = SIZE_BYTES) -> bytearray:
    content = bytearray(size_bytes)
    at = offset if offset >= 0 else size_bytes + offset
    content[at : at + len(magic)] = magic
    return content


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: f"{mark.what}-{len(mark.magic)}")
def test_every_mark_is_found_in_each_of_its_places(mark: Mark) -> None:
    for offset in mark.offsets:
        assert identified(holding(mark.magic, offset)) == mark.what


@pytest.mark.parametrize("size_bytes", [SIZE_BYTES, SIZE_BYTES + 512, SIZE_BYTES + 65536, 3 << 20])
def test_marks_whose_place_depends_on_the_size(size_bytes: int) -> None:
    raid = b"\xfc\x4e\x2b\xa9"
    sectors = size_bytes // 512
    for at in ((sectors - 16) // 8 * 8 * 512, size_bytes // 65536 * 65536 - 65536):
        assert identified(holding(raid, at, size_bytes)) == "a member of a Linux RAID (md)"
    end = size_bytes // (256 << 10) * (256 << 10)
    for label in (0, 256 << 10, end - (512 << 10), end - (256 << 10)):
        for magic in ((0x00BAB10C).to_bytes(8, "little"), (0x00BAB10C).to_bytes(8, "big")):
            assert (
                identified(holding(magic, label + (128 << 10) + 127 * 1024, size_bytes))
                == "a ZFS pool"
            )


def test_a_blank_device_and_an_unfinished_pool_hold_nothing() -> None:
    assert identified(bytes(SIZE_BYTES)) is None
    assert identified(b"") is None
    assert identified(bytes(512)) is None
    unfinished = holding(UNFINISHED_MAGIC, 0)
    unfinished[BLOCK_BYTES * 70 : BLOCK_BYTES * 71] = (
        b"n" * BLOCK_BYTES
    )  # a block of its first consistency point
    unfinished[BLOCK_BYTES : BLOCK_BYTES + 8] = b"CLEAVED\0"  # torn
    assert identified(unfinished) is None


@pytest.mark.parametrize("offset", [0, 700, 1 << 19, (1 << 20) + 4095, -1, -(1 << 20)])
def test_one_byte_at_either_end_is_data(offset: int) -> None:
    assert identified(holding(b"x", offset)) == UNKNOWN
