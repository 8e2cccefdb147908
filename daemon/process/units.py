"""Sizes, durations and rates as people write them (``10GiB``, ``30s``, ``100MiB/s``), in both
directions.

Only binary units with their binary names: a size of ``10GB`` would leave open which gigabyte is
meant, so it is refused with the names that are right.
"""

import re
from fractions import Fraction
from typing import Final

SIZE_UNITS: Final = {
    "": 1,
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "PiB": 1 << 50,
}
DURATION_UNITS: Final = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}
# Of everything that is counted in bytes here and on the wire, more than any pool can have.
SIZE_BYTES_MAX: Final = (1 << 63) - 1
_QUANTITY: Final = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,10})?) ?([A-Za-z]*)", re.ASCII)


class UnitError(ValueError):
    """Not a quantity of the kind wanted; the message says what would be right."""


def parse_size(text: str) -> int:
    """Bytes. ``4096``, ``64KiB``, ``1.5TiB``. Raises UnitError."""
    matched = _QUANTITY.fullmatch(text)
    if matched is None or matched[2] not in SIZE_UNITS:
        raise UnitError(
            f"{text!r} is not a size; write a number and one of B, KiB, MiB, GiB, TiB, PiB, as in"
            " 10GiB"
        )
    size_bytes = Fraction(matched[1]) * SIZE_UNITS[matched[2]]
    if size_bytes.denominator != 1:
        raise UnitError(f"{text!r} is no whole number of bytes")
    if size_bytes > SIZE_BYTES_MAX:
        raise UnitError(f"{text!r} is too large; a size is below 8192PiB")
    return int(size_bytes)


def parse_duration(text: str) -> float:
    """Seconds. ``500ms``, ``30s``, ``5m``, ``2h``, ``1d``. Raises UnitError."""
    matched = _QUANTITY.fullmatch(text)
    if matched is None or matched[2] not in DURATION_UNITS:
        raise UnitError(
            f"{text!r} is not a duration; write a number and one of ms, s, m, h, d, as in 30s"
        )
    return float(Fraction(matched[1]) * DURATION_UNITS[matched[2]])


def parse_rate(text: str) -> int:
    """Bytes a second, above zero. ``100MiB/s``. Raises UnitError."""
    try:
        rate_bytes = parse_size(text.removesuffix("/s")) if text.endswith("/s") else 0
    except UnitError:
        rate_bytes = 0
    if rate_bytes == 0:
        raise UnitError(f"{text!r} is not a rate; write a size above zero and /s, as in 100MiB/s")
    return rate_bytes


def format_size(size_bytes: float) -> str:
    """As people read it: ``0 B``, ``4 KiB``, ``1.5 TiB``. At most one decimal, so it may be
    rounded.
    """
    for unit in ("PiB", "TiB", "GiB", "MiB", "KiB"):
        if size_bytes >= SIZE_UNITS[unit]:
            return f"{size_bytes / SIZE_UNITS[unit]:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size_bytes:.0f} B"


def format_exact(size_bytes: int) -> str:
    """As people read it, and to the byte: ``1.5 TiB (1,649,267,441,664 bytes)``."""
    return f"{format_size(size_bytes)} ({size_bytes:,} bytes)"


def format_duration(seconds: float) -> str:
    """As people read it: ``0:07``, ``12:34``, ``3:25:45``."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
