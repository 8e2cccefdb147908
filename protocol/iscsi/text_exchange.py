"""Text requests in the full feature phase (RFC 7143 11.10, 11.11): SendTargets, and the one key
that may be renegotiated.

A request may be continued over several PDUs (C bit), and an answer that does not fit the
initiator's data segment is given piece by piece, each fetched with the target transfer tag of the
last. A piece is made when it is fetched, in a turn of the event loop (`protocol.turns`): a long
list of targets does not delay other sessions, and its length is not limited.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final

from protocol.iscsi import keys, limits, text
from protocol.iscsi.errors import TextError
from protocol.iscsi.node import TargetNode
from protocol.iscsi.pdu import (
    CONTINUE,
    FINAL,
    REJECT_PROTOCOL_ERROR,
    RESERVED_TAG,
    TEXT_RESPONSE,
    Pdu,
)
from protocol.iscsi.session import Session
from protocol.names import PORTAL_GROUP_TAG, fold

ALL: Final = "All"
# The only operational key that may be declared again in the full feature phase (RFC 7143 13.12).
_RENEGOTIABLE: Final = "MaxRecvDataSegmentLength"
_EXCHANGE_TAG: Final = 1


class TextExchange:
    """One exchange at a time, as the standard allows no more on a connection.

    ``_records`` yields what is left of the answer, ``_rest`` is what of it was made and not sent;
    ``_waiting`` is True while a turn was asked for.
    """

    __slots__ = (
        "_collected",
        "_node",
        "_portal",
        "_records",
        "_rest",
        "_session",
        "_waiting",
    )

    def __init__(self, session: Session, node: TargetNode, portal: str) -> None:
        self._session = session
        self._node = node
        self._portal = portal
        self._collected = bytearray()
        self._records: Iterator[bytes] = iter(())
        self._rest = bytearray()
        self._waiting = False

    def handle(self, pdu: Pdu) -> None:
        """Take one text request and answer it. Send a Reject if it is no text, or comes before the
        last one was answered.
        """
        session = self._session
        if self._waiting:
            session.reject(pdu, REJECT_PROTOCOL_ERROR)
            return
        continued = pdu.ttt != RESERVED_TAG
        if not continued:
            self._forget()
        self._collected += pdu.data
        if len(self._collected) > limits.TEXT_REQUEST_BYTES_MAX:
            self._give_up(pdu)
            return
        if pdu.flags & CONTINUE:
            self._respond(pdu, 0, _EXCHANGE_TAG)
            return
        if not (continued and self._rest):
            try:
                pairs = text.parse(bytes(self._collected))
            except TextError:
                self._give_up(pdu)
                return
            self._records = chain.from_iterable(
                [self._answer(key, offer) for key, offer in pairs.items()]
            )
        self._collected.clear()
        self._waiting = True
        self._node.turns.take(lambda: self._send(pdu))

    def _forget(self) -> None:
        self._collected.clear()
        self._records = iter(())
        self._rest.clear()

    def _give_up(self, pdu: Pdu) -> None:
        self._forget()
        self._session.reject(pdu, REJECT_PROTOCOL_ERROR)

    def _respond(self, pdu: Pdu, flags: int, ttt: int, data: bytes = b"") -> None:
        header = self._session.response_header(
            TEXT_RESPONSE, pdu.itt, flags=flags, length=len(data), lun=pdu.lun, ttt=ttt
        )
        self._session.sender.put(header, data)

    def _send(self, pdu: Pdu) -> None:
        """Send the next piece. One byte more than fits is made, to know whether it is the last."""
        self._waiting = False
        session = self._session
        segment = min(session.parameters.peer_data_segment_bytes, limits.TEXT_PIECE_BYTES)
        while len(self._rest) <= segment and (record := next(self._records, None)) is not None:
            self._rest += record
        piece = bytes(self._rest[:segment])
        del self._rest[:segment]
        flags, ttt = (CONTINUE, _EXCHANGE_TAG) if self._rest else (FINAL, RESERVED_TAG)
        self._respond(pdu, flags, ttt, piece)
        session.sender.wake()

    def _answer(self, key: str, offer: str) -> Iterable[bytes]:
        """What one key is answered with, encoded."""
        if key == "SendTargets":
            return self._targets(offer)
        if key == _RENEGOTIABLE:
            reply = keys.OPERATIONAL[key].answer(offer, self._session.parameters)
            self._session.lengths_changed()
        elif key in keys.OPERATIONAL or key in keys.DECLARED_FIRST:
            reply = keys.REJECT
        else:
            reply = keys.NOT_UNDERSTOOD
        return [text.encode([(key, reply)])] if reply is not None else []

    def _targets(self, wanted: str) -> Iterator[bytes]:
        """SendTargets (RFC 7143 appendix C): All only in a discovery session; a name, or nothing
        for the session's own target.
        """
        session, node = self._session, self._node
        if session.discovery:
            names = node.directory.names_for(session.initiator_name, self._portal)
            if wanted != ALL:
                names = [name for name in names if fold(name) == fold(wanted)]
        elif wanted == ALL:
            yield text.encode([("SendTargets", keys.REJECT)])
            return
        else:
            own = session.target_name
            names = [own] if fold(wanted) in ("", fold(own)) else []
        addresses = text.encode(
            [
                ("TargetAddress", f"{address},{PORTAL_GROUP_TAG}")
                for address in node.portals(self._portal)
            ]
        )
        for name in names:
            yield text.encode([("TargetName", name)]) + addresses
