"""What the host's file system has set aside for a file, and what it has left. All of this blocks,
if only for a moment.

A file of which parts are not allocated (a sparse pool) can meet ENOSPC at any write there. Where a
part is allocated, written or not, ext4, xfs and tmpfs need nothing more to take a write to it. File
systems that never write in place (btrfs, zfs) may, and then a write fails anyway: the code that
writes what must not be lost tries again (storage.state.host_room).
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from mmap import mmap

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
# linux/fs.h and linux/fiemap.h: _IOWR('f', 11, struct fiemap)
FS_IOC_FIEMAP = 0xC020660B
FIEMAP_EXTENT_LAST = 0x1
FIEMAP_EXTENT_SHARED = 0x2000  # with a reflink copy: a write to it needs a block of its own
# start, length, flags, extents found, extents that there is room for, reserved
FIEMAP_HEAD = struct.Struct("=QQIIII")
# logical start, physical start, length, reserved, flags, reserved
FIEMAP_EXTENT = struct.Struct("=QQQ16xI12x")
FIEMAP_EXTENTS = 512
# linux/mman.h
MADV_POPULATE_WRITE = 23
NOT_KNOWN_ERRNOS = frozenset((errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL))

# Python has posix_fallocate only, which cannot punch, and writes zeros where the file system cannot
# allocate. ctypes gives up the interpreter lock during the call.
_FALLOCATE = ctypes.CDLL(None, use_errno=True).fallocate
_FALLOCATE.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_FALLOCATE.restype = ctypes.c_int

Range = tuple[int, int]


def _fallocate(descriptor: int, mode: int, offset_bytes: int, length_bytes: int) -> None:
    while _FALLOCATE(descriptor, mode, offset_bytes, length_bytes) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def punch_hole(descriptor: int, offset_bytes: int, length_bytes: int) -> None:
    """Give the range back to the file system; the size stays (fallocate(2)). Raises OSError."""
    _fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset_bytes, length_bytes)


def allocate(descriptor: int, offset_bytes: int, length_bytes: int) -> None:
    """Have the file system allocate what of the range is not, within the file; the content stays
    (fallocate(2)). Raises OSError.

    After ENOSPC a part of the range may be allocated.
    """
    _fallocate(descriptor, FALLOC_FL_KEEP_SIZE, offset_bytes, length_bytes)


def available_bytes(descriptor: int) -> int | None:
    """What the file system has left for this process, or None where it does not say (fstatvfs(3)).

    Not what ext4 keeps for root, nor for its own metadata. A quota does not show here.
    """
    try:
        found = os.fstatvfs(descriptor)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def populate(descriptor: int, offset_bytes: int, length_bytes: int) -> None:
    """Have tmpfs fill in what it has allocated, and keep the content (madvise(2)): else
    ``allocated_ranges`` would not find it again.
    """
    with suppress(OSError), mmap(descriptor, length_bytes, offset=offset_bytes) as view:
        view.madvise(
            MADV_POPULATE_WRITE
        )  # EINVAL before Linux 5.14: then it is found only once it was written


def allocated_ranges(descriptor: int, offset_bytes: int, length_bytes: int) -> Iterator[Range]:
    """The parts (first byte, end) of the range that the file system has allocated, written or not.
    Raises OSError.

    Where it cannot tell (tmpfs), those that were written: fewer, never more.
    """
    try:
        yield from _extents(descriptor, offset_bytes, offset_bytes + length_bytes)
    except OSError as error:
        if error.errno not in NOT_KNOWN_ERRNOS:
            raise
        yield from _written(descriptor, offset_bytes, offset_bytes + length_bytes)


def _extents(descriptor: int, start: int, end: int) -> Iterator[Range]:
    buffer = bytearray(FIEMAP_HEAD.size + FIEMAP_EXTENTS * FIEMAP_EXTENT.size)
    while start < end:
        FIEMAP_HEAD.pack_into(buffer, 0, start, end - start, 0, 0, FIEMAP_EXTENTS, 0)
        fcntl.ioctl(descriptor, FS_IOC_FIEMAP, buffer)
        count = FIEMAP_HEAD.unpack_from(buffer)[3]
        for number in range(count):
            first, _, length, flags = FIEMAP_EXTENT.unpack_from(
                buffer, FIEMAP_HEAD.size + number * FIEMAP_EXTENT.size
            )
            if not flags & FIEMAP_EXTENT_SHARED:
                yield max(first, start), min(first + length, end)
            if flags & FIEMAP_EXTENT_LAST:
                return
        if count < FIEMAP_EXTENTS:
            return
        start = first + length


def _written(descriptor: int, start: int, end: int) -> Iterator[Range]:
    """lseek(2), SEEK_DATA. The file offset is of no use to anybody else: all transfers
    name theirs.
    """
    while start < end:
        try:
            first = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing more up to the end of the file
            raise
        start = os.lseek(descriptor, first, os.SEEK_HOLE)
        if first < end:
            yield first, min(start, end)
