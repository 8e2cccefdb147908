"""What a logical unit says about itself: INQUIRY, capacity, LUNs, supported commands, mode pages,
sense.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.iscsi.initiator.task import CommandFailed
from protocol.scsi import dispatch, limits
from protocol.scsi.errors import CheckCondition
from protocol.scsi.logical_unit import LogicalUnit, Nexus
from protocol.scsi.plan import Reply
from tests.protocol.coupling import Coupling, coupled, settings
from tests.protocol.directory import TARGET, recorded
from tests.protocol.memory_volume import DISK_UUID, MemoryVolume

SIZE = 8 << 20
SECTORS = SIZE // 512


@pytest.fixture
def pair() -> Coupling:
    return coupled(MemoryVolume(SIZE))


def page(pair: Coupling, code: int, allocation: int = 255, lun: int = 0) -> bytes:
    return pair.command(bytes((0x12, 1, code, 0, allocation, 0)), read_bytes=allocation, lun=lun)


def fails(
    pair: Coupling, cdb: bytes, sense: tuple[int, int, int], *, data: bytes = b"", lun: int = 0
) -> CommandFailed:
    with pytest.raises(CommandFailed) as caught:
        pair.command(cdb, data=data, lun=lun)
    assert (caught.value.key, caught.value.asc, caught.value.ascq) == sense
    return caught.value


def test_standard_inquiry(pair):
    data = pair.command(bytes((0x12, 0, 0, 0, 255, 0)), read_bytes=255)
    assert len(data) == data[4] + 5 == 96
    assert data[0] == 0 and data[2] == 6 and data[3] == 0x12
    assert data[8:36] == b"CLEAVED VDISK           0001"
    assert pair.command(bytes((0x12, 0, 0, 0, 5, 0)), read_bytes=255) == data[:5]


def test_every_page_that_is_listed_exists(pair):
    listed = page(pair, 0)
    assert list(listed[4:]) == [0x00, 0x80, 0x83, 0x86, 0xB0, 0xB1, 0xB2]
    for code in listed[4:]:
        data = page(pair, code)
        assert data[1] == code and int.from_bytes(data[2:4], "big") == len(data) - 4
    for code in set(range(256)) - set(listed[4:]):
        fails(pair, bytes((0x12, 1, code, 0, 255, 0)), (5, 0x24, 0))
    fails(pair, bytes((0x12, 0, 0x80, 0, 255, 0)), (5, 0x24, 0))


def designators(pair: Coupling) -> list[tuple[int, int, bytes]]:
    """Code set, type and value of those of the unit itself, in order."""
    data, found = page(pair, 0x83)[4:], []
    while data:
        if not data[1] & 0x30:
            found.append((data[0] & 0x0F, data[1] & 0x0F, data[4 : 4 + data[3]]))
        data = data[4 + data[3] :]
    return found


def test_designators_come_from_the_uuid(pair):
    """Disks keep their names: none of these may ever change, and a new one may only be added."""
    first, *earlier = designators(pair)
    assert first == (1, 3, bytes.fromhex("6" + "c2eaed" + "123456789abc" + "def" + "6789abcdef"))
    assert earlier == [
        (1, 3, bytes.fromhex("323456789abccdef")),
        (2, 1, b"CLEAVED " + DISK_UUID.hex.encode()),
        (1, 10, b"\x10\0" + DISK_UUID.bytes),
    ]
    assert page(pair, 0x80)[4:] == DISK_UUID.hex.encode()
    assert f"{TARGET},t,0x0001".encode() in page(pair, 0x83)


@given(st.uuids(version=4))
def test_the_company_id_is_nobodys(uuid):
    name = designators(coupled(MemoryVolume(SIZE, uuid=uuid)))[0][2]
    company = int.from_bytes(name[:4], "big") >> 4 & 0xFFFFFF
    assert len(name) == 16 and name[0] >> 4 == 6
    assert (
        company >> 16 & 0x0F == 0x02
    )  # locally administered, not multicast, and of the quadrant of local administrators
    assert name.hex().endswith(uuid.hex[22:]) and uuid.hex[:12] in name.hex()


def scsi_id(found: list[tuple[int, int, bytes]]) -> str:
    """What udev's scsi_id chooses: NAA 6, NAA 5, any NAA, EUI-64, T10, in the order of the page."""
    for kind, naa in ((3, 6), (3, 5), (3, None), (2, None), (1, None)):
        for _, designator_kind, value in found:
            if designator_kind == kind and naa in (None, value[0] >> 4):
                return f"{kind}{value.hex() if kind > 1 else value.decode()}"
    raise AssertionError(found)


