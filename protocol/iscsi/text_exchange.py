"""Text requests in the full feature phase (RFC 7143 11.10, 11.11): SendTargets, and what little may be negotiated then.

A request may be continued over several PDUs (C bit), and an answer that does not fit the initiator's data segment is given
piece by piece, each fetched with the target transfer tag of the last.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from protocol.iscsi import keys, limits, text
from protocol.iscsi.errors import TextError
from protocol.iscsi.login import PORTAL_GROUP
from protocol.iscsi.pdu import CONTINUE, FINAL, REJECT_PROTOCOL_ERROR, RESERVED_TAG, TEXT_RESPONSE, Pdu

if TYPE_CHECKING:
    from protocol.iscsi.full_feature import FullFeature

ALL: Final = "All"
# The only operational key that may be declared again in the full feature phase (RFC 7143 13.12).
_RENEGOTIABLE: Final = "MaxRecvDataSegmentLength"
_EXCHANGE_TAG: Final = 1


class TextExchange:
    """One exchange at a time, as the standard allows no more on a connection."""

    __slots__ = ("_answer", "_collected", "_names", "_portals")

    def __init__(self, names: Callable[[], list[str]], portals: Callable[[], list[str]]) -> None:
        self._names = names
        self._portals = portals
        self._collected = bytearray()
        self._answer = b""

    def handle(self, phase: "FullFeature", pdu: Pdu) -> None:
        """Take one text request and answer it; Reject where it is no text."""
        continued = pdu.ttt != RESERVED_TAG
        if not continued:
            self._collected.clear()
            self._answer = b""
        self._collected += pdu.data
        if len(self._collected) > limits.TEXT_REQUEST_BYTES_MAX:
            self._give_up(phase, pdu)
            return
        if pdu.flags & CONTINUE:
            phase.sender.put(phase.numbered(TEXT_RESPONSE, pdu.itt, flags=0, lun=pdu.lun, ttt=_EXCHANGE_TAG))
            return
        if not (continued and self._answer):
            try:
                pairs = text.parse(bytes(self._collected))
            except TextError:
                self._give_up(phase, pdu)
                return
            self._answer = text.encode(self._answers(phase, pairs))[: limits.TEXT_RESPONSE_BYTES_MAX]
        self._collected.clear()
        self._send(phase, pdu)

    def _give_up(self, phase: "FullFeature", pdu: Pdu) -> None:
        self._collected.clear()
        self._answer = b""
        phase.reject(pdu, REJECT_PROTOCOL_ERROR)

    def _send(self, phase: "FullFeature", pdu: Pdu) -> None:
        segment = phase.parameters.peer_data_segment_bytes
        piece, self._answer = self._answer[:segment], self._answer[segment:]
        more = bool(self._answer)
        flags = CONTINUE if more else FINAL
        ttt = _EXCHANGE_TAG if more else RESERVED_TAG
        phase.sender.put(phase.numbered(TEXT_RESPONSE, pdu.itt, flags=flags, length=len(piece), lun=pdu.lun, ttt=ttt), piece)

    def _answers(self, phase: "FullFeature", pairs: dict[str, str]) -> list[tuple[str, str]]:
        answers: list[tuple[str, str]] = []
        for key, offer in pairs.items():
            if key == "SendTargets":
                answers += self._targets(phase, offer)
            elif key == _RENEGOTIABLE:
                reply = keys.OPERATIONAL[key].answer(offer, phase.parameters)
                answers += [(key, reply)] if reply is not None else []
            elif key in keys.OPERATIONAL or key in keys.DECLARED_FIRST:
                answers.append((key, keys.REJECT))
            else:
                answers.append((key, keys.NOT_UNDERSTOOD))
        return answers

    def _targets(self, phase: "FullFeature", wanted: str) -> list[tuple[str, str]]:
        """SendTargets (RFC 7143 appendix C): All only in a discovery session; a name, or nothing for the session's own target."""
        if wanted == ALL:
            if not phase.discovery:
                return [("SendTargets", keys.REJECT)]
            names = self._names()
        elif phase.discovery:
            names = [name for name in self._names() if name.lower() == wanted.lower()]
        else:
            names = [phase.target_name] if wanted in ("", phase.target_name) else []
        answers: list[tuple[str, str]] = []
        addresses = [("TargetAddress", f"{portal},{PORTAL_GROUP}") for portal in self._portals()]
        for name in names:
            answers += [("TargetName", name), *addresses]
        return answers
