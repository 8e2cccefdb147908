"""Text of login and text PDUs: ``key=value`` pairs, each ended by a zero byte (RFC 7143 6.1)."""

from collections.abc import Iterable

from protocol.iscsi.errors import TextError
from protocol.iscsi.limits import KEY_NAME_BYTES_MAX, KEY_VALUE_BYTES_MAX, KEYS_MAX


def parse_list(data: bytes) -> list[tuple[str, str]]:
    """Pairs in the order they came; keys may repeat (SendTargets answers). Raises TextError for an
    item that is no pair.
    """
    return [_pair(item) for item in data.split(b"\0") if item]


def parse(data: bytes) -> dict[str, str]:
    """Pairs of a negotiation. Raises TextError for an item that is no pair, a key offered twice, or
    too many keys.
    """
    items = parse_list(data)
    if len(items) > KEYS_MAX:
        raise TextError(f"more than {KEYS_MAX} keys")
    pairs = dict(items)
    if len(pairs) != len(items):
        raise TextError("a key twice")
    return pairs


def _pair(item: bytes) -> tuple[str, str]:
    key, equals, value = item.partition(b"=")
    if not equals or not key or len(key) > KEY_NAME_BYTES_MAX or len(value) > KEY_VALUE_BYTES_MAX:
        raise TextError("a text item that is no key=value pair, or a longer one than allowed")
    try:
        return key.decode("ascii"), value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError("text that is not UTF-8") from error


def encode(pairs: Iterable[tuple[str, str]]) -> bytes:
    """The bytes of ``pairs``."""
    return b"".join(f"{key}={value}".encode() + b"\0" for key, value in pairs)
