"""Counting the intent log's valid records behind its head: what an open of this pool would replay.
Nothing is replayed here.
"""

from storage import layout
from storage.check.steps import Block, Steps
from storage.check.superblock import Superblock
from storage.checksum import crc32c


def count_records(superblock: Superblock) -> Steps[int]:
    """Number of records from the head on whose magic, pool, sequence and CRC32C are right, one
    after the other.
    """
    head, sequence, records, blocks_passed = (
        superblock.log_head_block,
        superblock.log_head_sequence,
        0,
        0,
    )
    while blocks_passed < superblock.log_blocks:
        (first,) = yield _vbns(superblock, head, 1)
        length = _record_blocks(superblock, first, sequence)
        if not 1 <= length <= superblock.log_blocks - blocks_passed:
            break
        blocks = yield _vbns(superblock, head, length)
        if not _is_whole(blocks):
            break
        records, sequence = records + 1, sequence + 1
        blocks_passed += length
        head = (head + length) % superblock.log_blocks
    return records


def _vbns(superblock: Superblock, block: int, count: int) -> list[int]:
    return [
        superblock.log_first_vbn + (block + step) % superblock.log_blocks for step in range(count)
    ]


def _record_blocks(superblock: Superblock, block: Block, sequence: int) -> int:
    """Length of the record that begins here; 0 when none of this pool and sequence does."""
    if block is None:
        return 0
    magic, _, found, _, _, pool, _, length = layout.RECORD_HEAD.unpack_from(block, 0)
    matches = (
        magic == layout.RECORD_MAGIC and found == sequence and pool == superblock.uuid.bytes[:8]
    )
    return int(length) if matches else 0


def _is_whole(blocks: list[Block]) -> bool:
    parts = [block for block in blocks if block is not None]
    if len(parts) != len(blocks):
        return False
    record = bytearray().join(parts)
    (stored,) = layout.SUPERBLOCK_CRC.unpack_from(record, layout.RECORD_CRC_OFFSET)
    record[layout.RECORD_CRC_OFFSET : layout.RECORD_CRC_OFFSET + 4] = bytes(4)
    return bool(crc32c(record) == stored)