def sg3_rules(found: list[tuple[int, int, bytes]]) -> str:
    """What the udev rules of sg3_utils choose (55-scsi-sg3_id.rules): NAA 6, NAA 5, NAA 2, EUI-64,
    name, T10, NAA 3.
    """
    for kind, naa in ((3, 6), (3, 5), (3, 2), (2, None), (8, None), (1, None), (3, 3)):
        for _, designator_kind, value in found:
            if designator_kind == kind and naa in (None, value[0] >> 4):
                return f"{kind}{value.hex() if kind > 1 else value.decode()}"
    raise AssertionError(found)


def test_udev_scsi_id_and_multipath_call_a_disk_by_one_name(pair):
    found = designators(pair)
    assert scsi_id(found) == sg3_rules(found) == f"3{found[0][2].hex()}"
    assert scsi_id(found[1:]) != sg3_rules(found[1:])  # as it was


def test_block_limits_are_those_that_hold(pair):
    data = page(pair, 0xB0)
    assert len(data) == 64
    assert int.from_bytes(data[6:8], "big") == 8
    assert int.from_bytes(data[8:12], "big") == limits.TRANSFER_SECTORS_MAX
    assert int.from_bytes(data[20:24], "big") == limits.UNMAP_SECTORS_MAX
    assert int.from_bytes(data[24:28], "big") == limits.UNMAP_DESCRIPTORS_MAX
    assert int.from_bytes(data[36:44], "big") == limits.WRITE_SAME_SECTORS_MAX


def test_provisioning_pages(pair):
    assert page(pair, 0xB2)[4:] == bytes((11, 0xE4, 2, 0))
    assert page(pair, 0xB1)[4:6] == b"\0\1"


def test_capacity(pair):
    assert pair.command(bytes((0x25,)).ljust(10, b"\0"), read_bytes=8) == (SECTORS - 1).to_bytes(
        4, "big"
    ) + (512).to_bytes(4, "big")
    data = pair.command(
        bytes((0x9E, 0x10)) + bytes(8) + (32).to_bytes(4, "big") + bytes(2), read_bytes=32
    )
    assert data[:12] == (SECTORS - 1).to_bytes(8, "big") + (512).to_bytes(4, "big")
    assert data[13] == 3 and data[14] == 0xC0 and len(data) == 32


@pytest.mark.parametrize(("exponent", "granularity"), [(3, 8), (0, 8)])
def test_physical_blocks_are_told_as_configured_and_hints_stay_on_whole_blocks(
    exponent, granularity
):
    nexus = Nexus("i", "t")
    nexus.map(0, LogicalUnit(MemoryVolume(1 << 20), exponent)).take_attention()
    capacity = dispatch.prepare(nexus, 0, bytes((0x9E, 0x10)) + bytes(11) + b"\x20" + bytes(2))
    block_limits = dispatch.prepare(nexus, 0, bytes((0x12, 1, 0xB0, 0, 64)).ljust(16, b"\0"))
    assert isinstance(capacity, Reply) and isinstance(block_limits, Reply)
    assert capacity.data[13] == exponent
    assert (
        int.from_bytes(block_limits.data[6:8], "big")
        == int.from_bytes(block_limits.data[28:32], "big")
        == granularity
    )


