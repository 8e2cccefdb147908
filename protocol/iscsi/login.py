"""The login phase of a target (RFC 7143 6.3, 11.12, 11.13), as a table of stages and one object per
connection.

`LoginPhase.handle` takes login requests and returns replies until it has a `LoginResult`. It raises
`LoginRefused` with the status to send; the caller sends it and closes the connection.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from protocol.iscsi import errors, keys, limits, text
from protocol.iscsi.chap import ChapSecrets, TargetExchange
from protocol.iscsi.keys import Parameters
from protocol.iscsi.node import TargetDefinition, TargetNode
from protocol.iscsi.pdu import (
    CONTINUE,
    FULL_FEATURE,
    LOGIN_RESPONSE,
    OPERATIONAL_STAGE,
    SECURITY_STAGE,
    TRANSIT,
    Pdu,
    pack,
)
from protocol.names import NAME_BYTES_MAX, PORTAL_GROUP_TAG, fold

# From which stage a login may go to which (RFC 7143 6.3, table of legal NSG).
TRANSITIONS: Final = {
    SECURITY_STAGE: frozenset((OPERATIONAL_STAGE, FULL_FEATURE)),
    OPERATIONAL_STAGE: frozenset((FULL_FEATURE,)),
}
FIRST_STAGES: Final = frozenset((SECURITY_STAGE, OPERATIONAL_STAGE))
_CHAP_PREFIX: Final = "CHAP_"
_SESSION_TYPES: Final = frozenset(("Normal", "Discovery"))
_FIRST_STAT_SN: Final = 1


@dataclass(slots=True)
class LoginResult:
    """A login that has succeeded; only the final response is left to send."""

    initiator_name: str
    isid: int
    cid: int
    cmd_sn: int
    discovery: bool
    target: TargetDefinition | None
    parameters: Parameters
    final_header: Callable[[int, int, int], bytes]
    final_text: bytes


@dataclass(slots=True)
class LoginPhase:
    """State of one connection's login. ``put`` queues a PDU: header, data."""

    node: TargetNode
    put: Callable[[bytes, bytes], None]
    stat_sn: int = _FIRST_STAT_SN
    parameters: Parameters = field(default_factory=Parameters)
    initiator_name: str = ""
    discovery: bool = False
    target: TargetDefinition | None = None
    _stage: int | None = None
    _first: Pdu | None = None
    _collected: bytearray = field(default_factory=bytearray)
    _exchanges: int = 0
    _chap: TargetExchange | None = None
    _method: str | None = None
    _declared: bool = False
    _negotiated: set[str] = field(default_factory=set)

    def handle(self, pdu: Pdu) -> LoginResult | None:
        """Take one login request; queue a reply, or return the result. Raises LoginRefused,
        TextError.
        """
        self._check_request(pdu)
        self._collected += pdu.data
        if len(self._collected) > limits.LOGIN_TEXT_BYTES_MAX:
            raise errors.LoginRefused("too much login text")
        if pdu.flags & CONTINUE:
            self._reply(pdu, [], False)
            return None
        pairs = text.parse(bytes(self._collected))
        self._collected.clear()
        answers = self._identify(pairs) if self._exchanges == 1 or not self.initiator_name else []
        answers += self._negotiate(pairs)
        return self._advance(pdu, answers)

    def _check_request(self, pdu: Pdu) -> None:
        self._exchanges += 1
        if self._exchanges > limits.LOGIN_EXCHANGES_MAX:
            raise errors.LoginRefused("too many login exchanges")
        stage = (pdu.flags >> 2) & 3
        if self._first is None:
            self._check_first(pdu, stage)
        elif (pdu.lun, pdu.word20 >> 16, stage) != (
            self._first.lun,
            self._first.word20 >> 16,
            self._stage,
        ):
            raise errors.InvalidDuringLogin(
                "ISID, TSIH, CID or the current stage changed during login"
            )
        if pdu.flags & TRANSIT and (
            pdu.flags & CONTINUE or (pdu.flags & 3) not in TRANSITIONS[stage]
        ):
            raise errors.InvalidDuringLogin("a stage transition that does not exist")

    def _check_first(self, pdu: Pdu, stage: int) -> None:
        if pdu.byte3 != 0:
            raise errors.UnsupportedVersion(f"the lowest version offered is {pdu.byte3}")
        if stage not in FIRST_STAGES:
            raise errors.InvalidDuringLogin("login begins with security or operational negotiation")
        if pdu.lun & 0xFFFF:
            raise errors.SessionDoesNotExist(
                "a session has one connection, which cannot be added to or taken over"
            )
        self._first = pdu
        self._stage = stage

    def _identify(self, pairs: dict[str, str]) -> list[tuple[str, str]]:
        """Take the names and the session type from the leading request."""
        name = pairs.get("InitiatorName", "")
        if not name or len(name.encode()) > NAME_BYTES_MAX:
            raise errors.MissingParameter("InitiatorName is missing or too long")
        kind = pairs.get("SessionType", "Normal")
        if kind not in _SESSION_TYPES:
            raise errors.SessionTypeUnsupported(f"SessionType={kind[:40]}")
        self.initiator_name = name = fold(name)
        self.discovery = kind == "Discovery"
        if self.discovery:
            return []
        wanted = pairs.get("TargetName", "")
        if not wanted:
            raise errors.MissingParameter("TargetName is missing")
        self.target = self.node.directory.open_target(wanted, name)
        if self.target is None:
            raise errors.TargetNotFound(f"no target {wanted[:80]}")
        return [("TargetPortalGroupTag", str(PORTAL_GROUP_TAG))]

    def _negotiate(self, pairs: dict[str, str]) -> list[tuple[str, str]]:
        answers: list[tuple[str, str]] = []
        if "AuthMethod" in pairs:
            answers.append(("AuthMethod", self._choose_method(pairs["AuthMethod"])))
        answers += self._authenticate(
            {key: value for key, value in pairs.items() if key.startswith(_CHAP_PREFIX)}
        )
        for key, offer in pairs.items():
            if key in keys.DECLARED_FIRST or key == "AuthMethod" or key.startswith(_CHAP_PREFIX):
                continue
            if key in self._negotiated:
                raise errors.LoginRefused(f"{key} was negotiated already")
            self._negotiated.add(key)
            reply = keys.answer(key, offer, self.parameters, self.discovery)
            if reply is not None:
                answers.append((key, reply))
        return answers

    def _choose_method(self, offered: str) -> str:
        if self._stage != SECURITY_STAGE or self._method is not None:
            raise errors.InvalidDuringLogin("AuthMethod outside of the security stage, or twice")
        wanted = self._wanted_chap()
        self._method = "CHAP" if wanted is not None else "None"
        if self._method not in offered.split(","):
            raise errors.AuthenticationFailed(
                f"{self._method} is required, {offered[:80]!r} offered"
            )
        if wanted is not None:
            self._chap = TargetExchange(wanted, self.node.challenges)
        return self._method

    def _wanted_chap(self) -> ChapSecrets | None:
        if self.target is not None:
            return self.target.chap
        return self.node.directory.discovery_chap(self.initiator_name)

    def _authenticate(self, pairs: dict[str, str]) -> list[tuple[str, str]]:
        if self._chap is None:
            if pairs:
                raise errors.AuthenticationFailed("CHAP keys without AuthMethod=CHAP")
            return []
        return self._chap.step(pairs)

    @property
    def _authenticated(self) -> bool:
        if self._chap is not None:
            return self._chap.done
        return self._wanted_chap() is None

    def _advance(self, pdu: Pdu, answers: list[tuple[str, str]]) -> LoginResult | None:
        """Grant the transition that was asked for, unless authentication is not complete."""
        if not self._authenticated and (
            self._stage == OPERATIONAL_STAGE or (pdu.flags & TRANSIT and self._chap is None)
        ):
            raise errors.AuthenticationFailed("the target requires CHAP")
        granted = bool(pdu.flags & TRANSIT) and self._authenticated
        if not self._declared and (
            self._stage == OPERATIONAL_STAGE or (granted and pdu.flags & 3 == FULL_FEATURE)
        ):
            self._declared = True
            answers.append(("MaxRecvDataSegmentLength", str(limits.RECEIVE_DATA_SEGMENT_BYTES)))
        if not granted:
            self._reply(pdu, answers, False)
            return None
        if pdu.flags & 3 != FULL_FEATURE:
            self._reply(pdu, answers, True)
            self._stage = pdu.flags & 3
            return None
        return self._result(pdu, text.encode(answers))

    def _result(self, pdu: Pdu, final_text: bytes) -> LoginResult:
        def header(tsih: int, exp_cmd_sn: int, max_cmd_sn: int) -> bytes:
            return self._header(pdu, len(final_text), True, exp_cmd_sn, max_cmd_sn, tsih)

        return LoginResult(
            self.initiator_name,
            pdu.lun >> 16,
            pdu.word20 >> 16,
            pdu.cmd_sn,
            self.discovery,
            self.target,
            self.parameters,
            header,
            final_text,
        )

    def _reply(self, pdu: Pdu, answers: list[tuple[str, str]], granted: bool) -> None:
        body = text.encode(answers)
        self.put(
            self._header(pdu, len(body), granted, pdu.cmd_sn, pdu.cmd_sn, pdu.lun & 0xFFFF), body
        )

    def _header(
        self, pdu: Pdu, length: int, granted: bool, exp_cmd_sn: int, max_cmd_sn: int, tsih: int
    ) -> bytes:
        stat_sn = self.stat_sn
        self.stat_sn = stat_sn + 1
        flags = (TRANSIT | pdu.flags & 0x0F) if granted else pdu.flags & 0x0C
        lun = pdu.lun & ~0xFFFF | tsih
        return pack(
            LOGIN_RESPONSE,
            flags,
            pdu.itt,
            length=length,
            lun=lun,
            words=(0, stat_sn, exp_cmd_sn, max_cmd_sn, 0, 0, 0),
        )


def refusal(pdu: Pdu, stat_sn: int, status: int) -> bytes:
    """Login response with a status class and detail, after which the connection is closed."""
    words = (0, stat_sn, pdu.cmd_sn, pdu.cmd_sn, status << 16, 0, 0)
    return pack(LOGIN_RESPONSE, pdu.flags & 0x0C, pdu.itt, lun=pdu.lun, words=words)
