"""One request of the transmission phase, as its header says it ("Request message")."""

from typing import Final, NamedTuple

from protocol.nbd import wire
from protocol.nbd.errors import ProtocolError
from protocol.nbd.framing import ReceiveBuffer


class Request(NamedTuple):
    """``length`` is the effect length, except of a payload that is not data to be written."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int

    @property
    def fua(self) -> bool:
        """Durable before it is answered."""
        return self.flags & wire.CMD_FLAG_FUA != 0


_NAMES: Final = {
    wire.CMD_READ: "read",
    wire.CMD_WRITE: "write",
    wire.CMD_DISC: "disc",
    wire.CMD_FLUSH: "flush",
    wire.CMD_TRIM: "trim",
    wire.CMD_CACHE: "cache",
    wire.CMD_WRITE_ZEROES: "write zeroes",
    wire.CMD_BLOCK_STATUS: "block status",
}


def command_name(command: int) -> str:
    """For messages."""
    return _NAMES.get(command, f"command {command}")


def peek(receive: ReceiveBuffer, extended: bool) -> Request | None:
    """The request at the front of the buffer, if its header is whole; it stays there. Raises
    ProtocolError: without the magic number nobody can tell where the next request begins.
    """
    layout = wire.EXTENDED_REQUEST if extended else wire.REQUEST
    if not receive.has(layout.size):
        return None
    magic, *fields = layout.unpack_from(receive.storage, receive.start)
    if magic != (wire.EXTENDED_REQUEST_MAGIC if extended else wire.REQUEST_MAGIC):
        raise ProtocolError(f"a request with the magic number {magic:#x}")
    return Request(*fields)


def payload_bytes(request: Request, extended: bool) -> int:
    """Bytes that follow the header: with extended headers the flag PAYLOAD_LEN says so, else the
    command.
    """
    if extended:
        return request.length if request.flags & wire.CMD_FLAG_PAYLOAD_LEN else 0
    return request.length if request.command == wire.CMD_WRITE else 0
