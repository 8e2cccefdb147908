"""The on-disk format of a pool, whole: every byte that cleaved writes is described here and nowhere
else.

A pool is a flat space of 4096-byte blocks on one device. All integers are little-endian.

    VBN 0, 1                 superblocks, written in turn (consistency point n goes to VBN n & 1)
    VBN 2 .. 2+log_blocks    intent log, a ring of blocks
    the rest                 write-anywhere: data blocks, pointer blocks, metafile blocks

VBN 0 and 1 are never addresses of data, which is what makes them safe as HOLE and ZERO_POINTER.

A *field* (16 bytes) is a pointer:

    0   u64  VBN           0 = hole, 1 = zero pointer (at any level: the whole range below is zeros)
    8   u32  CRC32C        of the 4096 bytes that the VBN names
    12  u32  birth         consistency point in which that block was written

A *pointer block* is 256 fields. A buffer tree has 1 to TREE_LEVELS_MAX levels of them; its root
pointer block is named by a *root field* that stands in a table entry (vdisks, snapshots) or in the
superblock (metafiles).

Derived, and therefore recomputed by ``storage.check`` from what is reachable: the active map, the
share map, the region summary, ``used_blocks`` of the superblock and of each table entry,
``holes_remaining``.

Design section 4; docs/on-disk-format.md says the same in prose.
"""

import struct
from typing import Final, NewType

from storage.checksum import crc32c

VBN = NewType("VBN", int)

BLOCK_BYTES: Final = 4096
BLOCK_SHIFT: Final = 12
BLOCK_MASK: Final = BLOCK_BYTES - 1
SECTOR_BYTES: Final = 512
ZERO_BLOCK: Final = bytes(BLOCK_BYTES)
ZERO_BLOCK_CRC: Final = 0x98F94189  # CRC32C of 4096 zero bytes

# --- Fields and pointer blocks --------------------------------------------------------------------

HOLE: Final = 0
ZERO_POINTER: Final = 1
FIELD: Final = struct.Struct("<QII")
FIELD_BYTES: Final = 16
FIELDS_PER_BLOCK: Final = BLOCK_BYTES // FIELD_BYTES
FIELDS_SHIFT: Final = 8
FIELDS_MASK: Final = FIELDS_PER_BLOCK - 1
# 256 ** 5 blocks are 4 PiB, above VDISK_BYTES_MAX: five levels always suffice.
TREE_LEVELS_MAX: Final = 5

# --- Superblock -----------------------------------------------------------------------------------

SUPERBLOCK_VBNS: Final = (VBN(0), VBN(1))
SUPERBLOCK_MAGIC: Final = b"CLEAVED\x00"
FORMAT_VERSION: Final = 1
# magic, version, reserved, compat, ro_compat, incompat, uuid, cp, size_blocks, used_blocks,
# log_first_vbn, log_blocks, log_head_block (0-based within the ring), log_head_sequence, created_ns
SUPERBLOCK_HEAD: Final = struct.Struct("<8sIIQQQ16sQQQQQQQQ")
# One after the other behind the head, in METAFILES order: root field (VBN, CRC32C, birth), levels,
# reserved, size in blocks.
METAFILE_ROOT: Final = struct.Struct("<QIIIIQ")
VDISK_TABLE: Final = 0
ACTIVE_MAP: Final = 1
SHARE_MAP: Final = 2
REGION_SUMMARY: Final = 3
CONFIGURATION: Final = 4
METAFILES: Final = (VDISK_TABLE, ACTIVE_MAP, SHARE_MAP, REGION_SUMMARY, CONFIGURATION)
METAFILE_NAMES: Final = (
    "vdisk table",
    "active map",
    "share map",
    "region summary",
    "configuration",
)
METAFILE_ROOTS_OFFSET: Final = 256
SUPERBLOCK_UUID_OFFSET: Final = 40
# Who has the pool open: opened_ns (0: nobody), boot ID of the machine, pid, reserved, start of that
# process in clock ticks since the boot, inode of its PID namespace, host name (UTF-8, filled up
# with zeros).
OWNER: Final = struct.Struct("<Q16sIIQQ64s")
OWNER_OFFSET: Final = 1024
OWNER_HOST_BYTES_MAX: Final = 64
# Stands in VBN 0, with zeros behind it, while a pool is being made: no superblock, and nothing that
# anybody could miss.
UNFINISHED_MAGIC: Final = b"CLEAVED?"
# CRC32C of the bytes before it.
SUPERBLOCK_CRC: Final = struct.Struct("<I")
SUPERBLOCK_CRC_OFFSET: Final = BLOCK_BYTES - 4