def test_a_disk_beyond_32_bits_of_sectors_says_so():
    class Large(MemoryVolume):
        @property
        def size_bytes(self) -> int:
            return 1 << 50

    nexus = Nexus("i", "t")
    nexus.map(0, LogicalUnit(Large(512))).take_attention()
    plan = dispatch.prepare(nexus, 0, bytes((0x25,)).ljust(16, b"\0"))
    assert isinstance(plan, Reply) and plan.data[:4] == b"\xff" * 4
    plan = dispatch.prepare(
        nexus, 0, bytes((0x9E, 0x10)) + bytes(8) + (32).to_bytes(4, "big") + bytes(2)
    )
    assert isinstance(plan, Reply) and int.from_bytes(plan.data[:8], "big") == (1 << 41) - 1


def test_luns():
    node = recorded(
        {
            0: MemoryVolume(SIZE),
            3: MemoryVolume(SIZE, uuid=MemoryVolume(512).uuid),
            300: MemoryVolume(SIZE),
        }
    )
    pair = Coupling(node, settings()).login()
    data = pair.command(
        bytes((0xA0, 0, 0)) + bytes(3) + (255).to_bytes(4, "big") + bytes(2), read_bytes=255
    )
    assert data == (24).to_bytes(4, "big") + bytes(4) + bytes(8) + bytes((0, 3)) + bytes(6) + bytes(
        (0x41, 0x2C)
    ) + bytes(6)
    assert pair.command(
        bytes((0xA0, 0, 1)) + bytes(3) + (255).to_bytes(4, "big") + bytes(2), read_bytes=255
    ) == bytes(8)
    fails(pair, bytes((0xA0, 0, 3)) + bytes(3) + (255).to_bytes(4, "big") + bytes(2), (5, 0x24, 0))
    fails(pair, bytes((0xA0, 0, 0)) + bytes(3) + (15).to_bytes(4, "big") + bytes(2), (5, 0x24, 0))


def test_a_lun_with_nothing_behind_it(pair):
    assert pair.command(bytes((0x12, 0, 0, 0, 96, 0)), read_bytes=96, lun=7)[0] == 0x7F
    assert page(pair, 0x83, lun=7) == bytes((0x7F, 0x83, 0, 0))
    assert pair.command(bytes((0x03, 0, 0, 0, 18, 0)), read_bytes=18, lun=7)[2:14:10] == bytes(
        (5, 0x25)
    )
    fails(pair, bytes(6), (5, 0x25, 0), lun=7)
    fails(pair, bytes((0x28,)).ljust(10, b"\0"), (5, 0x25, 0), lun=7)


def test_attentions_are_reported_once_and_spare_inquiry():
    pair = coupled(MemoryVolume(SIZE), clear_attention=False)
    assert len(page(pair, 0)) == 11
    fails(pair, bytes(6), (6, 0x29, 0))
    pair.command(bytes(6))


def test_request_sense_takes_the_attention():
    pair = coupled(MemoryVolume(SIZE), clear_attention=False)
    got = pair.command(bytes((0x03, 0, 0, 0, 255, 0)), read_bytes=255)
    assert (got[2], got[12], len(got)) == (6, 0x29, 18)
    got = pair.command(bytes((0x03, 1, 0, 0, 255, 0)), read_bytes=255)
    assert got == bytes.fromhex("7200000000000000")


def opcodes_report(pair: Coupling, option: int, opcode: int = 0, action: int = 0) -> bytes:
    cdb = (
        bytes((0xA3, 0x0C, option, opcode))
        + action.to_bytes(2, "big")
        + (4096).to_bytes(4, "big")
        + bytes(2)
    )
    return pair.command(cdb, read_bytes=4096)


def test_the_report_of_commands_is_the_table(pair):
    data = opcodes_report(pair, 0)
    assert int.from_bytes(data[:4], "big") == len(data) - 4 == 8 * len(dispatch.TABLE.commands)
    for command, at in zip(dispatch.TABLE.commands, range(4, len(data), 8), strict=True):
        assert data[at] == command.opcode
        assert int.from_bytes(data[at + 6 : at + 8], "big") == command.cdb_bytes
        one = opcodes_report(pair, 3, command.opcode, command.service_action or 0)
        assert (
            one[1] == 3
            and int.from_bytes(one[2:4], "big") == command.cdb_bytes
            and one[4] == command.opcode
        )
    assert len(opcodes_report(pair, 0x80)) == 4 + 20 * len(dispatch.TABLE.commands)
    assert opcodes_report(pair, 1, 0xFF)[1] == 1
    assert opcodes_report(pair, 2, 0x9E, 0x1F)[1] == 1


