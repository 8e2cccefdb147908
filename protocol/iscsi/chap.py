"""CHAP for iSCSI (RFC 1994, RFC 7143 12.1.3): responses, challenges, and the two sides of the
exchange.

A secret leaves this module only as a response, and is compared in constant time.
"""

import hmac
import secrets
from base64 import b64decode
from binascii import Error as Base64Error
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import md5, sha1, sha3_256, sha256
from typing import Any, Final

from protocol.iscsi.errors import AuthenticationFailed
from protocol.iscsi.keys import parse_number
from protocol.iscsi.limits import CHALLENGE_BYTES, CHALLENGE_BYTES_MAX, CHALLENGES_REMEMBERED
from protocol.names import fold

# RFC 7143 12.1.3 and the IANA registry of PPP authentication algorithms.
ALGORITHMS: Final[dict[str, Callable[[bytes], Any]]] = {
    "5": md5,
    "6": sha1,
    "7": sha256,
    "8": sha3_256,
}
# In the order in which our initiator offers them: strongest first.
ALGORITHMS_OFFERED: Final = "8,7,6,5"
_HEX_DIGITS: Final = frozenset("0123456789abcdefABCDEF")


@dataclass(frozen=True, slots=True)
class ChapSecrets:
    """What an initiator has to prove (``user``, ``secret``), and what the target proves in return
    if asked.

    ``user_is_iscsi_name``: the user is the initiator's own name, which has no case.
    """

    user: str
    secret: bytes
    target_user: str | None = None
    target_secret: bytes | None = None
    user_is_iscsi_name: bool = False

    def __repr__(self) -> str:
        return f"ChapSecrets(user={self.user!r}, mutual={self.target_user is not None})"


def response(algorithm: str, identifier: int, secret: bytes, challenge: bytes) -> bytes:
    """The digest over identifier, secret and challenge (RFC 1994 4.1)."""
    digest: bytes = ALGORITHMS[algorithm](bytes((identifier,)) + secret + challenge).digest()
    return digest


def decode_binary(text: str) -> bytes:
    """A large binary value: 0x hexadecimal or 0b base64 (RFC 7143 6.1). Raises
    AuthenticationFailed.
    """
    kind, digits = text[:2].lower(), text[2:]
    if kind == "0x" and digits and set(digits) <= _HEX_DIGITS:
        return bytes.fromhex(digits if len(digits) % 2 == 0 else "0" + digits)
    if kind == "0b":
        try:
            return b64decode(digits, validate=True)
        except (Base64Error, ValueError) as error:
            raise AuthenticationFailed("a CHAP value is not base64") from error
    raise AuthenticationFailed("a CHAP value is neither hexadecimal nor base64")


def encode_binary(value: bytes) -> str:
    """Hexadecimal with the prefix, which every initiator understands."""
    return "0x" + value.hex()


def choose_algorithm(offered: str) -> str:
    """The first algorithm of a CHAP_A list that we support. Raises AuthenticationFailed."""
    for name in offered.split(","):
        if name in ALGORITHMS:
            return name
    raise AuthenticationFailed(f"none of the CHAP algorithms {offered[:40]!r} is supported")


class Challenges:
    """The challenges that this node sent last, on all connections.

    A peer that wants our response to our own challenge (reflection, RFC 7143 9.2.1) has to send it
    back to us, on this or another connection. A challenge that is remembered here is refused.
    """

    __slots__ = ("_order", "_recent")

    def __init__(self) -> None:
        self._recent: set[bytes] = set()
        self._order: deque[bytes] = deque()

    def new(self) -> bytes:
        """A fresh random challenge."""
        challenge = secrets.token_bytes(CHALLENGE_BYTES)
        self._recent.add(challenge)
        self._order.append(challenge)
        if len(self._order) > CHALLENGES_REMEMBERED:
            self._recent.discard(self._order.popleft())
        return challenge

    def refuse_own(self, challenge: bytes) -> None:
        """Raise AuthenticationFailed for a challenge that is ours, or of a length out of bounds."""
        if not 1 <= len(challenge) <= CHALLENGE_BYTES_MAX:
            raise AuthenticationFailed("a CHAP challenge of a wrong length")
        if challenge in self._recent:
            raise AuthenticationFailed("a CHAP challenge of our own was sent back")


