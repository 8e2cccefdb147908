"""LOG SENSE (SPC-4 6.8, 7.3; SBC-3 6.4.5): how much of its pool a volume uses, and how much of a
clone is still backed.

The clone page is ours (page code 30h, in the vendor specific range). Its parameters, each a number
of 8 bytes: 0001h blocks of 4096 bytes that are still read from the backing store; 0002h the same
when the split began; 0003h the state: 0 no backing store, 1 backed and no split running, 2 a split
is running. A parameter whose value is not known is left out.
"""

from collections.abc import Callable
from struct import Struct
from typing import Final

from protocol.scsi import opcodes, sense
from protocol.scsi.command import Command, Request, cut
from protocol.scsi.errors import CheckCondition
from protocol.scsi.limits import SECTOR_SHIFT, THRESHOLD_EXPONENT
from protocol.scsi.logical_unit import LogicalUnit
from protocol.scsi.plan import Plan
from protocol.volume import ReportsSplit, ReportsUsage

SUPPORTED_PAGES: Final = 0x00
LOGICAL_BLOCK_PROVISIONING: Final = 0x0C
CLONE: Final = 0x30
HOLES_REMAINING: Final = 0x0001
HOLES_TOTAL: Final = 0x0002
STATE: Final = 0x0003
NOT_BACKED, BACKED, SPLITTING = range(3)
_ALL_SUBPAGES: Final = 0xFF
_CUMULATIVE: Final = 1  # page control 01b; there are no thresholds and no defaults
_HEAD: Final = Struct(">BBH")
_PARAMETER_HEAD: Final = Struct(">HBB")
_BINARY_LIST: Final = 0x03  # format and linking: a list parameter in binary
_COUNT: Final = Struct(">IB3x")
_AVAILABLE: Final = 0x0001
_USED: Final = 0x0002
_SCOPE_UNIT: Final = 0x01
_SCOPE_SHARED: Final = 0x02
_COUNT_SHIFT: Final = SECTOR_SHIFT + THRESHOLD_EXPONENT
_COUNT_MAX: Final = 0xFFFFFFFF


def _parameter(code: int, value: bytes) -> tuple[int, bytes]:
    return code, _PARAMETER_HEAD.pack(code, _BINARY_LIST, len(value)) + value


def _provisioning(unit: LogicalUnit) -> list[tuple[int, bytes]]:
    volume = unit.volume
    if not isinstance(volume, ReportsUsage):
        return []
    found = volume.usage()
    available, used = found.available_bytes >> _COUNT_SHIFT, -(-found.used_bytes >> _COUNT_SHIFT)
    return [
        _parameter(_AVAILABLE, _COUNT.pack(min(available, _COUNT_MAX), _SCOPE_SHARED)),
        _parameter(_USED, _COUNT.pack(min(used, _COUNT_MAX), _SCOPE_UNIT)),
    ]


def _clone(unit: LogicalUnit) -> list[tuple[int, bytes]]:
    volume = unit.volume
    found = volume.split_state() if isinstance(volume, ReportsSplit) else None
    if found is None:
        return [_parameter(STATE, NOT_BACKED.to_bytes(8, "big"))]
    numbers = (
        (HOLES_REMAINING, found.holes_remaining_blocks),
        (HOLES_TOTAL, found.holes_total_blocks),
    )
    told = [
        _parameter(code, number.to_bytes(8, "big"))
        for code, number in numbers
        if number is not None
    ]
    return [*told, _parameter(STATE, (SPLITTING if found.running else BACKED).to_bytes(8, "big"))]


PAGES: Final[dict[int, Callable[[LogicalUnit], list[tuple[int, bytes]]]]] = {
    LOGICAL_BLOCK_PROVISIONING: _provisioning,
    CLONE: _clone,
}


def _supported(with_subpages: bool) -> bytes:
    codes = (SUPPORTED_PAGES, *sorted(PAGES))
    if not with_subpages:
        return _HEAD.pack(SUPPORTED_PAGES, 0, len(codes)) + bytes(codes)
    pairs = [
        (SUPPORTED_PAGES, 0),
        (SUPPORTED_PAGES, _ALL_SUBPAGES),
        *((code, 0) for code in sorted(PAGES)),
    ]
    return _HEAD.pack(SUPPORTED_PAGES | 0x40, _ALL_SUBPAGES, 2 * len(pairs)) + bytes(
        byte for pair in pairs for byte in pair
    )


def log_sense(request: Request) -> Plan:
    """LOG SENSE: the page from the parameter on that the parameter pointer names. Nothing is saved,
    and nothing can be changed.
    """
    cdb = request.cdb
    code, subpage = cdb[2] & 0x3F, cdb[3]
    allocation, first = int.from_bytes(cdb[7:9], "big"), int.from_bytes(cdb[5:7], "big")
    if cdb[2] >> 6 != _CUMULATIVE:
        raise CheckCondition(sense.invalid_field_in_cdb(2, 7))
    if code == SUPPORTED_PAGES and subpage in (0, _ALL_SUBPAGES):
        return cut(_supported(subpage == _ALL_SUBPAGES), allocation)
    page = PAGES.get(code)
    if page is None:
        raise CheckCondition(sense.invalid_field_in_cdb(2, 5))
    if subpage:
        raise CheckCondition(sense.invalid_field_in_cdb(3))
    parameters = page(request.unit)
    if first and (not parameters or first > parameters[-1][0]):
        # SPC-4 6.8: a pointer above the highest code that there is.
        raise CheckCondition(sense.invalid_field_in_cdb(5))
    body = b"".join(encoded for number, encoded in parameters if number >= first)
    return cut(_HEAD.pack(code, 0, len(body)) + body, allocation)


COMMANDS: Final = (
    Command(opcodes.LOG_SENSE, "LOG SENSE", "00ffff00ffffffff00", log_sense, despite_sanitize=True),
)
