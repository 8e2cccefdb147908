"""Listening on a Unix socket: its permissions from the first moment, and what a dead daemon left
behind.
"""

import errno
import os
import socket
import stat
from typing import Final

SOCKET_MODE: Final = 0o660


class UnixPathBusy(Exception):
    """The path cannot be listened on; the message says why and what to do."""


def bind(path: str, what: str, option: str) -> socket.socket:
    """A bound socket with SOCKET_MODE from its first moment. What a dead daemon left behind is
    removed. Messages name the path as ``what`` and the command line's ``option``. Raises
    UnixPathBusy.
    """
    _remove_stale(path, what, option)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o777 & ~SOCKET_MODE)
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise UnixPathBusy(
            f"cannot listen on {what} {path}: {error.strerror}; choose another with {option}, or"
            " create its directory"
        ) from error
    finally:
        os.umask(mask)
    return listener


def identity(path: str) -> tuple[int, int]:
    """Which file the path is. Raises OSError."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def remove(path: str, bound: tuple[int, int]) -> None:
    """Remove the socket, unless somebody put another in its place."""
    try:
        found = identity(path)
    except FileNotFoundError:
        return
    if found == bound:
        os.unlink(path)


def _remove_stale(path: str, what: str, option: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # nothing there, or not to be seen: bind will say
    if not stat.S_ISSOCK(mode):
        raise UnixPathBusy(
            f"{what} {path} exists and is no socket; choose another with {option}, or remove it"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise UnixPathBusy(
                f"{what} {path} is served by another daemon; choose another with {option}, or stop"
                " that one"
            )
    os.unlink(path)
