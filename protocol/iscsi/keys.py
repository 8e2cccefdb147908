"""The keys of RFC 7143 clause 13 as one table, and how an offer and our own value make a result.

Login calls `answer` for each key that the peer offers; a key that is not in the table is
NotUnderstood.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from protocol.iscsi import limits
from protocol.iscsi.errors import LoginRefused

NONE: Final = "None"
CRC32C: Final = "CRC32C"
NOT_UNDERSTOOD: Final = "NotUnderstood"
REJECT: Final = "Reject"
IRRELEVANT: Final = "Irrelevant"
_RESERVED_ANSWERS: Final = frozenset((NOT_UNDERSTOOD, REJECT, IRRELEVANT))
_NUMBER_TEXT_MAX: Final = 12


@dataclass(slots=True)
class Parameters:
    """What a session has negotiated; the defaults are those of RFC 7143 clause 13. Lengths are
    bytes.
    """

    header_digest: bool = False
    data_digest: bool = False
    peer_data_segment_bytes: int = 8192
    initial_r2t: bool = True
    immediate_data: bool = True
    max_burst_bytes: int = 262144
    first_burst_bytes: int = 65536
    max_outstanding_r2t: int = 1
    error_recovery_level: int = 0

    @property
    def unsolicited_bytes(self) -> int:
        """How much a command may bring without being asked: FirstBurstLength, which never exceeds
        MaxBurstLength (13.14).
        """
        return min(self.first_burst_bytes, self.max_burst_bytes)


Combine = Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class NumberKey:
    """A number within a range; the result is ``combine(offer, ours)``. A declared one needs no
    answer.
    """

    ours: int
    low: int
    high: int
    combine: Combine | None
    field: str | None = None

    def answer(self, offer: str, parameters: Parameters) -> str | None:
        """The value to reply, None for a declaration; Reject for what is not a number
        in the range.
        """
        value = parse_number(offer)
        if value is None or not self.low <= value <= self.high:
            return REJECT
        result = value if self.combine is None else self.combine(value, self.ours)
        if self.field is not None:
            setattr(parameters, self.field, result)
        return None if self.combine is None else str(result)


@dataclass(frozen=True, slots=True)
class BooleanKey:
    """Yes or No; the result is the AND or the OR of both sides."""

    ours: bool
    both: bool
    field: str | None = None

    def answer(self, offer: str, parameters: Parameters) -> str | None:
        """The result, or Reject."""
        if offer not in ("Yes", "No"):
            return REJECT
        wanted = offer == "Yes"
        result = (wanted and self.ours) if self.both else (wanted or self.ours)
        if self.field is not None:
            setattr(parameters, self.field, result)
        return "Yes" if result else "No"


@dataclass(frozen=True, slots=True)
class ListKey:
    """The first value of the initiator's list that we support."""

    ours: tuple[str, ...]
    field: str | None = None

    def answer(self, offer: str, parameters: Parameters) -> str | None:
        """The value chosen, or Reject."""
        for value in offer.split(","):
            if value in self.ours:
                if self.field is not None:
                    setattr(parameters, self.field, value == CRC32C)
                return value
        return REJECT


@dataclass(frozen=True, slots=True)
class FixedKey:
    """A key that is answered in one way, whatever was offered."""

    value: str | None

    def answer(self, offer: str, parameters: Parameters) -> str | None:
        """The fixed answer; None for a declaration that needs none."""
        return self.value


Key = NumberKey | BooleanKey | ListKey | FixedKey

_LENGTH_MAX: Final = 0xFFFFFF  # lengths are 24 bits wide on the wire

