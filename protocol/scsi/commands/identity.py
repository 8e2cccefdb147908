"""INQUIRY and the vital product data pages (SPC-4 6.6, 7.8; SBC-3 6.6), REPORT LUNS
(SPC-4 6.33).
"""

from collections.abc import Callable
from struct import Struct
from typing import Final

from protocol.names import PORTAL_GROUP_TAG, target_port
from protocol.scsi import limits, opcodes, sense
from protocol.scsi.command import Command, Request, cut
from protocol.scsi.errors import CheckCondition
from protocol.scsi.logical_unit import LogicalUnit, Nexus
from protocol.scsi.lun import encode_lun
from protocol.scsi.plan import Plan

VENDOR: Final = b"CLEAVED "
PRODUCT: Final = b"VDISK           "
REVISION: Final = b"0001"

# Peripheral qualifier 011b, device type 1Fh: no logical unit can be at this LUN.
_NO_UNIT: Final = 0x7F
_VERSION_SPC4: Final = 0x06
_HISUP_FORMAT_2: Final = 0x12
_CMDQUE: Final = 0x02
_THIRD_PARTY_COPY: Final = 0x08  # 3PC: EXTENDED COPY is supported
_STANDARD: Final = Struct(">BBBBBBBB8s16s4s22x8H22x")
# SAM-5, iSCSI, SPC-4, SBC-3 without a version claimed (SPC-4 table 142).
_VERSION_DESCRIPTORS: Final = (0x00A0, 0x0960, 0x0460, 0x04C0, 0, 0, 0, 0)
# NAA 6 has no form without an IEEE company id, and this project has registered none. So it is one
# that IEEE does not assign: the U/L bit (02h of the first octet) says that it is locally
# administered, and the lower digit 2 puts it into the quadrant that IEEE 802c leaves to local
# administrators (AAI; the ids that IEEE does assign there, CIDs, have the digit A). So it is no
# registered company's, and the bits of the UUID behind it keep disks apart.
_COMPANY_ID: Final = 0xC2EAED
_PAGE_HEAD: Final = Struct(">BBH")
_DESIGNATOR_HEAD: Final = Struct(">BBxB")
_ISCSI_PROTOCOL: Final = 0x50
_ASSOCIATION_PORT: Final = 0x90  # PIV set, association: target port
_PORT_GROUP: Final = 1  # target port group
_BLOCK_LIMITS: Final = Struct(">BBHIIIIIIIQIII8x")
# WSNZ: a WRITE SAME of length zero, which would reach to the end, is refused. libiscsi's suite
# expects of the other choice that UNMAP with a pattern of ones reads as zeros; SBC-3 4.7.3.4.4
# wants the pattern written, and so it is here.
_WRITE_SAME_NON_ZERO: Final = 0x01
_NON_ROTATING: Final = 1
# WABEREQ 01b: after a block erase sectors can be read without being written first.
_READABLE_AFTER_ERASE: Final = 0x40
# LBPU, LBPWS, LBPWS10, LBPRZ = 001b: deallocated blocks read as zeros.
_PROVISIONING_FLAGS: Final = 0x80 | 0x40 | 0x20 | 0x04
_PROVISIONING_THIN: Final = 2


def _standard(request: Request) -> bytes:
    peripheral = 0 if request.mapped is not None else _NO_UNIT
    size = _STANDARD.size
    head = (peripheral, 0, _VERSION_SPC4, _HISUP_FORMAT_2, size - 5, _THIRD_PARTY_COPY, 0, _CMDQUE)
    return _STANDARD.pack(*head, VENDOR, PRODUCT, REVISION, *_VERSION_DESCRIPTORS)


def serial_number(unit: LogicalUnit) -> bytes:
    """Unit serial number: the volume's UUID in hexadecimal."""
    return unit.uuid.hex.encode()


def _designator(code_set: int, kind: int, value: bytes) -> bytes:
    first, second = (
        (_ISCSI_PROTOCOL | code_set, _ASSOCIATION_PORT | kind)
        if kind in (4, 5) or kind == 8
        else (code_set, kind)
    )
    return _DESIGNATOR_HEAD.pack(first, second, len(value)) + value


def _naa_registered_extended(unit: LogicalUnit) -> bytes:
    """NAA 6 (SPC-4 7.8.6.6.5): company id, then 100 bits of the UUID, random ones in one of version
    4.

    It comes first. scsi_id, the udev rules of sg3_utils, and multipath all prefer it to every other
    designator, so that a disk has one name in all three. Without it each would choose another one:
    scsi_id NAA 3, the udev rules T10.
    """
    digits = unit.uuid.hex
    return bytes.fromhex(f"6{_COMPANY_ID:06x}{digits[:12]}{digits[13:16]}{digits[22:]}")


def _naa_locally_assigned(unit: LogicalUnit) -> bytes:
    """NAA 3, locally assigned (SPC-4 7.8.6.6.4): 60 bits of the UUID, chosen where a version 4 UUID
    is random.
    """
    raw = unit.uuid.bytes
    return bytes((0x30 | raw[0] & 0x0F,)) + raw[1:6] + raw[14:16]


def is_designated(unit: LogicalUnit, code_set: int, kind: int, value: bytes) -> bool:
    """Whether a designator of the device identification page, as another command quotes it, names
    this unit.
    """
    return (code_set, kind, value) in _unit_designators(unit)