# Feature flags. An unknown incompat flag: refuse. An unknown ro_compat flag: open read-only.
# compat: ignore.
FEATURES_COMPAT: Final = 0
FEATURES_RO_COMPAT: Final = 0
FEATURES_INCOMPAT: Final = 0

# --- Block allocation structures ------------------------------------------------------------------

# Active map: bit (v & 7) of byte (v >> 3) says that VBN v is in use. One map block covers one
# *region*.
REGION_BLOCKS: Final = BLOCK_BYTES * 8
# Share map: a u32 a VBN, the count of references beyond the first. A hole in the metafile reads as
# zeros.
SHARES_PER_BLOCK: Final = BLOCK_BYTES // 4
# Region summary: a u16 a region, the number of its bits that are set.
SUMMARIES_PER_BLOCK: Final = BLOCK_BYTES // 2

POOL_BLOCKS_MIN: Final = (
    2048  # 8 MiB: the smallest in which the log, the maps and some data have room
)
LOG_FIRST_VBN: Final = VBN(2)
LOG_BLOCKS_MIN: Final = 64
LOG_BLOCKS_MAX: Final = 8192  # 32 MiB: a million writes between two consistency points

# --- Vdisk table ----------------------------------------------------------------------------------

# Entry FBN = image number; number 0 is never used, so that 0 can say "none".
IMAGE_MAGIC: Final = b"cIMG"
KIND_VDISK: Final = 1
KIND_SNAPSHOT: Final = 2
KIND_DELETED: Final = (
    3  # nameless; the background reclaim takes its tree apart, then frees the entry
)
NAME_BYTES_MAX: Final = 200  # iSCSI names hold 223 bytes (RFC 7143 4.2.7.1), less the target prefix
REASON_BYTES_MAX: Final = 200

# magic, kind, name length, reason length, flags, uuid, size_bytes, root VBN, root CRC32C, root
# birth, levels, shared_cp, used_blocks, created_ns, created_cp, origin (vdisk that a snapshot was
# taken of), backing, backing_blocks
IMAGE_HEAD: Final = struct.Struct("<4sBBBB16sQQIIIIQQQQQQ")
IMAGE_UUID_OFFSET: Final = 8
IMAGE_NAME_OFFSET: Final = 128
IMAGE_SPLIT_OFFSET: Final = 512
# state, mode, flags, reserved, cursor (level-1 index), holes_total, holes_remaining, blocks_copied,
# blocks_shared, rate_min_bytes, rate_max_bytes, started_ns
IMAGE_SPLIT: Final = struct.Struct("<BBBBIQQQQQQQQ")
IMAGE_REASON_OFFSET: Final = 640
# Bytes 1024 to 4095 are zeros, kept for reservations and SCSI state.
IMAGE_RESERVED_OFFSET: Final = 1024

IMAGE_FLAG_DELETE_AFTER_SPLIT: Final = (
    1  # on a snapshot: delete it when its last clone is separated
)

SPLIT_NONE: Final = 0
SPLIT_RUNNING: Final = 1
SPLIT_PAUSED: Final = 2
SPLIT_DONE: Final = 3
SPLIT_FAILED: Final = 4
SPLIT_CANCELLED: Final = 5
SPLIT_STATES: Final = ("none", "running", "paused", "done", "failed", "cancelled")
SPLIT_MODE_COPY: Final = 0
SPLIT_MODE_SHARE: Final = 1
SPLIT_MODES: Final = ("copy", "share")
SPLIT_FLAG_COUNTED: Final = (
    1  # holes_total and holes_remaining are exact; without it the count starts again
)

VDISK_BYTES_MIN: Final = BLOCK_BYTES
VDISK_BYTES_MAX: Final = 1 << 50

# --- Intent log -----------------------------------------------------------------------------------

RECORD_MAGIC: Final = b"cLOG"
# magic, CRC32C of the whole record with this field zero, sequence, consistency point that will hold
# these changes, durable_sequence (every record up to this one, with its data, was durable when this
# was last written), first 8 bytes of the pool UUID, entry count, length of the record in blocks
RECORD_HEAD: Final = struct.Struct("<4sIQQQ8sII")
RECORD_CRC: Final = struct.Struct("<I")
RECORD_CRC_OFFSET: Final = 4
# image number, CRC32C, FBN, VBN, run length in blocks (1 for data; any for zero pointers)
RECORD_ENTRY: Final = struct.Struct("<IIQQQ")
# The last bytes of a record's last block, which no entry reaches: bit n says that no write goes on
# from entry n to the next one. Zeros (as versions before wrote them) say nothing.
RECORD_TAIL: Final = struct.Struct("<15sB")
# A bit for each in the tail.
ENTRIES_PER_RECORD: Final = 8 * (RECORD_TAIL.size - 1)
# A write of up to so many bytes is there after a crash entirely or not at all: its entries lie in
# one record. (protocol.volume promises clients the same number.)
ATOMIC_WRITE_BYTES_MAX: Final = 128 << 10

