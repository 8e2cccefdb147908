"""The login phase of our initiator: security, then operational negotiation, then the full feature
phase.

It offers what a target may choose from, takes what the target chose, and refuses a target that
chose something else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from protocol.iscsi import keys, limits, text
from protocol.iscsi.chap import ChapSecrets, InitiatorExchange
from protocol.iscsi.errors import AuthenticationFailed, LoginRefused, ProtocolError
from protocol.iscsi.keys import Parameters
from protocol.iscsi.pdu import (
    CONTINUE,
    FULL_FEATURE,
    IMMEDIATE,
    LOGIN_REQUEST,
    LOGIN_RESPONSE,
    OPERATIONAL_STAGE,
    SECURITY_STAGE,
    TRANSIT,
    Pdu,
    pack,
)

_FIRST_ISID: Final = 0x80_0000_000001  # RFC 7143 11.12.5, type 10b (random qualifier)
_REASONS: Final = {
    0x0201: "authentication failed",
    0x0202: "not authorized for this target",
    0x0203: "no such target",
    0x0205: "unsupported version",
    0x0206: "too many connections",
    0x0207: "a parameter is missing",
    0x0209: "unsupported session type",
    0x020A: "no such session",
    0x020B: "invalid request during login",
    0x0301: "service unavailable",
    0x0302: "out of resources",
}


@dataclass(frozen=True, slots=True)
class InitiatorSettings:
    """Who logs in where, and what is offered. Lengths are bytes. An empty target name makes a
    discovery session.
    """

    initiator_name: str
    target_name: str = ""
    chap: ChapSecrets | None = None
    header_digest: bool = False
    data_digest: bool = False
    initial_r2t: bool = False
    immediate_data: bool = True
    unsolicited_data: bool = False
    data_segment_bytes: int = limits.RECEIVE_DATA_SEGMENT_BYTES
    max_burst_bytes: int = limits.MAX_BURST_BYTES
    first_burst_bytes: int = limits.FIRST_BURST_BYTES
    isid: int = _FIRST_ISID

    def offers(self) -> list[tuple[str, str]]:
        """Operational keys to offer, in the order of RFC 7143's examples."""
        digests = {False: "None", True: "CRC32C"}
        offered = [
            ("HeaderDigest", digests[self.header_digest]),
            ("DataDigest", digests[self.data_digest]),
            ("ErrorRecoveryLevel", "0"),
            ("DefaultTime2Wait", "2"),
            ("DefaultTime2Retain", "0"),
            ("MaxRecvDataSegmentLength", str(self.data_segment_bytes)),
        ]
        if not self.target_name:
            return offered
        yes = {False: "No", True: "Yes"}
        return [
            *offered,
            ("InitialR2T", yes[self.initial_r2t]),
            ("ImmediateData", yes[self.immediate_data]),
            ("MaxBurstLength", str(self.max_burst_bytes)),
            ("FirstBurstLength", str(self.first_burst_bytes)),
            ("MaxOutstandingR2T", "1"),
            ("MaxConnections", "1"),
            ("DataPDUInOrder", "Yes"),
            ("DataSequenceInOrder", "Yes"),
        ]


@dataclass(slots=True)
class InitiatorLogin:
    """State of a login. ``put`` queues a PDU; `handle` returns True when the full feature phase has
    begun.
    """

    settings: InitiatorSettings
    put: Callable[[bytes, bytes], None]
    parameters: Parameters = field(default_factory=Parameters)
    cmd_sn: int = 1
    exp_stat_sn: int = 0
    tsih: int = 0
    _stage: int = SECURITY_STAGE
    _collected: bytearray = field(default_factory=bytearray)
    _exchange: InitiatorExchange | None = None

    def start(self) -> None:
        """Send the leading request."""
        settings = self.settings
        pairs = [
            ("InitiatorName", settings.initiator_name),
            ("SessionType", "Normal" if settings.target_name else "Discovery"),
        ]
        if settings.target_name:
            pairs.append(("TargetName", settings.target_name))
        pairs.append(("AuthMethod", "None" if settings.chap is None else "CHAP"))
        self._request(pairs, transit=settings.chap is None)

    def _request(self, pairs: list[tuple[str, str]], transit: bool) -> None:
        body = text.encode(pairs)
        following = OPERATIONAL_STAGE if self._stage == SECURITY_STAGE else FULL_FEATURE
        flags = self._stage << 2 | (TRANSIT | following if transit else 0)
        lun = self.settings.isid << 16
        words = (0, self.cmd_sn, self.exp_stat_sn, 0, 0, 0, 0)
        self.put(
            pack(LOGIN_REQUEST | IMMEDIATE, flags, 0, length=len(body), lun=lun, words=words), body
        )

    def handle(self, pdu: Pdu) -> bool:
        """Take one login response. Raises LoginRefused with the target's status, or what the
        response breaks.
        """
        if pdu.opcode != LOGIN_RESPONSE:
            raise ProtocolError(f"opcode {pdu.opcode:#x} during login")
        status = pdu.word36 >> 16
        if status:
            refused = LoginRefused(
                f"login refused: {_REASONS.get(status, f'status {status:#06x}')}"
            )
            refused.status = status
            raise refused
        self.exp_stat_sn = (pdu.stat_sn + 1) & 0xFFFFFFFF
        self._collected += pdu.data
        if len(self._collected) > limits.LOGIN_TEXT_BYTES_MAX:
            raise ProtocolError("too much login text")
        if pdu.flags & CONTINUE:
            self._request([], transit=False)
            return False
        pairs = text.parse(bytes(self._collected))
        self._collected.clear()
        return self._take(pdu, pairs)

    def _take(self, pdu: Pdu, pairs: dict[str, str]) -> bool:
        for name, value in pairs.items():
            keys.accept(name, value, self.parameters)
        replies = self._authenticate(pairs) if self._stage == SECURITY_STAGE else []
        if pdu.flags & TRANSIT:
            self._check_transit(pdu)
            self._stage = pdu.flags & 3
            if self._stage == FULL_FEATURE:
                self.tsih = pdu.lun & 0xFFFF
                return True
            replies += self.settings.offers()
            self._request(replies, transit=True)
            return False
        self._request(replies, transit=self._exchange is None or self._proved(replies))
        return False

    def _check_transit(self, pdu: Pdu) -> None:
        """Raise where the target moves on without having been asked, or before it has proved
        itself.
        """
        if pdu.flags & 3 != (OPERATIONAL_STAGE if self._stage == SECURITY_STAGE else FULL_FEATURE):
            raise ProtocolError("the target moves to a stage that was not asked for")
        if (
            self._stage == SECURITY_STAGE
            and self.settings.chap is not None
            and not (self._exchange is not None and self._exchange.done)
        ):
            raise AuthenticationFailed(
                "the target ends the security stage before authentication has"
            )

    @staticmethod
    def _proved(replies: list[tuple[str, str]]) -> bool:
        """True for the request that carries our CHAP response: with it, or after it, the security
        stage can end.
        """
        return any(name == "CHAP_R" for name, _ in replies)

    def _authenticate(self, pairs: dict[str, str]) -> list[tuple[str, str]]:
        chap = self.settings.chap
        if chap is None:
            return []
        if self._exchange is None:
            if pairs.get("AuthMethod") != "CHAP":
                raise AuthenticationFailed(
                    "the target does not want the authentication that was asked for"
                )
            self._exchange = InitiatorExchange(chap)
        return self._exchange.step(
            {name: value for name, value in pairs.items() if name.startswith("CHAP_")}
        )
