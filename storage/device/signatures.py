"""What stands on a file or device, by the marks that file systems, volume managers and the like
leave at known places.

So that a pool is not made over data by mistake. The table has the common ones; what is not in it
counts as data of an unknown kind as soon as one byte of the first or the last MiB is not zero.
Marks are those of libblkid (util-linux) and of the formats themselves.
"""

import os
from typing import NamedTuple

from storage.layout import BLOCK_BYTES, SUPERBLOCK_MAGIC, UNFINISHED_MAGIC, is_superblock

# All marks lie within so many bytes of the begin (VMFS is the farthest) or of the end.
HEAD_BYTES = (1 << 20) + BLOCK_BYTES
TAIL_BYTES = 1 << 20
UNKNOWN = "data of an unknown kind"


class Mark(NamedTuple):
    """``magic`` at any of these offsets in bytes; below zero: from the end."""

    what: str
    magic: bytes
    offsets: tuple[int, ...]


ZFS_LABEL_BYTES = 256 << 10
# A label holds 128 uberblocks of 1 KiB from its second half on; two labels stand at the begin, two
# at the end, on whole label lengths.
ZFS_UBERBLOCKS = tuple(range(128 << 10, 256 << 10, 1024))
ZFS_MAGICS = (b"\x0c\xb1\xba\x00\x00\x00\x00\x00", b"\x00\x00\x00\x00\x00\xba\xb1\x0c")
ZFS = "a ZFS pool"
RAID_MAGIC = b"\xfc\x4e\x2b\xa9"
RAID = "a member of a Linux RAID (md)"

MARKS = (
    Mark("a cleaved pool", SUPERBLOCK_MAGIC, (0, BLOCK_BYTES)),
    Mark("LUKS encryption", b"LUKS\xba\xbe", (0,)),
    Mark("LUKS encryption", b"SKUL\xba\xbe", tuple(1 << shift for shift in range(14, 20))),
    Mark("an LVM physical volume", b"LABELONE", (0, 512, 1024, 1536)),
    Mark(RAID, RAID_MAGIC, (0, 4096)),
    *(
        Mark(ZFS, magic, (*ZFS_UBERBLOCKS, *(ZFS_LABEL_BYTES + at for at in ZFS_UBERBLOCKS)))
        for magic in ZFS_MAGICS
    ),
    Mark("Ceph BlueStore", b"bluestore block device", (0,)),
    Mark("a VDO volume", b"dmvdo001", (0,)),
    Mark("dm-integrity", b"integrt\x00", (0,)),
    Mark(
        "a bcache device",
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
        (4096 + 24,),
    ),
    Mark(
        "a bcachefs file system",
        b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef",
        (4096 + 24,),
    ),
    Mark("an Oracle ASM disk", b"ORCLDISK", (32,)),
    Mark("a VMFS volume", b"\x0d\xd0\x01\xc0", (1 << 20,)),
    Mark("swap space", b"SWAPSPACE2", (4096 - 10, 16384 - 10, 65536 - 10)),
    Mark("swap space", b"SWAP-SPACE", (4096 - 10, 65536 - 10)),
    Mark("an XFS file system", b"XFSB", (0,)),
    Mark("an ext2, ext3 or ext4 file system", b"\x53\xef", (1080,)),
    Mark("a btrfs file system", b"_BHRfS_M", (65536 + 64,)),
    Mark("an F2FS file system", b"\x10\x20\xf5\xf2", (1024,)),
    Mark("a JFS file system", b"JFS1", (32768,)),
    Mark("a ReiserFS file system", b"ReIsEr", (65536 + 52, 8192 + 52)),
    Mark("a GFS2 file system", b"\x01\x16\x19\x70", (65536,)),
    Mark("an OCFS2 file system", b"OCFSV2", (1024, 2048, 4096, 8192)),
    Mark("a NILFS2 file system", b"\x34\x34", (1024 + 6,)),
    Mark("an APFS container", b"NXSB", (32,)),
    Mark("an HFS+ file system", b"H+\x00\x04", (1024,)),
    Mark("an HFS+ file system", b"HX\x00\x05", (1024,)),
    Mark("an EROFS file system", b"\xe2\xe1\xf5\xe0", (1024,)),
    Mark("a squashfs file system", b"hsqs", (0,)),
    Mark("an ISO 9660 or UDF file system", b"CD001", (32769,)),
    Mark("a UDF file system", b"BEA01", (32769,)),
    Mark("an NTFS file system", b"NTFS    ", (3,)),
    Mark("BitLocker encryption", b"-FVE-FS-", (3,)),
    Mark("an exFAT file system", b"EXFAT   ", (3,)),
    Mark("a FAT file system", b"FAT12   ", (54,)),
    Mark("a FAT file system", b"FAT16   ", (54,)),
    Mark("a FAT file system", b"FAT32   ", (82,)),
    Mark("a qcow2 image", b"QFI\xfb", (0,)),
    Mark("a partition table (GPT)", b"EFI PART", (512, 4096, -512, -4096)),
    # Last: boot sectors of file systems end the same way.
    Mark("a partition table (MBR) or boot sector", b"\x55\xaa", (510,)),
)


def contents_of(path: str) -> str | None:
    """What the file or device holds, in words. None: nothing that anybody could miss: it is blank
    (the first and the last MiB are zeros), or a creation of a pool was interrupted there. Raises
    OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
        head = os.pread(descriptor, HEAD_BYTES, 0)
        tail_at = max(0, size_bytes - TAIL_BYTES)
        return identify(head, os.pread(descriptor, TAIL_BYTES, tail_at), size_bytes)
    finally:
        os.close(descriptor)


def identify(head: bytes, tail: bytes, size_bytes: int) -> str | None:
    """``contents_of`` of the first HEAD_BYTES and the last TAIL_BYTES of something so large."""
    if head.startswith(UNFINISHED_MAGIC) and not is_superblock(head[BLOCK_BYTES : 2 * BLOCK_BYTES]):
        return None
    for mark in (*MARKS, *_marks_by_size(size_bytes)):
        if any(_stands_at(mark.magic, offset, head, tail, size_bytes) for offset in mark.offsets):
            return mark.what
    return UNKNOWN if any(head) or any(tail) else None


def _marks_by_size(size_bytes: int) -> list[Mark]:
    """Marks whose place depends on the size: md 1.0 and 0.90 (md(4)), and the two ZFS labels at the
    end.
    """
    raid = (((size_bytes >> 9) - 16 & ~7) << 9, (size_bytes & ~0xFFFF) - 0x10000)
    end = size_bytes - size_bytes % ZFS_LABEL_BYTES
    labels = (end - 2 * ZFS_LABEL_BYTES, end - ZFS_LABEL_BYTES)
    marks = [
        Mark(
            ZFS, magic, tuple(label + at - size_bytes for label in labels for at in ZFS_UBERBLOCKS)
        )
        for magic in ZFS_MAGICS
    ]
    return [Mark(RAID, RAID_MAGIC, tuple(at - size_bytes for at in raid)), *marks]


def _stands_at(magic: bytes, offset: int, head: bytes, tail: bytes, size_bytes: int) -> bool:
    """Below zero: so far from the end."""
    if offset >= 0:
        return head.startswith(magic, offset)
    at = len(tail) + offset
    return at >= 0 and tail.startswith(magic, at) and -offset <= size_bytes
