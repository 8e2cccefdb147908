"""NBD_CMD_READ: taken from the volume in pieces, each sent as chunks as soon as it is there; in one
message where the client wants no fragments, or knows no chunks.
"""

from protocol.nbd import wire
from protocol.nbd.errors import RequestRefused
from protocol.nbd.limits import PAYLOAD_BYTES_MAX, PIECE_BYTES
from protocol.nbd.request import Request
from protocol.nbd.session import Session
from protocol.volume import Buffer


def _gathers(session: Session, request: Request) -> bool:
    """Whether all data must be there before the first byte is sent: an error can be reported only
    instead of them.
    """
    return session.chunks is None or request.flags & wire.CMD_FLAG_DF != 0


def check_length(session: Session, request: Request) -> None:
    """Raise RequestRefused for more than the maximum payload."""
    if request.length > PAYLOAD_BYTES_MAX:
        raise RequestRefused(
            wire.EINVAL if session.chunks is None else wire.EOVERFLOW,
            f"read of {request.length} bytes, {PAYLOAD_BYTES_MAX} are the most",
        )


def pieces(session: Session, request: Request) -> int:
    """Pieces that the request holds at once."""
    if not _gathers(session, request):
        return 1
    return max(1, -(-request.length // PIECE_BYTES))


class Read:
    """One read. ``pump`` goes on until the end, a miss, or a client that does not drain."""

    __slots__ = ("_gathered", "_pieces", "_position", "_request", "_session")

    def __init__(self, session: Session, request: Request) -> None:
        self._session = session
        self._request = request
        self._position = 0
        self._pieces = pieces(session, request)
        self._gathered: list[Buffer] | None = [] if _gathers(session, request) else None

    def start(self) -> None:
        """Begin."""
        self._session.began(self._pieces)
        self.pump()

    def pump(self) -> None:
        """Take and send what is at hand."""
        session, request = self._session, self._request
        while self._position < request.length:
            if session.over:
                session.ended(self._pieces)
                return
            if self._gathered is None and not session.may_send(self):
                return
            offset = request.offset + self._position
            size = min(PIECE_BYTES, request.length - self._position)
            try:
                data = session.volume.try_read(offset, size)
            except Exception as error:  # noqa: BLE001 - whatever the volume raises carries an errno
                self._failed(error)
                return
            if data is None:
                session.volume.read(offset, size, self._arrived)
                return
            self._take(data)
        self._finish()

    def _take(self, data: Buffer) -> None:
        session, request = self._session, self._request
        at = request.offset + self._position
        self._position += len(data)
        session.read_bytes += len(data)
        if self._gathered is not None:
            self._gathered.append(data)
        elif session.chunks is not None:
            last = self._position == request.length
            session.chunks.content(request.cookie, request.offset, at, data, last)

    def _arrived(self, data: Buffer | None, error: Exception | None) -> None:
        if self._session.over:
            self._session.ended(self._pieces)
        elif error is not None or data is None:
            self._failed(error or OSError("no data"))
        else:
            self._take(data)
            self.pump()

    def _failed(self, error: Exception) -> None:
        """Chunks that were sent are valid: the error says from where on nothing is."""
        session, request = self._session, self._request
        at = getattr(error, "offset_bytes", None)
        here = request.offset + self._position
        if self._gathered is None and self._position:
            at = here if at is None else max(at, here)
        if at is not None and not request.offset <= at < request.offset + request.length:
            at = None
        session.fail(request, error, at)
        session.ended(self._pieces)

    def _finish(self) -> None:
        session, request = self._session, self._request
        if self._gathered is not None and not session.over:
            session.replies.whole(request, self._gathered)
        session.ended(self._pieces)