# --- How far the counters go ----------------------------------------------------------------------

# Consistency points are counted in a u32 (the birth of a field). From the first of these on the
# pool says so; at the last it takes no more changes, with as many numbers left as nobody can need
# for reading it.
CP_WARNED_FROM: Final = 1 << 31
CP_LAST: Final = (1 << 32) - (1 << 20)
# References to one block beyond the first: what the share map can hold, and from where on nothing
# may be done that leads to more.
SHARES_MAX: Final = (1 << 32) - 1
SHARES_CROWDED: Final = 1 << 31

# --- Configuration --------------------------------------------------------------------------------

# Length of the msgpack map that follows, section name to bytes; it may go over any number of the
# metafile's blocks.
CONFIGURATION_HEAD: Final = struct.Struct("<Q")
# Targets, access lists and reservations of 100,000 vdisks fit, and it can still be replaced whole.
CONFIGURATION_BYTES_MAX: Final = 64 << 20

assert BLOCK_BYTES == 1 << BLOCK_SHIFT
assert FIELD.size == FIELD_BYTES and FIELDS_PER_BLOCK == 1 << FIELDS_SHIFT
assert SUPERBLOCK_HEAD.size <= METAFILE_ROOTS_OFFSET
assert struct.calcsize("<8sIIQQQ") == SUPERBLOCK_UUID_OFFSET
assert METAFILE_ROOTS_OFFSET + METAFILE_ROOT.size * len(METAFILES) <= OWNER_OFFSET
assert OWNER_OFFSET + OWNER.size <= SUPERBLOCK_CRC_OFFSET
assert struct.calcsize("<4sBBBB") == IMAGE_UUID_OFFSET
assert (
    IMAGE_HEAD.size <= IMAGE_NAME_OFFSET
    and IMAGE_NAME_OFFSET + NAME_BYTES_MAX <= IMAGE_SPLIT_OFFSET
)
assert IMAGE_SPLIT_OFFSET + IMAGE_SPLIT.size <= IMAGE_REASON_OFFSET
assert IMAGE_REASON_OFFSET + REASON_BYTES_MAX <= IMAGE_RESERVED_OFFSET
# One block more where the write begins or ends within one.
assert ATOMIC_WRITE_BYTES_MAX // BLOCK_BYTES + 1 <= ENTRIES_PER_RECORD
assert RECORD_HEAD.size + ENTRIES_PER_RECORD * RECORD_ENTRY.size <= BLOCK_BYTES - RECORD_TAIL.size
assert RECORD_HEAD.size == 48 and RECORD_ENTRY.size == 32
assert (BLOCK_BYTES - RECORD_HEAD.size) % RECORD_ENTRY.size == RECORD_TAIL.size


def is_superblock(block: bytes | bytearray) -> bool:
    """Whether these bytes are a superblock that is whole, of any format version."""
    if len(block) != BLOCK_BYTES or block[:8] != SUPERBLOCK_MAGIC:
        return False
    (stored,) = SUPERBLOCK_CRC.unpack_from(block, SUPERBLOCK_CRC_OFFSET)
    return bool(crc32c(memoryview(block)[:SUPERBLOCK_CRC_OFFSET]) == stored)


def tree_levels(size_blocks: int) -> int:
    """Levels of pointer blocks that a buffer tree over ``size_blocks`` blocks needs: 1 to
    TREE_LEVELS_MAX.
    """
    levels = 1
    while size_blocks > 1 << (FIELDS_SHIFT * levels):
        levels += 1
    return levels


def region_count(size_blocks: int) -> int:
    """Regions (active-map blocks) of a pool of ``size_blocks`` blocks."""
    return -(-size_blocks // REGION_BLOCKS)


def log_blocks(size_blocks: int) -> int:
    """Length of the intent log, in blocks, in a pool of ``size_blocks`` blocks: 1/64 of it, within
    the limits.
    """
    return max(LOG_BLOCKS_MIN, min(LOG_BLOCKS_MAX, size_blocks // 64))