class TargetExchange:
    """The target's part: CHAP_A chooses, CHAP_N and CHAP_R prove, and with CHAP_I and CHAP_C the
    target proves itself.
    """

    __slots__ = ("_algorithm", "_challenge", "_challenges", "_identifier", "_secrets", "done")

    def __init__(self, wanted: ChapSecrets, challenges: Challenges) -> None:
        self._secrets = wanted
        self._challenges = challenges
        self._algorithm: str | None = None
        self._challenge = b""
        self._identifier = 0
        self.done = False

    def step(self, keys: dict[str, str]) -> list[tuple[str, str]]:
        """Take the CHAP keys of one request, return those of the reply. Raises
        AuthenticationFailed.
        """
        if self.done or not keys:
            if keys:
                raise AuthenticationFailed("CHAP keys after the exchange has ended")
            return []
        if self._algorithm is None:
            return self._offer(keys)
        return self._verify(keys)

    def _offer(self, keys: dict[str, str]) -> list[tuple[str, str]]:
        if set(keys) != {"CHAP_A"}:
            raise AuthenticationFailed("CHAP begins with CHAP_A")
        self._algorithm = choose_algorithm(keys["CHAP_A"])
        self._identifier = secrets.randbelow(256)
        self._challenge = self._challenges.new()
        return [
            ("CHAP_A", self._algorithm),
            ("CHAP_I", str(self._identifier)),
            ("CHAP_C", encode_binary(self._challenge)),
        ]

    def _verify(self, keys: dict[str, str]) -> list[tuple[str, str]]:
        if "CHAP_N" not in keys or "CHAP_R" not in keys or ("CHAP_I" in keys) != ("CHAP_C" in keys):
            raise AuthenticationFailed("CHAP keys are missing")
        assert self._algorithm is not None
        expected = response(
            self._algorithm, self._identifier, self._secrets.secret, self._challenge
        )
        given = decode_binary(keys["CHAP_R"])
        spelled = fold if self._secrets.user_is_iscsi_name else str
        right_user = hmac.compare_digest(
            spelled(keys["CHAP_N"]).encode(), spelled(self._secrets.user).encode()
        )
        if not hmac.compare_digest(given, expected) or not right_user:
            raise AuthenticationFailed("wrong CHAP user or response")
        self.done = True
        return self._prove(keys) if "CHAP_C" in keys else []

    def _prove(self, keys: dict[str, str]) -> list[tuple[str, str]]:
        user, secret = self._secrets.target_user, self._secrets.target_secret
        if user is None or secret is None:
            raise AuthenticationFailed(
                "the initiator wants mutual CHAP and the target has no secret for it"
            )
        challenge = decode_binary(keys["CHAP_C"])
        self._challenges.refuse_own(challenge)
        if hmac.compare_digest(secret, self._secrets.secret):
            raise AuthenticationFailed(
                "the two secrets of mutual CHAP must differ (RFC 7143 9.2.1)"
            )
        assert self._algorithm is not None
        answer = response(self._algorithm, parse_identifier(keys["CHAP_I"]), secret, challenge)
        return [("CHAP_N", user), ("CHAP_R", encode_binary(answer))]


class InitiatorExchange:
    """The initiator's part; with target credentials it demands that the target proves itself."""

    __slots__ = ("_algorithm", "_challenge", "_identifier", "_secrets", "_stage", "done")

    def __init__(self, own: ChapSecrets) -> None:
        self._secrets = own
        self._algorithm = ""
        self._challenge = b""
        self._identifier = 0
        self._stage = 0
        self.done = False

    def step(self, keys: dict[str, str]) -> list[tuple[str, str]]:
        """Take the CHAP keys of a reply, return those of the next request. Raises
        AuthenticationFailed.
        """
        self._stage += 1
        if self._stage == 1:
            return [("CHAP_A", ALGORITHMS_OFFERED)]
        if self._stage == 2:
            return self._answer(keys)
        if self._secrets.target_secret is not None:
            self._check_target(keys, self._secrets.target_secret)
        self.done = True
        return []

    def _answer(self, keys: dict[str, str]) -> list[tuple[str, str]]:
        if not {"CHAP_A", "CHAP_I", "CHAP_C"} <= set(keys) or keys["CHAP_A"] not in ALGORITHMS:
            raise AuthenticationFailed("the target's CHAP challenge is incomplete")
        self._algorithm = keys["CHAP_A"]
        challenge = decode_binary(keys["CHAP_C"])
        proof = response(
            self._algorithm, parse_identifier(keys["CHAP_I"]), self._secrets.secret, challenge
        )
        reply = [("CHAP_N", self._secrets.user), ("CHAP_R", encode_binary(proof))]
        if self._secrets.target_secret is not None:
            self._identifier = secrets.randbelow(256)
            self._challenge = secrets.token_bytes(CHALLENGE_BYTES)
            reply += [("CHAP_I", str(self._identifier)), ("CHAP_C", encode_binary(self._challenge))]
        return reply

    def _check_target(self, keys: dict[str, str], secret: bytes) -> None:
        expected = response(self._algorithm, self._identifier, secret, self._challenge)
        right_user = keys.get("CHAP_N") == self._secrets.target_user
        if not right_user or not hmac.compare_digest(
            decode_binary(keys.get("CHAP_R", "")), expected
        ):
            raise AuthenticationFailed("the target did not prove itself")


def parse_identifier(text: str) -> int:
    """CHAP_I: one byte as a number. Raises AuthenticationFailed."""
    value = parse_number(text)
    if value is None or value > 255:
        raise AuthenticationFailed("CHAP_I is no number of one byte")
    return value
