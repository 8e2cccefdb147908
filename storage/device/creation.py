"""Makes what a new pool stands on: a file that gets its name when the pool in it is whole and
durable, or a block device.

A file is made under another name in the same folder, ``.NAME.creating``, and locked. If its creator
dies, that name is left behind without a lock, and the next creation of the same pool removes it. A
device says itself that its pool is unfinished (storage.layout).
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterator

from storage.device.descriptor import DescriptorDevice
from storage.device.failures import device_error
from storage.device.file import FILE_MODE, FileDevice
from storage.device.opening import open_device
from storage.device.raw import BlockDevice
from storage.device.signatures import contents_of
from storage.errors import Conflict, DeviceFull, PoolLocked, PoolRefused, RequestError

LOG = logging.getLogger(__name__)

# linux/fs.h
RENAME_NOREPLACE = 1
AT_FDCWD = -100
# File systems that do not know the flag (NFS), and kernels or C libraries that do not know the
# call.
NO_RENAMEAT2 = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP))
# Each turn means that another process removed the name in between; that does not happen for ever.
ATTEMPTS = 10


def is_block_device(path: str) -> bool:
    """Whether the path leads to a block device now."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def is_vacant(path: str) -> bool:
    """Whether a pool can be made there and nobody asked: nothing has that name, or it is a block
    device that holds nothing.
    """
    if not os.path.lexists(path):
        return True
    try:
        return is_block_device(path) and contents_of(path) is None
    except OSError:
        return False  # opening it says why it cannot be read


@contextlib.contextmanager
def new_device(
    path: str, size_bytes: int | None, *, overwrite: bool = False
) -> Iterator[DescriptorDevice]:
    """A device to make a pool on, locked; it gets its name when the block ends. After an error
    nothing is there that was not before.

    ``size_bytes``: None for the whole of a block device. ``overwrite``: what is there goes. Raises
    Conflict (something is there), PoolLocked (it is in use), RequestError (size), PoolRefused,
    DeviceFull.
    """
    make = _on_block_device if is_block_device(path) else _in_file
    with make(path, size_bytes, overwrite=overwrite) as device:
        yield device


@contextlib.contextmanager
def _on_block_device(
    path: str, size_bytes: int | None, *, overwrite: bool
) -> Iterator[DescriptorDevice]:
    device = open_device(path)
    try:
        assert isinstance(device, BlockDevice)
        if size_bytes is not None and size_bytes > device.size_bytes:
            raise RequestError(
                f"{path} has {device.size_bytes} bytes, fewer than {size_bytes}: give a smaller"
                " size, or none"
            )
        found = _contents(path)
        if found is not None and not overwrite:
            raise Conflict(
                f"{path} holds {found}: choose another, or destroy what is there: `cleaved create"
                f" {path} --overwrite`"
            )
        yield device
    finally:
        device.close()


def _contents(path: str) -> str | None:
    try:
        return contents_of(path)
    except OSError as error:
        raise PoolRefused(
            f"{path} cannot be read: {error.strerror}; see the host's kernel log"
        ) from error


@contextlib.contextmanager
def _in_file(path: str, size_bytes: int | None, *, overwrite: bool) -> Iterator[DescriptorDevice]:
    if size_bytes is None:
        raise RequestError(
            f"{path} needs a size, as in --size 64GiB: only a block device has one of its own"
        )
    with contextlib.ExitStack() as stack:
        if os.path.lexists(path):
            if not overwrite:
                raise _exists(path)
            remove_leftover(os.path.realpath(path))  # which may be another name of this very file
            replaced = open_device(path)  # so that nobody has it open as a pool
            stack.callback(replaced.close)
        real_path = os.path.realpath(path) if overwrite else path
        temporary = _temporary_name(real_path)
        device = _temporary_device(temporary, path, size_bytes)
        stack.callback(device.close)
        with _removed_on_failure(temporary):
            yield device
            _name(temporary, real_path, overwrite=overwrite)
        try:
            sync_folder_of(real_path)
        except OSError as error:
            raise device_error(path, "make its name durable", error) from error


