"""NBD_CMD_WRITE: handed to the volume from the receive buffer, in pieces as they come; and the
payloads that nobody wants.
"""

from protocol.nbd.errors import RequestRefused
from protocol.nbd.framing import ReceiveBuffer
from protocol.nbd.limits import PIECE_BYTES, PREFERRED_BLOCK_BYTES
from protocol.nbd.request import Request
from protocol.nbd.session import Session


class Write:
    """One write. A write of one piece goes to the volume as a whole; of a longer one pieces end at
    blocks, so that none is merged twice. What fails is answered when all data have come.
    """

    __slots__ = ("_error", "_position", "_request", "_session", "_under_way")

    def __init__(self, session: Session, request: Request) -> None:
        self._session = session
        self._request = request
        self._position = 0
        self._under_way = 0
        self._error: Exception | None = None

    @property
    def complete(self) -> bool:
        """All data have come."""
        return self._position == self._request.length

    def feed(self, receive: ReceiveBuffer) -> bool:
        """Take the next piece; False where it is not there, or has to wait."""
        if self._error is not None:
            return self._drop(receive)
        size = self._piece_bytes()
        if not receive.has(size):
            return False
        session, request = self._session, self._request
        if not session.admits(1):
            return False
        try:
            session.check_access(writing=True)
        except RequestRefused as error:
            self._error = error
            return self._drop(receive)
        offset = request.offset + self._position
        alone = size == request.length
        self._position += size
        self._under_way += 1
        session.began()
        session.write_bytes += size
        session.unsettled = True
        session.volume.write(offset, receive.take(size), alone and request.fua, self._written)
        return True

    def _piece_bytes(self) -> int:
        left = self._request.length - self._position
        if left <= PIECE_BYTES:
            return left
        return PIECE_BYTES - (self._request.offset + self._position) % PREFERRED_BLOCK_BYTES

    def _drop(self, receive: ReceiveBuffer) -> bool:
        size = min(self._request.length - self._position, receive.available)
        receive.take(size)
        self._position += size
        self._finish()
        return size > 0

    def _written(self, error: Exception | None) -> None:
        self._under_way -= 1
        if error is not None and self._error is None:
            self._error = error
        self._finish()
        self._session.ended()

    def _finish(self) -> None:
        if not self.complete or self._under_way:
            return
        session, request = self._session, self._request
        if self._error is not None:
            session.fail(request, self._error)
        elif request.fua and request.length > PIECE_BYTES:
            session.began()
            session.volume.flush(self._flushed)
        else:
            session.succeed(request)

    def _flushed(self, error: Exception | None) -> None:
        if error is not None:
            self._session.fail(self._request, error)
        else:
            self._session.succeed(self._request)
        self._session.ended()


class Discard:
    """The payload of a request that was refused: it is received, and then the error is sent."""

    __slots__ = ("_error", "_left", "_request", "_session")

    def __init__(
        self, session: Session, request: Request, payload: int, error: RequestRefused
    ) -> None:
        self._session = session
        self._request = request
        self._left = payload
        self._error = error

    @property
    def complete(self) -> bool:
        """All of it has come."""
        return self._left == 0

    def feed(self, receive: ReceiveBuffer) -> bool:
        """Drop what has come."""
        size = min(self._left, receive.available)
        receive.take(size)
        self._left -= size
        if self.complete:
            self._session.fail(self._request, self._error)
        return size > 0
