"""Turns what the operating system says of a device into the errors of `storage`."""

import errno

from storage.errors import DeviceFailed, DeviceFull

# EDQUOT: a quota is, to a pool, a full file system.
FULL_ERRNOS = frozenset((errno.ENOSPC, errno.EDQUOT))


def device_error(path: str, action: str, error: OSError) -> DeviceFailed:
    """The error to raise (from ``error``) when ``action`` ("read 4096 bytes at 8192") failed on the
    device at ``path``.
    """
    if error.errno in FULL_ERRNOS:
        failure: DeviceFailed = DeviceFull(
            f"{path}: cannot {action}: {error.strerror}; free space where this file or volume is"
            " kept, then write again"
        )
    elif error.errno == errno.EBADF:
        failure = DeviceFailed(
            f"{path}: cannot {action}: the device is closed, or was opened read-only"
        )
    else:
        failure = DeviceFailed(
            f"{path}: cannot {action}: {error.strerror or error}; the host's kernel log may say"
            " more"
        )
    failure.__cause__ = error
    return failure
