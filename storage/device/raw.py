"""A pool on a raw block device: opened exclusively, so that neither a mount nor another daemon can
use it at the same time.
"""

import errno
import fcntl
import logging
import os
import struct

from storage.device.descriptor import DescriptorDevice
from storage.device.failures import device_error
from storage.errors import OutOfRange

LOG = logging.getLogger(__name__)

# linux/fs.h: _IO(0x12, 119), _IO(0x12, 104)
BLKDISCARD = 0x1277
BLKSSZGET = 0x1268
DISCARD_RANGE = struct.Struct("=QQ")


class BlockDevice(DescriptorDevice):
    """A raw block device, as ``open_device`` opened and locked it."""

    __slots__ = ("_can_discard", "_logical_block_bytes")

    def __init__(self, path: str, descriptor: int) -> None:
        """Take over ``descriptor``."""
        super().__init__(path, descriptor, device_size_bytes(descriptor))
        (self._logical_block_bytes,) = struct.unpack(
            "=i", fcntl.ioctl(descriptor, BLKSSZGET, bytes(4))
        )
        self._can_discard = True

    def _discard(self, offset_bytes: int, length_bytes: int) -> None:
        # The kernel refuses (EINVAL) what is no multiple of the device's own blocks: 4096 bytes on
        # some disks.
        block_bytes = self._logical_block_bytes
        start = -(-offset_bytes // block_bytes) * block_bytes
        end = (offset_bytes + length_bytes) // block_bytes * block_bytes
        if not self._can_discard or start >= end:
            return
        try:
            fcntl.ioctl(self._descriptor, BLKDISCARD, DISCARD_RANGE.pack(start, end - start))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise device_error(
                    self._path, f"discard {length_bytes} bytes at byte {offset_bytes}", error
                ) from error
            self._can_discard = False
            LOG.info(
                "%s: the device knows no discard; freed blocks are not given back to it", self._path
            )

    def _reserve(self, offset_bytes: int, length_bytes: int) -> None:
        """A volume that is thin itself tells nobody what it has set aside, and takes no orders."""

    def _backed(self, span: tuple[int, int], found: list[tuple[int, int]]) -> None:
        found.append((span[0], sum(span)))

    def _grow(self, size_bytes: int, _: None) -> None:
        try:
            device_bytes = device_size_bytes(self._descriptor)
        except OSError as error:
            raise device_error(self._path, "find out its size", error) from error
        if size_bytes < self._size_bytes:
            raise OutOfRange(
                f"{self._path}: has {self._size_bytes} bytes, and a device cannot shrink to"
                f" {size_bytes}"
            )
        if size_bytes > device_bytes:
            raise OutOfRange(
                f"{self._path}: has {device_bytes} bytes, fewer than {size_bytes}; enlarge the"
                " device first (with lvextend, for one)"
            )
        self._size_bytes = device_bytes


def device_size_bytes(descriptor: int) -> int:
    """Size of an open block device as it is now (lseek(2) to the end asks the kernel afresh).
    Raises OSError.
    """
    return os.lseek(descriptor, 0, os.SEEK_END)