def _unit_designators(unit: LogicalUnit) -> tuple[tuple[int, int, bytes], ...]:
    """Code set, type and value of the designators that name the unit itself, not a port. None of
    these may ever change or be removed: disks are known by them.
    """
    return (
        (1, 3, _naa_registered_extended(unit)),
        (1, 3, _naa_locally_assigned(unit)),
        (2, 1, VENDOR + serial_number(unit)),
        (1, 10, b"\x10\0" + unit.uuid.bytes),
    )


def _supported_pages(_request: Request) -> bytes:
    return bytes(sorted(PAGES))


def _serial(request: Request) -> bytes:
    return serial_number(request.unit)


def _device_identification(request: Request) -> bytes:
    unit = request.unit
    port_name = target_port(request.nexus.target_name, PORTAL_GROUP_TAG).encode() + b"\0"
    port_name += bytes(-len(port_name) % 4)
    return b"".join(
        (
            *(_designator(*named) for named in _unit_designators(unit)),
            _designator(1, 4, request.nexus.id.target_port.to_bytes(4, "big")),
            _designator(1, 5, _PORT_GROUP.to_bytes(4, "big")),
            _designator(3, 8, port_name),
        )
    )


def _extended_inquiry(_request: Request) -> bytes:
    body = bytearray(60)
    # SIMPSUP alone: ordered commands are accepted, but do not wait for commands that wait for data
    # or the disk.
    body[1] = 0x01
    body[2] = 0x01  # V_SUP: there is a write cache
    return bytes(body)


def _block_limits(_request: Request) -> bytes:
    return _BLOCK_LIMITS.pack(
        _WRITE_SAME_NON_ZERO,
        limits.COMPARE_AND_WRITE_SECTORS_MAX,
        limits.PHYSICAL_BLOCK_SECTORS,
        limits.TRANSFER_SECTORS_MAX,
        limits.TRANSFER_SECTORS_OPTIMAL,
        0,
        limits.UNMAP_SECTORS_MAX,
        limits.UNMAP_DESCRIPTORS_MAX,
        limits.PHYSICAL_BLOCK_SECTORS,
        1 << 31,  # UGAVALID, alignment 0
        limits.WRITE_SAME_SECTORS_MAX,
        limits.ATOMIC_SECTORS_MAX,
        limits.PHYSICAL_BLOCK_SECTORS,
        limits.PHYSICAL_BLOCK_SECTORS,
    )


def _block_characteristics(_request: Request) -> bytes:
    return _NON_ROTATING.to_bytes(2, "big") + bytes((0, _READABLE_AFTER_ERASE)) + bytes(56)


def _provisioning(_request: Request) -> bytes:
    return bytes((limits.THRESHOLD_EXPONENT, _PROVISIONING_FLAGS, _PROVISIONING_THIN, 0))


PAGES: Final[dict[int, Callable[[Request], bytes]]] = {
    0x00: _supported_pages,
    0x80: _serial,
    0x83: _device_identification,
    0x86: _extended_inquiry,
    0xB0: _block_limits,
    0xB1: _block_characteristics,
    0xB2: _provisioning,
}


def _vital_product_data(request: Request, code: int) -> bytes:
    page = PAGES.get(code)
    if page is None:
        raise CheckCondition(sense.invalid_field_in_cdb(2))
    if request.mapped is None:
        return _PAGE_HEAD.pack(_NO_UNIT, code, 0)
    body = page(request)
    return _PAGE_HEAD.pack(0, code, len(body)) + body


def inquiry(request: Request) -> Plan:
    """INQUIRY: identity, or a vital product data page. For a LUN without a unit the answer says so,
    and the command succeeds.
    """
    cdb = request.cdb
    allocation = int.from_bytes(cdb[3:5], "big")
    if cdb[1] & 0x01:
        return cut(_vital_product_data(request, cdb[2]), allocation)
    if cdb[2]:
        raise CheckCondition(sense.invalid_field_in_cdb(2))
    return cut(_standard(request), allocation)


_WELL_KNOWN_ONLY: Final = 0x01
_SELECT_REPORTS: Final = frozenset((0x00, 0x01, 0x02))
_REPORT_LUNS_ALLOCATION_MIN: Final = 16


def _luns(nexus: Nexus) -> bytes:
    entries = b"".join(encode_lun(lun).to_bytes(8, "big") for lun in sorted(nexus.units))
    return len(entries).to_bytes(4, "big") + bytes(4) + entries


def report_luns(request: Request) -> Plan:
    """REPORT LUNS: what this nexus can reach; there are no well-known logical units."""
    cdb = request.cdb
    if cdb[2] not in _SELECT_REPORTS:
        raise CheckCondition(sense.invalid_field_in_cdb(2))
    allocation = int.from_bytes(cdb[6:10], "big")
    if allocation < _REPORT_LUNS_ALLOCATION_MIN:
        raise CheckCondition(sense.invalid_field_in_cdb(6))
    return cut(bytes(8) if cdb[2] == _WELL_KNOWN_ONLY else _luns(request.nexus), allocation)


COMMANDS: Final = (
    Command(
        opcodes.INQUIRY, "INQUIRY", "01ffffff00", inquiry, any_lun=True, despite_attention=True
    ),
    Command(
        opcodes.REPORT_LUNS,
        "REPORT LUNS",
        "00ff000000ffffffff0000",
        report_luns,
        any_lun=True,
        despite_attention=True,
    ),
)
