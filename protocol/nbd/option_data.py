"""Data of options ("Option types"), parsed. Whatever does not follow the document is answered with
NBD_REP_ERR_INVALID.
"""

from struct import Struct
from typing import Final, NamedTuple

from protocol.nbd import limits, wire
from protocol.nbd.errors import OptionRefused

_SHORT: Final = Struct(">H")


class InfoRequest(NamedTuple):
    """Data of NBD_OPT_INFO and NBD_OPT_GO."""

    name: str
    wanted: frozenset[int]


class ContextQuery(NamedTuple):
    """Data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""

    name: str
    queries: list[str]


def decode_string(data: bytes) -> str:
    """A string as "Conventions" allows it. Raises OptionRefused."""
    if len(data) > limits.STRING_BYTES_MAX:
        raise _invalid(
            f"a string of {len(data)} bytes, where {limits.STRING_BYTES_MAX} are the most"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise _invalid("a string that is not UTF-8") from None
    if "\0" in text:
        raise _invalid("a string with a NUL in it")
    return text


def parse_info(data: bytes) -> InfoRequest:
    """Name, and the set of information types asked for. Raises OptionRefused."""
    reader = _Reader(data)
    name = reader.string()
    count = reader.number(_SHORT)
    wanted = frozenset(reader.number(_SHORT) for _ in range(reader.at_most(count, 2)))
    reader.end()
    return InfoRequest(name, wanted)


def parse_contexts(data: bytes) -> ContextQuery:
    """Name of the export, and the queries. Raises OptionRefused."""
    reader = _Reader(data)
    name = reader.string()
    count = reader.at_most(reader.number(wire.LENGTH), wire.LENGTH.size)
    if count > limits.QUERIES_MAX:
        raise OptionRefused(
            wire.REP_ERR_TOO_BIG, f"{count} queries, where {limits.QUERIES_MAX} are the most"
        )
    queries = [reader.string() for _ in range(count)]
    reader.end()
    return ContextQuery(name, queries)


def parse_nothing(data: bytes) -> None:
    """An option without data. Raises OptionRefused."""
    if data:
        raise _invalid(f"{len(data)} bytes of data with an option that has none")


class _Reader:
    """Goes through the data once; what goes beyond its end is refused."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, layout: Struct) -> int:
        value: int = layout.unpack(self._take(layout.size))[0]
        return value

    def string(self) -> str:
        return decode_string(self._take(self.number(wire.LENGTH)))

    def at_most(self, count: int, item_bytes: int) -> int:
        """``count`` itself, if so many items of at least ``item_bytes`` can follow."""
        if count * item_bytes > len(self._data) - self._at:
            raise _invalid(f"{count} items, which its length has no room for")
        return count

    def end(self) -> None:
        if self._at != len(self._data):
            raise _invalid(f"{len(self._data) - self._at} bytes too many")

    def _take(self, size: int) -> bytes:
        at = self._at
        if size > len(self._data) - at:
            raise _invalid("data that end before what they announce")
        self._at = at + size
        return self._data[at : at + size]


def _invalid(message: str) -> OptionRefused:
    return OptionRefused(wire.REP_ERR_INVALID, message)
