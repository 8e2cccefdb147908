"""Text requests in the full feature phase (RFC 7143 11.10, 11.11): SendTargets, and what little may
be negotiated then.

A request may be continued over several PDUs (C bit), and an answer that does not fit the
initiator's data segment is given piece by piece, each fetched with the target transfer tag of the
last. A piece is made when it is fetched, in a turn of the event loop (`protocol.scsi.turns`): a
list of all targets, asked for again and again, takes no session's time, and has no greatest length.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Final

from protocol.iscsi import keys, limits, text
from protocol.iscsi.errors import TextError
from protocol.iscsi.login import PORTAL_GROUP
from protocol.iscsi.pdu import (
    CONTINUE,
    FINAL,
    REJECT_PROTOCOL_ERROR,
    RESERVED_TAG,
    TEXT_RESPONSE,
    Pdu,
)
from protocol.names import fold
from protocol.scsi.turns import Turns

if TYPE_CHECKING:
    from protocol.iscsi.full_feature import FullFeature

ALL: Final = "All"
# The only operational key that may be declared again in the full feature phase (RFC 7143 13.12).
_RENEGOTIABLE: Final = "MaxRecvDataSegmentLength"
_EXCHANGE_TAG: Final = 1


class TextExchange:
    """One exchange at a time, as the standard allows no more on a connection.

    ``_records`` is what is still to be answered, ``_rest`` what of it was made and not sent;
    ``_waiting``: a turn was asked for.
    """

    __slots__ = ("_collected", "_names", "_portals", "_records", "_rest", "_turns", "_waiting")

    def __init__(
        self, names: Callable[[], list[str]], portals: Callable[[], list[str]], turns: Turns
    ) -> None:
        self._names = names
        self._portals = portals
        self._turns = turns
        self._collected = bytearray()
        self._records: Iterator[bytes] = iter(())
        self._rest = bytearray()
        self._waiting = False

    def handle(self, phase: "FullFeature", pdu: Pdu) -> None:
        """Take one text request and answer it; Reject where it is no text, or comes before the last
        one is answered.
        """
        if self._waiting:
            phase.reject(pdu, REJECT_PROTOCOL_ERROR)
            return
        continued = pdu.ttt != RESERVED_TAG
        if not continued:
            self._forget()
        self._collected += pdu.data
        if len(self._collected) > limits.TEXT_REQUEST_BYTES_MAX:
            self._give_up(phase, pdu)
            return
        if pdu.flags & CONTINUE:
            phase.sender.put(
                phase.numbered(TEXT_RESPONSE, pdu.itt, flags=0, lun=pdu.lun, ttt=_EXCHANGE_TAG)
            )
            return
        if not (continued and self._rest):
            try:
                pairs = text.parse(bytes(self._collected))
            except TextError:
                self._give_up(phase, pdu)
                return
            self._records = chain.from_iterable(
                [self._answer(phase, key, offer) for key, offer in pairs.items()]
            )
        self._collected.clear()
        self._waiting = True
        self._turns.take(lambda: self._send(phase, pdu))

    def _forget(self) -> None:
        self._collected.clear()
        self._records = iter(())
        self._rest.clear()

    def _give_up(self, phase: "FullFeature", pdu: Pdu) -> None:
        self._forget()
        phase.reject(pdu, REJECT_PROTOCOL_ERROR)

    def _send(self, phase: "FullFeature", pdu: Pdu) -> None:
        """The next piece. A byte more than it holds is made, so that it is known whether it is the
        last.
        """
        self._waiting = False
        segment = min(phase.parameters.peer_data_segment_bytes, limits.TEXT_PIECE_BYTES)
        while len(self._rest) <= segment and (record := next(self._records, None)) is not None:
            self._rest += record
        piece = bytes(self._rest[:segment])
        del self._rest[:segment]
        flags, ttt = (CONTINUE, _EXCHANGE_TAG) if self._rest else (FINAL, RESERVED_TAG)
        phase.sender.put(
            phase.numbered(
                TEXT_RESPONSE, pdu.itt, flags=flags, length=len(piece), lun=pdu.lun, ttt=ttt
            ),
            piece,
        )
        phase.wake()

    def _answer(self, phase: "FullFeature", key: str, offer: str) -> Iterable[bytes]:
        """What one key is answered with, encoded."""
        if key == "SendTargets":
            return self._targets(phase, offer)
        if key == _RENEGOTIABLE:
            reply = keys.OPERATIONAL[key].answer(offer, phase.parameters)
            phase.lengths_changed()
        elif key in keys.OPERATIONAL or key in keys.DECLARED_FIRST:
            reply = keys.REJECT
        else:
            reply = keys.NOT_UNDERSTOOD
        return [text.encode([(key, reply)])] if reply is not None else []

    def _targets(self, phase: "FullFeature", wanted: str) -> Iterator[bytes]:
        """SendTargets (RFC 7143 appendix C): All only in a discovery session; a name, or nothing
        for the session's own target.
        """
        if wanted == ALL:
            if not phase.discovery:
                yield text.encode([("SendTargets", keys.REJECT)])
                return
            names = self._names()
        elif phase.discovery:
            names = [name for name in self._names() if fold(name) == fold(wanted)]
        else:
            names = [phase.target_name] if fold(wanted) in ("", fold(phase.target_name)) else []
        addresses = text.encode(
            [("TargetAddress", f"{portal},{PORTAL_GROUP}") for portal in self._portals()]
        )
        for name in names:
            yield text.encode([("TargetName", name)]) + addresses
