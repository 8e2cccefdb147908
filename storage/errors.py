"""Errors of the store. Each class carries ``errno``, from which the wire protocols make their
status.

The tree has three branches: what the caller asked for cannot be (RequestError), the device or the
data on it failed (DeviceFailed, BlockDamaged), and what a pool cannot do in its
present state (PoolFull, HostFull, PoolReadOnly).
"""

import errno


class StorageError(Exception):
    """Root of all errors that `storage` raises on purpose. The message says the cause and the next
    step.
    """

    errno: int = errno.EIO
    # Of a read that failed: the first byte of the volume that could not be read, where that is
    # known.
    offset_bytes: int | None = None


class RequestError(StorageError):
    """The caller asked for something that cannot be; nothing was changed."""

    errno = errno.EINVAL


class NotFound(RequestError):
    """No vdisk, snapshot or split of that name."""

    errno = errno.ENOENT


class Conflict(RequestError):
    """It exists already, or something that the message names blocks it."""

    errno = errno.EBUSY


class OutOfRange(RequestError):
    """The range does not lie within the volume."""

    errno = errno.EINVAL


class NotByReference(RequestError):
    """A copy by reference was asked for between volumes of different pools: the data has to be
    copied.
    """

    errno = errno.EOPNOTSUPP


class PoolFull(StorageError):
    """No free block is left for this write; reads, deletes and consistency points still work."""

    errno = errno.ENOSPC

    def __init__(self, message: str, missing_blocks: int = 1) -> None:
        """``missing_blocks``: how many more would have to come free, where that is known."""
        super().__init__(message)
        self.missing_blocks = missing_blocks


class HostFull(PoolFull):
    """The file system (or thin volume) that the pool lies on has no room for this change, and what
    is kept for deletes is not for it.

    ``missing_blocks``: how many the node stock would have to hold.
    """


class HostStaysFull(StorageError):
    """The pool is closing, and the host has no room for the last consistency point: what waits for
    that was not made.
    """

    errno = errno.ENOSPC


class PoolReadOnly(StorageError):
    """The pool stopped taking writes (a failed sync, a damaged intent log, an unknown ro_compat
    feature), or the volume is a snapshot.
    """

    errno = errno.EROFS


class VolumeClosed(StorageError):
    """The volume was deleted or the pool is closing."""

    errno = errno.ESHUTDOWN


class DeviceFailed(StorageError):
    """The device refused a read, a write or a sync. ``__cause__`` is what the operating system said
    of it.
    """

    errno = errno.EIO


class DeviceFull(DeviceFailed):
    """The device's own backing (the host file system, a thin volume) has no space left for this
    write.
    """

    errno = errno.ENOSPC


class BlockDamaged(StorageError):
    """A block's CRC32C is not the one that its pointer holds: bit rot, a misdirected or a lost
    write.
    """

    errno = errno.EIO


class PoolRefused(StorageError):
    """The file or device cannot be opened as a pool: not one, a newer format, truncated, or locked.
    It was not touched.
    """

    errno = errno.EINVAL


class NoPool(PoolRefused):
    """Nothing on the file or device says that a pool is there."""

    errno = errno.EINVAL


class PoolLocked(PoolRefused):
    """Another process has the pool open."""

    errno = errno.EBUSY


def as_storage_error(error: Exception) -> StorageError:
    """``error`` itself, or for a mistake of ours (a KeyError, say) a StorageError that names it:
    what a completion can be given.
    """
    if isinstance(error, StorageError):
        return error
    wrapped = StorageError(
        f"internal error ({type(error).__name__}: {error}): please report it, with the log"
    )
    wrapped.__cause__ = error
    return wrapped
