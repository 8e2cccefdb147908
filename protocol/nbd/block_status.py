"""NBD_CMD_BLOCK_STATUS: every selected context is asked, and all answer in chunks that end
together, or there is one error.
"""

from struct import Struct
from typing import Final

from protocol.nbd import limits, wire
from protocol.nbd.errors import RequestRefused
from protocol.nbd.export import Extents, MetaContext
from protocol.nbd.request import Request
from protocol.nbd.session import Session

_ID: Final = Struct(">I")
PAYLOAD_BYTES_MAX: Final = wire.EFFECT_LENGTH.size + limits.CONTEXTS_MAX * _ID.size


def parse_filter(session: Session, payload: bytes) -> tuple[int, list[int]]:
    """Effect length and context IDs of a request with a payload. Raises RequestRefused for a
    payload of another form, and for unknown and duplicate IDs.
    """
    rest = len(payload) - wire.EFFECT_LENGTH.size
    if rest < _ID.size or rest % _ID.size:
        raise RequestRefused(wire.EINVAL, f"a payload of {len(payload)} bytes")
    (length,) = wire.EFFECT_LENGTH.unpack_from(payload)
    numbers = [number for (number,) in _ID.iter_unpack(payload[wire.EFFECT_LENGTH.size :])]
    if len(set(numbers)) != len(numbers) or not set(numbers) <= set(session.contexts):
        raise RequestRefused(wire.EINVAL, "context IDs that are unknown, or come twice")
    return length, numbers


def check(session: Session, length: int, payload: int) -> None:
    """Raise RequestRefused where no context was selected, no extent can be the answer, or the
    payload is longer than all contexts make it.
    """
    if not session.contexts:
        raise RequestRefused(wire.EINVAL, "block status, and no metadata context was selected")
    if not length:
        raise RequestRefused(wire.EINVAL, "block status of no bytes")
    if payload > PAYLOAD_BYTES_MAX:
        raise RequestRefused(wire.EINVAL, f"a payload of {payload} bytes")


class BlockStatus:
    """One request: the contexts are asked one after the other."""

    __slots__ = ("_contexts", "_length", "_one", "_request", "_results", "_session")

    def __init__(self, session: Session, request: Request, length: int, numbers: list[int]) -> None:
        self._session = session
        self._request = request
        self._length = length
        self._one = request.flags & wire.CMD_FLAG_REQ_ONE != 0
        self._contexts: list[tuple[int, MetaContext]] = [
            (number, session.contexts[number]) for number in reversed(numbers)
        ]
        self._results: list[tuple[int, Extents]] = []

    def start(self) -> None:
        """Begin, behind the writes that came before."""
        self._session.settle()
        self._session.began()
        self._ask()

    def _ask(self) -> None:
        extents_max = 1 if self._one else limits.EXTENTS_MAX
        context = self._contexts[-1][1]
        context.extents(self._request.offset, self._length, extents_max, self._answered)

    def _answered(self, extents: Extents | None, error: Exception | None) -> None:
        session, request = self._session, self._request
        fitting = _fit(extents or [], self._length, 1 if self._one else limits.EXTENTS_MAX)
        if session.over:
            session.ended()
            return
        if error is not None or not fitting:
            session.fail(request, error or OSError("no extents"))
            session.ended()
            return
        self._results.append((self._contexts.pop()[0], fitting))
        if self._contexts:
            self._ask()
            return
        assert session.chunks is not None
        last = len(self._results) - 1
        for place, (number, fitted) in enumerate(self._results):
            session.chunks.status(request, number, fitted, place == last)
        session.ended()


def _fit(extents: Extents, length: int, extents_max: int) -> Extents:
    """Neighbours of the same status joined, nothing beyond ``length``, no more than
    ``extents_max``.
    """
    fitting: Extents = []
    for size, status in extents:
        here = min(size, length)
        length -= here
        if not here:
            continue
        if fitting and fitting[-1][1] == status:
            fitting[-1] = (fitting[-1][0] + here, status)
        elif len(fitting) == extents_max:
            break
        else:
            fitting.append((here, status))
    return fitting
