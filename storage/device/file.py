"""A pool in an ordinary file: sparse, discards punch holes, the whole file is locked (flock(2))."""

import errno
import logging
import os

from storage.device.descriptor import DescriptorDevice
from storage.device.failures import device_error
from storage.device.host_space import (
    allocate,
    allocated_ranges,
    available_bytes,
    populate,
    punch_hole,
)
from storage.errors import OutOfRange

LOG = logging.getLogger(__name__)

# Punching holds the file's lock, and inline writes wait for that: in steps they get their turn in
# between.
DISCARD_STEP_BYTES = 64 * 1024 * 1024
MEMORY_FILE_SYSTEMS = frozenset(("tmpfs", "ramfs"))
# Data of all clients stands in it: for the daemon's user alone.
FILE_MODE = 0o600


class FileDevice(DescriptorDevice):
    """An ordinary file, as ``open_device`` opened and locked it."""

    __slots__ = ("_can_punch", "_can_reserve")

    def __init__(self, path: str, descriptor: int) -> None:
        """Take over ``descriptor``."""
        in_memory = file_system_type(descriptor) in MEMORY_FILE_SYSTEMS
        super().__init__(path, descriptor, os.fstat(descriptor).st_size, in_memory=in_memory)
        self._can_punch = True
        self._can_reserve = True

    @property
    def thin(self) -> bool:
        """See Device. A file has holes, or may get some, unless its file system knows
        no fallocate.
        """
        return self._can_reserve

    def host_available_bytes(self) -> int | None:
        """See Device."""
        return available_bytes(self._descriptor)

    def _reserve(self, offset_bytes: int, length_bytes: int) -> None:
        if not self._can_reserve:
            return
        try:
            allocate(self._descriptor, offset_bytes, length_bytes)
            if self._in_memory:
                populate(self._descriptor, offset_bytes, length_bytes)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise device_error(
                    self._path, f"reserve {length_bytes} bytes at byte {offset_bytes}", error
                ) from error
            self._can_reserve = False
            LOG.info(
                "%s: its file system cannot allocate beforehand; when it is full, consistency"
                " points wait for room",
                self._path,
            )

    def _backed(self, span: tuple[int, int], found: list[tuple[int, int]]) -> None:
        try:
            found.extend(allocated_ranges(self._descriptor, *span))
        except OSError as error:
            raise device_error(
                self._path, f"find what is allocated at byte {span[0]}", error
            ) from error

    def _discard(self, offset_bytes: int, length_bytes: int) -> None:
        end_bytes = offset_bytes + length_bytes
        try:
            for start in range(offset_bytes, end_bytes, DISCARD_STEP_BYTES):
                if not self._can_punch:
                    return
                punch_hole(self._descriptor, start, min(DISCARD_STEP_BYTES, end_bytes - start))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise device_error(
                    self._path, f"discard {length_bytes} bytes at byte {offset_bytes}", error
                ) from error
            self._can_punch = False
            LOG.info(
                "%s: its file system cannot punch holes; freed blocks stay allocated in the file",
                self._path,
            )

    def _grow(self, size_bytes: int, _: None) -> None:
        if size_bytes < self._size_bytes:
            raise OutOfRange(
                f"{self._path}: has {self._size_bytes} bytes, and a device cannot shrink to"
                f" {size_bytes}"
            )
        try:
            os.ftruncate(self._descriptor, size_bytes)
            os.fsync(self._descriptor)
        except OSError as error:
            raise device_error(self._path, f"grow to {size_bytes} bytes", error) from error
        self._size_bytes = size_bytes


def file_system_type(descriptor: int) -> str:
    """Name of the file system that holds the open file ("ext4"), or "" where /proc does not tell
    (proc(5), mountinfo).
    """
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            return next(
                (
                    line.split(" - ", 1)[1].split()[0]
                    for line in mounts
                    if line.split()[2] == number
                ),
                "",
            )
    except OSError as error:
        LOG.info("the type of the file system is not known: %s", error)
        return ""
