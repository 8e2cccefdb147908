"""Opens what a path names as a device, locked: an ordinary file or a raw block device."""

import errno
import fcntl
import os
import stat
from time import sleep

from storage.device.descriptor import DescriptorDevice
from storage.device.file import FileDevice
from storage.device.pool_lock import close_all, lock_pool
from storage.device.raw import BlockDevice
from storage.errors import PoolLocked, PoolRefused

# udev holds a shared lock on a block device while it looks what is on it, which it does whenever a
# writer closes one: also at the restart of this daemon (systemd.io/BLOCK_DEVICE_LOCKING). It is
# done within a fraction of a second.
UDEV_ATTEMPTS = 20
UDEV_PAUSE_SECONDS = 0.05

NEXT_STEPS = {
    errno.ENOENT: "check the path, or create a pool there first",
    errno.ENOTDIR: "check the path",
    errno.EACCES: "run as a user who may read and write it, or change its owner",
    errno.EPERM: "run as a user who may read and write it, or change its owner",
    errno.EROFS: "remount its file system read-write, or use it read-only",
    errno.ENXIO: "attach the device first",
    errno.ENOMEDIUM: "attach the device first",
}


def open_device(path: str, *, read_only: bool = False) -> DescriptorDevice:
    """Open and lock: the file or device, and the pool on it by its UUID. ``read_only``: with shared
    locks, and every write fails.

    Blocks for a moment. Raises PoolRefused (missing, a folder, no permission, ...), PoolLocked
    (another process has it); then nothing was changed.
    """
    descriptor = _open(path, read_only=read_only)
    try:
        is_block_device = stat.S_ISBLK(os.fstat(descriptor).st_mode)
        _lock(path, descriptor, shared=read_only, attempts=UDEV_ATTEMPTS if is_block_device else 1)
        pool_lock = lock_pool(path, descriptor, shared=read_only)
    except OSError as error:
        os.close(descriptor)
        raise PoolRefused(
            f"{path} cannot be used: {error.strerror}; see the host's kernel log"
        ) from error
    except BaseException:
        os.close(descriptor)
        raise
    return _as_device(path, descriptor, pool_lock, is_block_device=is_block_device)


def _as_device(
    path: str, descriptor: int, pool_lock: list[int], *, is_block_device: bool
) -> DescriptorDevice:
    try:
        device = BlockDevice(path, descriptor) if is_block_device else FileDevice(path, descriptor)
        device.hold(pool_lock)
        return device
    except OSError as error:
        close_all([descriptor, *pool_lock])
        raise PoolRefused(
            f"{path} cannot be used: {error.strerror}; see the host's kernel log"
        ) from error
    except BaseException:
        close_all([descriptor, *pool_lock])
        raise


def _open(path: str, *, read_only: bool) -> int:
    try:
        mode = os.stat(path).st_mode
        # Looked at before it is opened: opening a FIFO blocks, and opening a tape rewinds it.
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            kind = "a folder" if stat.S_ISDIR(mode) else "neither a file nor a block device"
            raise PoolRefused(f"{path} is {kind}; name the pool's file or block device")
        # O_EXCL without O_CREAT means to a block device: no mount, no swap, no other user who asks
        # for the same (open(2)).
        exclusive = os.O_EXCL if stat.S_ISBLK(mode) and not read_only else 0
        return os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | exclusive)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise PoolLocked(
                f"{path} is in use (mounted, or opened by another process); unmount it or stop that"
                " process"
            ) from error
        next_step = NEXT_STEPS.get(error.errno or 0, "see the host's kernel log")
        raise PoolRefused(f"{path} cannot be opened: {error.strerror}; {next_step}") from error


def _lock(path: str, descriptor: int, *, shared: bool, attempts: int) -> None:
    """Take the lock that keeps two daemons from one pool; closing the descriptor gives it up.
    Raises PoolLocked, PoolRefused.
    """
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    for attempt in range(attempts):
        try:
            if attempt:
                sleep(UDEV_PAUSE_SECONDS)
            return fcntl.flock(descriptor, operation)
        except BlockingIOError:
            continue
        except OSError as error:
            raise PoolRefused(
                f"{path} cannot be locked: {error.strerror}; keep pools on a file system that knows"
                " flock"
            ) from error
    raise PoolLocked(
        f"{path} is in use by another process; stop that daemon or check first (`fuser {path}`"
        " names it)"
    )
