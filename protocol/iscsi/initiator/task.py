"""Requests of our initiator that are under way, and how they end."""

from collections.abc import Callable
from typing import Final

from protocol.iscsi.errors import IscsiError
from protocol.iscsi.pdu import Pdu
from protocol.volume import Buffer

_DESCRIPTOR_FORMAT: Final = 0x72
_FORMAT_MASK: Final = 0x7E


class CommandFailed(IscsiError):
    """A SCSI command ended with another status than GOOD. ``key``, ``asc`` and ``ascq`` are 0 where
    there are no sense data.
    """

    def __init__(self, status: int, sense: bytes) -> None:
        self.status = status
        self.sense = sense
        if len(sense) >= 4 and sense[0] & _FORMAT_MASK == _DESCRIPTOR_FORMAT:
            self.key, self.asc, self.ascq = sense[1] & 0x0F, sense[2], sense[3]
        elif len(sense) >= 14:
            self.key, self.asc, self.ascq = sense[2] & 0x0F, sense[12], sense[13]
        else:
            self.key = self.asc = self.ascq = 0
        super().__init__(
            f"SCSI status {status:#04x}, sense {self.key:X}/{self.asc:02X}/{self.ascq:02X}"
        )


class ConnectionEnded(IscsiError):
    """The connection ended before this request did; whether it was carried out is not known."""


CommandDone = Callable[[Buffer | None, IscsiError | None], None]
"""Called once: the data that were read (empty for other commands), or the error."""


class Command:
    """One SCSI command. ``received`` fills as Data-In PDUs come; ``residual`` is signed: positive
    for an underflow.
    """

    __slots__ = (
        "cdb",
        "data",
        "done",
        "itt",
        "lun",
        "read_bytes",
        "received",
        "residual",
        "whole",
    )

    def __init__(
        self, lun: int, cdb: bytes, read_bytes: int, data: Buffer, done: CommandDone
    ) -> None:
        self.lun = lun
        self.cdb = cdb
        self.read_bytes = read_bytes
        self.data = data
        self.done = done
        self.itt = 0
        self.received: bytearray | None = None
        self.whole: Buffer | None = None
        self.residual = 0

    def take(self, pdu: Pdu) -> bool:
        """Store one Data-In PDU. False where it lies outside of what was asked for."""
        size, offset = len(pdu.data), pdu.buffer_offset
        if offset + size > self.read_bytes:
            return False
        if offset == 0 and size == self.read_bytes:
            self.whole = bytes(pdu.data)
            return True
        if self.received is None:
            self.received = bytearray(self.read_bytes)
        self.received[offset : offset + size] = pdu.data
        return True

    def result(self) -> Buffer:
        """The data that were read, without what an underflow left out."""
        if self.whole is not None:
            return self.whole
        data = self.received if self.received is not None else b""
        return data[: self.read_bytes - self.residual] if self.residual > 0 else data
