"""The transmission phase: requests from the receive buffer, checked and started ("Transmission",
"Request types").
"""

from collections.abc import Callable
from typing import ClassVar, Final, NamedTuple

from protocol.nbd import block_status, limits, reads, sweeps, wire
from protocol.nbd.errors import ProtocolError, RequestRefused
from protocol.nbd.fast_path import FastPath
from protocol.nbd.framing import ReceiveBuffer
from protocol.nbd.request import Request, command_name, payload_bytes, peek
from protocol.nbd.session import Session
from protocol.nbd.writes import Discard, Write


class Rule(NamedTuple):
    """What a command may carry. NBD_CMD_FLAG_FUA is allowed with each."""

    flags: int
    writing: bool


RULES: Final = {
    wire.CMD_READ: Rule(wire.CMD_FLAG_DF, writing=False),
    wire.CMD_WRITE: Rule(wire.CMD_FLAG_PAYLOAD_LEN, writing=True),
    wire.CMD_FLUSH: Rule(0, writing=False),
    wire.CMD_TRIM: Rule(0, writing=True),
    wire.CMD_CACHE: Rule(0, writing=False),
    wire.CMD_WRITE_ZEROES: Rule(wire.CMD_FLAG_NO_HOLE | wire.CMD_FLAG_FAST_ZERO, writing=True),
    wire.CMD_BLOCK_STATUS: Rule(wire.CMD_FLAG_REQ_ONE | wire.CMD_FLAG_PAYLOAD_LEN, writing=False),
}