@pytest.mark.parametrize(("option", "opcode"), [(1, 0x9E), (2, 0x28), (4, 0x28), (7, 0x28)])
def test_reporting_options_that_do_not_fit(pair, option, opcode):
    fails(
        pair,
        bytes((0xA3, 0x0C, option, opcode)) + bytes(2) + (4096).to_bytes(4, "big") + bytes(2),
        (5, 0x24, 0),
    )


def test_task_management_that_is_reported(pair):
    cdb = bytes((0xA3, 0x0D)) + bytes(4) + (16).to_bytes(4, "big") + bytes(2)
    assert pair.command(cdb, read_bytes=16) == bytes((0xDA, 0, 0, 0))


@pytest.mark.parametrize("command", dispatch.TABLE.commands, ids=lambda command: command.name)
def test_every_reserved_bit_of_every_command_is_refused_with_a_pointer_to_it(command):
    nexus = Nexus("i", "t")
    nexus.map(0, LogicalUnit(MemoryVolume(SIZE))).take_attention()
    base = bytearray(16)
    base[0] = command.opcode
    if command.service_action is not None:
        base[1] = command.service_action
    for byte in range(1, command.cdb_bytes):
        for bit in range(8):
            if not command.usage[byte] >> bit & 1:
                cdb = bytearray(base)
                cdb[byte] |= 1 << bit
                with pytest.raises(CheckCondition) as caught:
                    dispatch.prepare(nexus, 0, bytes(cdb))
                assert caught.value.sense.key_specific == bytes((0xC8 | bit, 0, byte)), (byte, bit)


@pytest.mark.parametrize(
    "opcode", sorted(set(range(256)) - {command.opcode for command in dispatch.TABLE.commands})
)
def test_every_other_opcode_is_invalid(pair, opcode):
    fails(pair, bytes((opcode,)).ljust(16, b"\0"), (5, 0x20, 0))


def test_service_actions_that_do_not_exist(pair):
    fails(pair, bytes((0x9E, 0x1F)).ljust(16, b"\0"), (5, 0x24, 0))


# --- Mode pages -----------------------------------------------------------------------------------


def mode_sense(pair: Coupling, code: int, control: int = 0, flags: int = 0x08) -> bytes:
    return pair.command(bytes((0x1A, flags, control << 6 | code, 0, 255, 0)), read_bytes=255)


def mode_select(pair: Coupling, body: bytes, flags: int = 0x10) -> None:
    pair.command(bytes((0x15, flags, 0, 0, len(body), 0)), data=body)


CACHING = bytes((0x08, 0x12, 0x04)) + bytes(17)
SENSED_CACHING = b"\x88" + CACHING[1:]  # PS: it can be saved
CONTROL = bytes((0x0A, 0x0A, 0x00, 0x10)) + bytes(8)


def test_mode_pages(pair):
    assert mode_sense(pair, 0x08)[4:] == SENSED_CACHING
    assert mode_sense(pair, 0x0A)[4:] == CONTROL
    everything = mode_sense(pair, 0x3F)
    assert everything[0] == len(everything) - 1 and everything[2] == 0x10
    assert [
        page_code for page_code in (0x01, 0x88, 0x0A, 0x1C) if bytes((page_code,)) in everything
    ] == [0x01, 0x88, 0x0A, 0x1C]
    assert mode_sense(pair, 0x08, control=1)[6] == 0x04 and mode_sense(pair, 0x0A, control=1)[
        4:9
    ] == bytes((0x0A, 0x0A, 4, 0, 8))
    for cdb in (bytes((0x1A, 8, 0x02, 0, 255, 0)), bytes((0x1A, 8, 0x08, 1, 255, 0))):
        with pytest.raises(CommandFailed):
            pair.command(cdb)


