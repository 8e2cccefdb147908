"""MODE SENSE and MODE SELECT (SPC-4 6.10, 7.5; SBC-3 6.5): error recovery, caching, control,
informational exceptions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final

from protocol.scsi import opcodes, sense
from protocol.scsi.command import NO_DATA, Command, Request, cut
from protocol.scsi.errors import CheckCondition
from protocol.scsi.limits import SECTOR_BYTES
from protocol.scsi.logical_unit import LogicalUnit
from protocol.scsi.plan import Operation, Plan
from protocol.volume import Buffer, Completion

_CHANGEABLE: Final = 1
_SAVED: Final = 3
_ALL_PAGES: Final = 0x3F
_ALL_SUBPAGES: Final = 0xFF
_WRITE_PROTECT: Final = 0x80
_DPOFUA: Final = 0x10
_WCE: Final = 0x04
_PS: Final = 0x80  # in the page code: the page can be saved
_SP: Final = 0x01
_D_SENSE: Final = 0x04
_SWP: Final = 0x08
_SHORT_DESCRIPTOR: Final = Struct(">II")
_LONG_DESCRIPTOR: Final = Struct(">Q4xI")
_LONG_LBA: Final = 0x01


@dataclass(frozen=True, slots=True)
class ModePage:
    """One mode page: its bytes now, and the mask of what MODE SELECT may change."""

    code: int
    current: Callable[[LogicalUnit], bytes]
    changeable: bytes
    apply: Callable[[LogicalUnit, bytes], None]


def _error_recovery(_unit: LogicalUnit) -> bytes:
    # AWRE and ARRE: the store repairs what it can by itself.
    return bytes((0x01, 0x0A)) + b"\xc0" + bytes(9)


def _caching(unit: LogicalUnit) -> bytes:
    return bytes((_PS | 0x08, 0x12, _WCE if unit.write_cache else 0)) + bytes(17)


def _control(unit: LogicalUnit) -> bytes:
    page = bytearray((0x0A, 0x0A)) + bytearray(10)
    page[2] = _D_SENSE if unit.descriptor_sense else 0
    page[3] = 0x10  # unrestricted reordering allowed: simple commands have no order
    page[4] = _SWP if unit.software_write_protect else 0
    return bytes(page)


def _exceptions(_unit: LogicalUnit) -> bytes:
    return bytes((0x1C, 0x0A)) + bytes(10)


def _keep(_unit: LogicalUnit, _page: bytes) -> None:
    """Nothing of the page can be changed; that it carries no change has been checked."""


def _apply_caching(unit: LogicalUnit, page: bytes) -> None:
    unit.write_cache = bool(page[2] & _WCE)


def _apply_control(unit: LogicalUnit, page: bytes) -> None:
    unit.descriptor_sense = bool(page[2] & _D_SENSE)
    unit.software_write_protect = bool(page[4] & _SWP)


PAGES: Final = (
    ModePage(0x01, _error_recovery, bytes((0x01, 0x0A)) + bytes(10), _keep),
    ModePage(0x08, _caching, bytes((_PS | 0x08, 0x12, _WCE)) + bytes(17), _apply_caching),
    ModePage(0x0A, _control, bytes((0x0A, 0x0A, _D_SENSE, 0, _SWP)) + bytes(7), _apply_control),
    ModePage(0x1C, _exceptions, bytes((0x1C, 0x0A)) + bytes(10), _keep),
)
_BY_CODE: Final = {page.code: page for page in PAGES}


def _selected(cdb: bytes) -> tuple[ModePage, ...]:
    code, subpage = cdb[2] & 0x3F, cdb[3]
    if subpage not in (0, _ALL_SUBPAGES):
        raise CheckCondition(sense.invalid_field_in_cdb(3))
    if code == _ALL_PAGES:
        return PAGES
    page = _BY_CODE.get(code)
    if page is None:
        raise CheckCondition(sense.invalid_field_in_cdb(2, 5))
    return (page,)


def _page_bytes(request: Request) -> bytes:
    control = request.cdb[2] >> 6
    if control == _CHANGEABLE:
        return b"".join(page.changeable for page in _selected(request.cdb))
    # What a fresh unit holds is the default (page control 10b); the current values are page control
    # 00b. The saved values are the default ones, but for the write cache.
    unit = LogicalUnit(request.unit.volume) if control else request.unit
    if control == _SAVED:
        unit.write_cache = request.unit.saved_write_cache
    return b"".join(page.current(unit) for page in _selected(request.cdb))


def _device_specific(unit: LogicalUnit) -> int:
    return _DPOFUA | (_WRITE_PROTECT if unit.write_protected else 0)


def _block_descriptor(unit: LogicalUnit, long_lba: bool) -> bytes:
    if long_lba:
        return _LONG_DESCRIPTOR.pack(unit.sectors, SECTOR_BYTES)
    return _SHORT_DESCRIPTOR.pack(min(unit.sectors, 0xFFFFFFFF), SECTOR_BYTES)


def mode_sense_6(request: Request) -> Plan:
    """MODE SENSE(6)."""
    unit, cdb = request.unit, request.cdb
    descriptor = b"" if cdb[1] & 0x08 else _block_descriptor(unit, False)
    pages = _page_bytes(request)
    head = bytes((3 + len(descriptor) + len(pages), 0, _device_specific(unit), len(descriptor)))
    return cut(head + descriptor + pages, cdb[4])


def mode_sense_10(request: Request) -> Plan:
    """MODE SENSE(10), with long LBA descriptors where the client accepts them."""
    unit, cdb = request.unit, request.cdb
    long_lba = bool(cdb[1] & 0x10)
    descriptor = b"" if cdb[1] & 0x08 else _block_descriptor(unit, long_lba)
    pages = _page_bytes(request)
    flags = _LONG_LBA if long_lba and descriptor else 0
    length = 6 + len(descriptor) + len(pages)
    head = (
        length.to_bytes(2, "big")
        + bytes((0, _device_specific(unit), flags, 0))
        + len(descriptor).to_bytes(2, "big")
    )
    return cut(head + descriptor + pages, int.from_bytes(cdb[7:9], "big"))


def _parse_pages(data: bytes, position: int) -> Iterator[tuple[ModePage, bytes, int]]:
    while position < len(data):
        if len(data) - position < 2 or len(data) - position < 2 + data[position + 1]:
            raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
        page = _BY_CODE.get(data[position] & 0x3F)
        if page is None or data[position] & 0x40:
            raise CheckCondition(sense.invalid_field_in_parameter_list(position))
        if data[position + 1] != page.changeable[1]:
            raise CheckCondition(sense.invalid_field_in_parameter_list(position + 1))
        yield page, data[position : position + len(page.changeable)], position
        position += len(page.changeable)


def _check_changes(unit: LogicalUnit, page: ModePage, wanted: bytes, position: int) -> None:
    now = page.current(unit)
    for index in range(2, len(wanted)):
        if (wanted[index] ^ now[index]) & ~page.changeable[index]:
            raise CheckCondition(sense.invalid_field_in_parameter_list(position + index))


def _apply(request: Request, data: bytes, head_bytes: int, descriptor_bytes: int) -> None:
    """Check the whole list before applying it, so that a refused list changes nothing."""
    unit = request.unit
    before = (unit.write_cache, unit.descriptor_sense, unit.software_write_protect)
    pages = list(_parse_pages(data, head_bytes + descriptor_bytes))
    for page, wanted, position in pages:
        _check_changes(unit, page, wanted, position)
    for page, wanted, _ in pages:
        page.apply(unit, wanted)
    unit.state_changed()
    if before != (unit.write_cache, unit.descriptor_sense, unit.software_write_protect):
        unit.attention(sense.MODE_PARAMETERS_CHANGED, except_for=request.mapped)


def _select(request: Request, list_bytes: int, head_bytes: int) -> Plan:
    if list_bytes == 0:
        return NO_DATA

    def start(received: Buffer, done: Completion) -> None:
        data = bytes(received)
        if len(data) < head_bytes:
            done(CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR))
            return
        descriptor = data[3] if head_bytes == 4 else int.from_bytes(data[6:8], "big")
        if len(data) < head_bytes + descriptor:
            done(CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR))
            return
        try:
            _apply(request, data, head_bytes, descriptor)
        except CheckCondition as error:
            done(error)
            return
        if request.cdb[1] & _SP:
            _save(request.unit, done)
        else:
            done(None)

    return Operation(list_bytes, start)


def _save(unit: LogicalUnit, done: Completion) -> None:
    """Make the write cache's state outlive resets and restarts. Linux asks for it when the page can
    be saved.
    """
    before = unit.saved_write_cache
    unit.saved_write_cache = unit.write_cache

    def kept(error: Exception | None) -> None:
        if error is not None:
            unit.saved_write_cache = before
        done(error)

    unit.keep(kept)


def mode_select_6(request: Request) -> Plan:
    """MODE SELECT(6): write cache, descriptor sense, software write protect; with SP, the write
    cache's state is saved.
    """
    return _select(request, request.cdb[4], 4)


def mode_select_10(request: Request) -> Plan:
    """MODE SELECT(10)."""
    return _select(request, int.from_bytes(request.cdb[7:9], "big"), 8)


COMMANDS: Final = (
    Command(opcodes.MODE_SENSE_6, "MODE SENSE(6)", "08ffffff00", mode_sense_6),
    Command(opcodes.MODE_SENSE_10, "MODE SENSE(10)", "18ffff000000ffff00", mode_sense_10),
    Command(opcodes.MODE_SELECT_6, "MODE SELECT(6)", "110000ff00", mode_select_6, reserved=True),
    Command(
        opcodes.MODE_SELECT_10,
        "MODE SELECT(10)",
        "110000000000ffff00",
        mode_select_10,
        reserved=True,
    ),
)
