"""Logical unit numbers (SAM-5 4.7): the number, and the eight bytes that travel."""

from typing import Final

_PERIPHERAL: Final = 0
_FLAT: Final = 1
_FLAT_BIT: Final = 0x4000
_PERIPHERAL_MAX: Final = 0xFF
NO_LUN: Final = -1


def encode_lun(lun: int) -> int:
    """The eight bytes as one number: peripheral addressing up to 255, flat addressing above."""
    return lun << 48 if lun <= _PERIPHERAL_MAX else (_FLAT_BIT | lun) << 48


def decode_lun(raw: int) -> int:
    """The number in eight bytes: single-level peripheral or flat addressing, else NO_LUN."""
    method, value, rest = raw >> 62, (raw >> 48) & 0x3FFF, raw & 0xFFFFFFFFFFFF
    if rest or method > _FLAT or (method == _PERIPHERAL and value > _PERIPHERAL_MAX):
        return NO_LUN
    return value