def test_block_descriptors(pair):
    short = mode_sense(pair, 0x08, flags=0)
    assert short[3] == 8 and short[4:12] == SECTORS.to_bytes(4, "big") + (512).to_bytes(4, "big")
    cdb = bytes((0x5A, 0x10, 0x08, 0, 0, 0, 0, 0, 255, 0))
    long = pair.command(cdb, read_bytes=255)
    assert (
        int.from_bytes(long[:2], "big") == len(long) - 2 and long[4] == 1 and long[6:8] == b"\0\x10"
    )
    assert long[8:24] == SECTORS.to_bytes(8, "big") + bytes(4) + (512).to_bytes(4, "big")


def test_descriptor_sense_is_switched_on_and_off(pair):
    mode_select(pair, bytes(4) + CONTROL[:2] + b"\x04" + CONTROL[3:])
    assert fails(pair, bytes((0xFF,)), (5, 0x20, 0)).sense[0] == 0x72
    mode_select(pair, bytes(4) + CONTROL)
    assert fails(pair, bytes((0xFF,)), (5, 0x20, 0)).sense[0] == 0x70


def test_software_write_protection(pair):
    mode_select(pair, bytes(4) + CONTROL[:4] + b"\x08" + CONTROL[5:])
    assert mode_sense(pair, 0x0A)[2] == 0x90
    fails(pair, bytes((0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0)), (7, 0x27, 0), data=bytes(512))
    assert pair.command(bytes((0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0)), read_bytes=512) == bytes(512)
    mode_select(pair, bytes(4) + CONTROL)
    pair.command(bytes((0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0)), data=bytes(512))


def test_other_nexuses_are_told_of_changed_modes():
    node = recorded({0: MemoryVolume(SIZE)})
    one, other = (Coupling(node, settings(isid=isid)).login() for isid in (1, 2))
    for each in (one, other):
        fails(each, bytes(6), (6, 0x29, 0))
    mode_select(one, bytes(4) + CACHING[:2] + bytes(18))
    fails(other, bytes(6), (6, 0x2A, 1))
    one.command(bytes(6))
    mode_select(one, bytes(4) + CACHING[:2] + bytes(18))  # the same again is no change
    other.command(bytes(6))


BAD_LISTS = {
    "shorter than its header": (bytes(3), (5, 0x1A, 0)),
    "a descriptor that is not there": (bytes((0, 0, 0, 8)), (5, 0x1A, 0)),
    "a page cut off": (bytes(4) + CACHING[:-1], (5, 0x1A, 0)),
    "a page that does not exist": (bytes(4) + bytes((0x02, 0)), (5, 0x26, 0)),
    "a wrong page length": (bytes(4) + bytes((0x08, 0x10)) + bytes(16), (5, 0x26, 0)),
    "a bit that cannot be changed": (bytes(4) + CACHING[:3] + b"\1" + CACHING[4:], (5, 0x26, 0)),
}


@pytest.mark.parametrize(("body", "sense"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_bad_parameter_lists_change_nothing(pair, body, sense):
    before = mode_sense(pair, 0x3F)
    fails(pair, bytes((0x15, 0x10, 0, 0, len(body), 0)), sense, data=body)
    assert mode_sense(pair, 0x3F) == before


def test_a_list_with_one_bad_page_changes_nothing(pair):
    body = bytes(4) + CACHING[:2] + bytes(18) + CONTROL[:5] + b"\xff" + CONTROL[6:]
    fails(pair, bytes((0x15, 0x10, 0, 0, len(body), 0)), (5, 0x26, 0), data=body)
    assert mode_sense(pair, 0x08)[4:] == SENSED_CACHING


def test_mode_select_10_and_default_values(pair):
    body = bytes(8) + CACHING[:2] + bytes(18)
    pair.command(
        bytes((0x55, 0x10, 0, 0, 0, 0, 0)) + len(body).to_bytes(2, "big") + bytes(1), data=body
    )
    assert mode_sense(pair, 0x08)[6] == 0 and mode_sense(pair, 0x08, control=2)[6] == 4