# RFC 7143 clause 13, and the marker keys of RFC 3720 that older initiators still offer: No is the
# right answer to those.
OPERATIONAL: Final[dict[str, Key]] = {
    "HeaderDigest": ListKey((NONE, CRC32C), "header_digest"),
    "DataDigest": ListKey((NONE, CRC32C), "data_digest"),
    "MaxConnections": NumberKey(1, 1, 65535, min),
    "InitialR2T": BooleanKey(False, False, "initial_r2t"),
    "ImmediateData": BooleanKey(True, True, "immediate_data"),
    "MaxRecvDataSegmentLength": NumberKey(0, 512, _LENGTH_MAX, None, "peer_data_segment_bytes"),
    "MaxBurstLength": NumberKey(limits.MAX_BURST_BYTES, 512, _LENGTH_MAX, min, "max_burst_bytes"),
    "FirstBurstLength": NumberKey(
        limits.FIRST_BURST_BYTES, 512, _LENGTH_MAX, min, "first_burst_bytes"
    ),
    "DefaultTime2Wait": NumberKey(2, 0, 3600, max),
    "DefaultTime2Retain": NumberKey(0, 0, 3600, min),
    "MaxOutstandingR2T": NumberKey(1, 1, 65535, min, "max_outstanding_r2t"),
    "DataPDUInOrder": BooleanKey(True, False),
    "DataSequenceInOrder": BooleanKey(True, False),
    "ErrorRecoveryLevel": NumberKey(0, 0, 2, min, "error_recovery_level"),
    "TaskReporting": ListKey(("RFC3720",)),
    "iSCSIProtocolLevel": NumberKey(1, 0, 31, min),
    "IFMarker": BooleanKey(False, True),
    "OFMarker": BooleanKey(False, True),
    "IFMarkInt": FixedKey(IRRELEVANT),
    "OFMarkInt": FixedKey(IRRELEVANT),
    "InitiatorAlias": FixedKey(None),
}

# Declared in the first request, and fixed from then on.
DECLARED_FIRST: Final = frozenset(("InitiatorName", "TargetName", "SessionType"))
# In a discovery session these mean nothing (RFC 7143 clause 13, "irrelevant when").
_NOT_IN_DISCOVERY: Final = frozenset(
    (
        "MaxConnections",
        "InitialR2T",
        "ImmediateData",
        "MaxBurstLength",
        "FirstBurstLength",
        "MaxOutstandingR2T",
        "DataPDUInOrder",
        "DataSequenceInOrder",
    )
)


def parse_number(text: str) -> int | None:
    """A decimal or 0x number of RFC 7143 6.1, or None."""
    if len(text) > _NUMBER_TEXT_MAX:
        return None
    if text[:2] in ("0x", "0X"):
        return (
            int(text, 0)
            if text[2:] and all(c in "0123456789abcdefABCDEF" for c in text[2:])
            else None
        )
    return int(text) if text.isascii() and text.isdigit() else None


def answer(name: str, offer: str, parameters: Parameters, discovery: bool) -> str | None:
    """The reply to one operational key, None where none is due. Raises LoginRefused where an answer
    makes no sense as an offer.
    """
    key = OPERATIONAL.get(name)
    if key is None:
        return NOT_UNDERSTOOD
    if offer in _RESERVED_ANSWERS:
        raise LoginRefused(f"{name}={offer} is an answer, and nothing was asked")
    if discovery and name in _NOT_IN_DISCOVERY:
        return key.answer(offer, replace(parameters)) and IRRELEVANT
    return key.answer(offer, parameters)


def accept(name: str, value: str, parameters: Parameters) -> None:
    """The initiator's side: take over what the target answered. Raises LoginRefused for an answer
    that was not to choose.
    """
    key = OPERATIONAL.get(name)
    if key is None or value in _RESERVED_ANSWERS or isinstance(key, FixedKey) or key.field is None:
        return
    if isinstance(key, NumberKey):
        number = parse_number(value)
        if number is None or not key.low <= number <= key.high:
            raise LoginRefused(f"the target answered {name}={value[:40]}")
        setattr(parameters, key.field, number)
    elif isinstance(key, BooleanKey):
        setattr(parameters, key.field, value == "Yes")
    else:
        setattr(parameters, key.field, value == CRC32C)
