"""Errors of an NBD connection, and the protocol's value for what a volume reports."""

import errno
from typing import Final

from protocol.nbd import limits, wire

_VALUES: Final = {
    errno.EPERM: wire.EPERM,
    errno.EACCES: wire.EPERM,
    errno.EROFS: wire.EPERM,
    errno.EIO: wire.EIO,
    errno.ENOMEM: wire.ENOMEM,
    errno.EINVAL: wire.EINVAL,
    errno.ENOENT: wire.EINVAL,
    errno.EOPNOTSUPP: wire.EINVAL,
    errno.ENOSPC: wire.ENOSPC,
    errno.EDQUOT: wire.ENOSPC,
    errno.EFBIG: wire.ENOSPC,
    errno.ESHUTDOWN: wire.ESHUTDOWN,
}


def error_value(number: int) -> int:
    """The value that the document has for an ``errno`` ("Error values"): NBD_EIO where it has
    none.
    """
    return _VALUES.get(number, wire.EIO)


def error_of(error: Exception) -> int:
    """The value for what a volume gave to a completion, or raised."""
    if isinstance(error, RequestRefused):
        return error.error
    number = getattr(error, "errno", None)
    return error_value(number) if isinstance(number, int) else wire.EIO


def message_bytes(message: str) -> bytes:
    """A message for people, as an error reply carries it."""
    cut = message.encode(errors="replace")[: limits.MESSAGE_BYTES_MAX]
    return cut.decode(errors="ignore").encode()


class NbdError(Exception):
    """Root of what a peer's bytes can raise inside the protocol; `NbdConnection` catches it and
    ends that connection.
    """


class ProtocolError(NbdError):
    """The peer broke the protocol so that the stream cannot be followed, or broke it where there is
    no reply to say so in: a hard disconnect.
    """


class OptionRefused(NbdError):
    """An option is answered with this error reply; the handshake goes on."""

    def __init__(self, reply_type: int, message: str) -> None:
        super().__init__(message)
        self.reply_type = reply_type


class RequestRefused(NbdError):
    """A request is answered with this error; the transmission goes on."""

    def __init__(self, error: int, message: str) -> None:
        super().__init__(message)
        self.error = error
