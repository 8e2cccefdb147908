"""Requests that go over a range step by step: TRIM, WRITE_ZEROES and CACHE ("Request types").

The first step is made at once, each later one in a turn of the event loop of its own. FUA is one
flush at the end.
"""

from collections.abc import Callable

from protocol.nbd import wire
from protocol.nbd.errors import RequestRefused
from protocol.nbd.limits import (
    PAYLOAD_BYTES_MAX,
    PIECE_BYTES,
    PREFERRED_BLOCK_BYTES,
    SWEEP_STEP_BYTES,
)
from protocol.nbd.replies import ZEROS
from protocol.nbd.request import Request
from protocol.nbd.session import Session
from protocol.volume import Buffer, Completion

_BLOCK_MASK = PREFERRED_BLOCK_BYTES - 1
_VIEW = memoryview(ZEROS)
StepStart = Callable[[Session, int, int, Completion], None]


def check_zeroes(request: Request) -> None:
    """Raise RequestRefused for a fast zero that would not be faster than a write: one that must
    leave no hole, or merges with the rest of a block.
    """
    flags = request.flags
    if flags & wire.CMD_FLAG_FAST_ZERO and (
        flags & wire.CMD_FLAG_NO_HOLE or (request.offset | request.length) & _BLOCK_MASK
    ):
        raise RequestRefused(wire.ENOTSUP, "that is not faster than a write")


def check_cache(request: Request) -> None:
    """Raise RequestRefused for more than is loaded for one request."""
    if request.length > PAYLOAD_BYTES_MAX:
        raise RequestRefused(
            wire.EOVERFLOW,
            f"cache of {request.length} bytes, {PAYLOAD_BYTES_MAX} are the most",
        )


def trim(session: Session, request: Request) -> None:
    """Whole blocks of the range are deallocated; it is a hint, and partial blocks stay."""
    start = (request.offset + _BLOCK_MASK) & ~_BLOCK_MASK
    end = (request.offset + request.length) & ~_BLOCK_MASK
    _Sweep(session, request, start, max(start, end), SWEEP_STEP_BYTES, _unmap).start()


def write_zeroes(session: Session, request: Request) -> None:
    """Zero pointers; with NO_HOLE, zeros that are written, so that they have blocks."""
    hole = not request.flags & wire.CMD_FLAG_NO_HOLE
    step, start = (SWEEP_STEP_BYTES, _zero) if hole else (PIECE_BYTES, _write_zeros)
    end = request.offset + request.length
    _Sweep(session, request, request.offset, end, step, start).start()


def cache(session: Session, request: Request) -> None:
    """Read, and send nothing."""
    end = request.offset + request.length
    _Sweep(session, request, request.offset, end, PIECE_BYTES, _load).start()


def _unmap(session: Session, offset: int, length: int, done: Completion) -> None:
    session.volume.unmap(offset, length, done)


def _zero(session: Session, offset: int, length: int, done: Completion) -> None:
    session.volume.write_zeros(offset, length, False, done)


def _write_zeros(session: Session, offset: int, length: int, done: Completion) -> None:
    session.volume.write(offset, _VIEW[:length], False, done)
    session.volume.settle()


def _load(session: Session, offset: int, length: int, done: Completion) -> None:
    def loaded(data: Buffer | None, error: Exception | None) -> None:
        done(error)

    try:
        at_hand = session.volume.try_read(offset, length)
    except Exception as error:  # noqa: BLE001 - whatever the volume raises carries an errno
        done(error)
        return
    if at_hand is None:
        session.volume.read(offset, length, loaded)
    else:
        done(None)


class _Sweep:
    """One request over [start, end), under way: one piece in flight until it is answered."""

    __slots__ = ("_at", "_end", "_request", "_session", "_start_step", "_step_bytes", "_writes")

    def __init__(
        self,
        session: Session,
        request: Request,
        start: int,
        end: int,
        step_bytes: int,
        start_step: StepStart,
    ) -> None:
        self._session = session
        self._request = request
        self._at = start
        self._end = end
        self._step_bytes = step_bytes
        self._start_step = start_step
        self._writes = request.command != wire.CMD_CACHE

    def start(self) -> None:
        """Begin, behind the writes that came before."""
        self._session.settle()
        self._session.began()
        self._go_on()

    def _go_on(self) -> None:
        session, at = self._session, self._at
        if session.over:
            session.ended()
            return
        if at >= self._end:
            self._finish()
            return
        try:
            session.check_access(self._writes)
        except RequestRefused as error:
            self._answer(error)
            return
        self._at = min(self._end, at + self._step_bytes)
        self._start_step(session, at, self._at - at, self._stepped)

    def _stepped(self, error: Exception | None) -> None:
        if error is not None:
            self._answer(error)
        elif self._at < self._end:
            self._session.turn(self._go_on)
        else:
            self._finish()

    def _finish(self) -> None:
        if self._writes and self._request.fua:
            self._session.volume.flush(self._answer)
        else:
            self._answer(None)

    def _answer(self, error: Exception | None) -> None:
        session = self._session
        if error is not None:
            session.fail(self._request, error)
        else:
            session.succeed(self._request)
        session.ended()