class Transmission:
    """Handles one request after the other. ``_incoming`` takes the payload that is under way."""

    __slots__ = ("_fast_path", "_incoming", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        self._incoming: Write | Discard | None = None
        self._fast_path = FastPath(session)

    def run(self, receive: ReceiveBuffer) -> bool:
        """Handle what is there up to some output; False where more has to come, or something has to
        end, first. Raises ProtocolError.
        """
        session = self.session
        if session.fast and self._incoming is None:
            self._fast_path.run(receive)
            if session.outbox.pending_bytes >= limits.OUTPUT_BYTES_HIGH:
                return True
        return self._step(receive)

    def release(self) -> None:
        """The session is over and nothing is in flight."""
        self._incoming = None
        self._fast_path.release()
        self.session.release()

    def _step(self, receive: ReceiveBuffer) -> bool:
        incoming = self._incoming
        if incoming is not None:
            progress = incoming.feed(receive)
            if incoming.complete:
                self._incoming = None
            return progress
        session = self.session
        request = peek(receive, session.extended)
        if request is None:
            return False
        header = wire.EXTENDED_REQUEST.size if session.extended else wire.REQUEST.size
        payload = payload_bytes(request, session.extended)
        if payload > limits.PAYLOAD_BYTES_MAX:
            reason = f"a payload of {payload} bytes, {limits.PAYLOAD_BYTES_MAX} are the most"
            session.fail(request, RequestRefused(wire.EINVAL, reason))
            raise ProtocolError(reason)
        if payload <= limits.PIECE_BYTES and not receive.has(header + payload):
            return False
        if request.command == wire.CMD_DISC:
            receive.drop()
            session.disconnecting, session.fast = True, False
            return False
        try:
            self._check(request, payload)
        except RequestRefused as error:
            receive.take(header)
            self._refuse(request, payload, error)
            return True
        if not session.admits(self._pieces(request)):
            return False
        filtered = payload if request.command == wire.CMD_BLOCK_STATUS else 0
        receive.take(header)
        session.requests += 1
        self._START[request.command](self, request, bytes(receive.take(filtered)))
        return True

    def _refuse(self, request: Request, payload: int, error: RequestRefused) -> None:
        """Answer with an error, behind the payload."""
        self.session.requests += 1
        if payload:
            self._incoming = Discard(self.session, request, payload, error)
        else:
            self.session.fail(request, error)

    # --- Checks -----------------------------------------------------------------------------------

    def _check(self, request: Request, payload: int) -> None:
        """Raise RequestRefused for what is not carried out."""
        session, command = self.session, request.command
        rule = RULES.get(command)
        if rule is None:
            raise RequestRefused(wire.EINVAL, f"{command_name(command)} is not known here")
        self._check_flags(request, rule)
        if command == wire.CMD_FLUSH:
            if request.offset or request.length:
                raise RequestRefused(wire.EINVAL, "flush with an offset or a length")
            if session.ending is not None:
                raise RequestRefused(wire.ESHUTDOWN, session.ending)
            return
        filtered = command == wire.CMD_BLOCK_STATUS and payload > 0
        session.check(request, rule.writing, 0 if filtered else request.length)
        if command == wire.CMD_READ:
            reads.check_length(session, request)
        elif command == wire.CMD_CACHE:
            sweeps.check_cache(request)
        elif command == wire.CMD_WRITE_ZEROES:
            sweeps.check_zeroes(request)
        elif command == wire.CMD_BLOCK_STATUS:
            block_status.check(session, request.length, payload)

    def _check_flags(self, request: Request, rule: Rule) -> None:
        """Raise RequestRefused for flags that the command has not, or not with what was
        negotiated.
        """
        session, command = self.session, request.command
        allowed = rule.flags | wire.CMD_FLAG_FUA
        if session.chunks is None:
            allowed &= ~wire.CMD_FLAG_DF
        if not session.extended:
            allowed &= ~wire.CMD_FLAG_PAYLOAD_LEN
        if request.flags & ~allowed:
            raise RequestRefused(
                wire.EINVAL, f"{command_name(command)} with flags {request.flags:#x}"
            )
        if (
            command == wire.CMD_WRITE
            and session.extended
            and not request.flags & wire.CMD_FLAG_PAYLOAD_LEN
        ):
            raise RequestRefused(wire.EINVAL, "write without NBD_CMD_FLAG_PAYLOAD_LEN")

    def _pieces(self, request: Request) -> int:
        if request.command == wire.CMD_READ:
            return reads.pieces(self.session, request)
        return 1

    # --- Commands ---------------------------------------------------------------------------------

    def _read(self, request: Request, payload: bytes) -> None:
        if request.length:
            reads.Read(self.session, request).start()
        else:
            self.session.replies.empty(request)

    def _write(self, request: Request, payload: bytes) -> None:
        if request.length:
            self._incoming = Write(self.session, request)
        else:
            self.session.succeed(request)

    def _flush(self, request: Request, payload: bytes) -> None:
        """Behind the writes that came before; and whatever other connections were told is
        written.
        """
        session = self.session

        def flushed(error: Exception | None) -> None:
            if error is not None:
                session.fail(request, error)
            else:
                session.succeed(request)
            session.ended()

        session.settle()
        session.began()
        session.volume.flush(flushed)

    def _trim(self, request: Request, payload: bytes) -> None:
        sweeps.trim(self.session, request)

    def _write_zeroes(self, request: Request, payload: bytes) -> None:
        sweeps.write_zeroes(self.session, request)

    def _cache(self, request: Request, payload: bytes) -> None:
        sweeps.cache(self.session, request)

    def _block_status(self, request: Request, payload: bytes) -> None:
        """With a payload, that names the contexts and the length."""
        session = self.session
        length, numbers = request.length, list(session.contexts)
        try:
            if payload:
                length, numbers = block_status.parse_filter(session, payload)
                session.check(request, writing=False, length=length)
                block_status.check(session, length, 0)
        except RequestRefused as error:
            session.fail(request, error)
            return
        block_status.BlockStatus(session, request, length, numbers).start()

    _START: ClassVar[dict[int, Callable[["Transmission", Request, bytes], None]]] = {
        wire.CMD_READ: _read,
        wire.CMD_WRITE: _write,
        wire.CMD_FLUSH: _flush,
        wire.CMD_TRIM: _trim,
        wire.CMD_CACHE: _cache,
        wire.CMD_WRITE_ZEROES: _write_zeroes,
        wire.CMD_BLOCK_STATUS: _block_status,
    }