def _temporary_name(path: str) -> str:
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.creating")


def remove_leftover(path: str) -> None:
    """Remove what a creator that died may have left beside the pool at ``path``. Raises PoolLocked:
    it is at work.
    """
    try:
        _remove_leftover(_temporary_name(path), path)
    except OSError as error:
        LOG.info("%s: what an interrupted creation left behind cannot be removed: %s", path, error)


def _exists(path: str) -> Conflict:
    if os.path.isfile(path):
        held = f"holds {_contents(path) or 'no pool: it is empty, or its creation was interrupted'}"
    else:
        held = "is no file"
    return Conflict(
        f"{path} exists already, and {held}; choose another path, remove it,"
        f" or replace it with `cleaved create {path} --size SIZE --overwrite`"
    )


def _temporary_device(temporary: str, path: str, size_bytes: int) -> FileDevice:
    """The new file, locked and of its size. It names ``path`` in its messages, for that is what
    people know.
    """
    try:
        descriptor = _locked_new_file(temporary, path)
    except OSError as error:
        raise PoolRefused(
            f"{path} cannot be created: {error.strerror}; choose a folder that exists and may be"
            " written"
        ) from error
    try:
        with _removed_on_failure(temporary):
            os.ftruncate(descriptor, size_bytes)
            return FileDevice(path, descriptor)
    except OSError as error:
        os.close(descriptor)
        failure = device_error(path, f"make a file of {size_bytes} bytes", error)
        if isinstance(failure, DeviceFull):
            raise failure from error
        # EFBIG: ext4 ends at 16 TiB, for one.
        raise PoolRefused(
            f"{path} cannot have {size_bytes} bytes: {error.strerror}; choose a smaller size or"
            " other file system"
        ) from error


def _locked_new_file(temporary: str, path: str) -> int:
    for _ in range(ATTEMPTS):
        try:
            descriptor = os.open(
                temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, FILE_MODE
            )
        except FileExistsError:
            _remove_leftover(temporary, path)
            continue
        # Until it is locked, another process may take it for a leftover and remove it: then it has
        # no name any more.
        if _locks(descriptor) and _is_named(descriptor, temporary):
            return descriptor
        os.close(descriptor)
    raise _being_created(temporary, path)


def _remove_leftover(temporary: str, path: str) -> None:
    """Remove what a dead creator left behind: the name alone, for on some file systems it may be a
    second name of a pool that is whole.
    """
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        if not _locks(descriptor):
            raise _being_created(temporary, path)
        if _is_named(descriptor, temporary):
            os.unlink(temporary)
            LOG.info(
                "%s: removed %s, which an interrupted creation had left behind", path, temporary
            )
    finally:
        os.close(descriptor)


def _being_created(temporary: str, path: str) -> PoolLocked:
    return PoolLocked(
        f"{path} is being created by another process (it has {temporary} open); wait for it, or"
        " stop it and try again"
    )


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _removed_on_failure(temporary: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _name(temporary: str, path: str, *, overwrite: bool) -> None:
    """Give the file its name; without ``overwrite`` only if nothing has that. Raises Conflict,
    PoolRefused.
    """
    try:
        if overwrite:
            os.rename(temporary, path)
        else:
            rename_without_replacing(temporary, path)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise PoolRefused(
            f"{path} cannot be created: {error.strerror}; choose another folder"
        ) from error


def rename_without_replacing(source: str, target: str) -> None:
    """Rename, if nothing has the new name. Raises FileExistsError, OSError."""
    try:
        _renameat2(source, target)
    except OSError as error:
        if error.errno not in NO_RENAMEAT2:
            raise
        os.link(source, target, follow_symlinks=False)
        os.unlink(source)


def _renameat2(source: str, target: str) -> None:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError as error:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), source, None, target)


def sync_folder_of(path: str) -> None:
    """Make the file's name durable (fsync(2): the file's own fsync does not). Raises OSError."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
