"""TransportIDs: registering other initiator ports (SPEC_I_PT), and handing a reservation over
(REGISTER AND MOVE).
"""

from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.iscsi.initiator.task import CommandFailed
from protocol.scsi import reservations as kinds
from protocol.scsi.commands.reservation_transport_id import (
    BadTransportId,
    TransportId,
    decode_transport_ids,
    encode_transport_id,
)
from protocol.scsi.reservations import NexusId
from protocol.volume import Completion
from tests.protocol.coupling import Coupling, settings
from tests.protocol.directory import INITIATOR, RecordedNode, recorded
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.test_reservations import (
    ALL_KINDS,
    CLEAR,
    READ,
    REGISTER,
    REGISTER_ANY,
    RESERVE,
    WRITE,
    conflicts,
    held,
    may,
    out,
    report,
    session,
    take,
)

REGISTER_AND_MOVE = 7
APTPL, ALL_TG_PT, SPEC_I_PT, UNREG = 1, 4, 8, 2
STRANGER = "iqn.2026-01.io.example:stranger"


def port(isid: int, name: str = INITIATOR) -> str:
    return f"{name},i,0x{isid:012x}"


def nexus(isid: int, name: str = INITIATOR, target_port: int = 1) -> NexusId:
    return NexusId(port(isid, name), target_port)


def device_id(name: str) -> bytes:
    padded = name.encode() + bytes(4 - len(name) % 4)
    return bytes((0x05, 0)) + len(padded).to_bytes(2, "big") + padded


def port_id(isid: int, name: str = INITIATOR) -> bytes:
    return encode_transport_id(port(isid, name))


def send(pair: Coupling, action: int, body: bytes) -> None:
    pair.command(bytes((0x5F, action, 0, 0, 0)) + len(body).to_bytes(4, "big") + b"\0", data=body)


def register(
    pair: Coupling,
    new: int,
    ids: bytes,
    key: int = 0,
    flags: int = SPEC_I_PT,
    action: int = REGISTER,
) -> None:
    head = key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes(4) + bytes((flags, 0, 0, 0))
    send(pair, action, head + len(ids).to_bytes(4, "big") + ids)


def move(
    pair: Coupling, key: int, new: int, ids: bytes, flags: int = 0, relative_port: int = 1
) -> None:
    head = (
        key.to_bytes(8, "big")
        + new.to_bytes(8, "big")
        + bytes((0, flags))
        + relative_port.to_bytes(2, "big")
    )
    send(pair, REGISTER_AND_MOVE, head + len(ids).to_bytes(4, "big") + ids)


def fails(sense: str, what: Any, *arguments: Any, **more: Any) -> CommandFailed:
    with pytest.raises(CommandFailed, match=sense) as caught:
        what(*arguments, **more)
    return caught.value


@pytest.fixture
def volume() -> MemoryVolume:
    return MemoryVolume(1 << 20)


@pytest.fixture
def node(volume: MemoryVolume) -> RecordedNode:
    return recorded({0: volume})


@pytest.fixture
def three(node: RecordedNode) -> list[Coupling]:
    return [session(node, isid) for isid in (1, 2, 3)]


@pytest.fixture
def state(node: RecordedNode, volume: MemoryVolume, three: list[Coupling]) -> kinds.Reservations:
    return node.unit_for(volume).reservations


def test_specified_initiator_ports_are_registered_with_the_sender(three, state):
    one, two, third = three
    register(one, 7, port_id(2) + port_id(9, STRANGER))
    assert state.registrations == {nexus(1): 7, nexus(2): 7, nexus(9, STRANGER): 7}
    assert state.generation == 1 and not state.survives_power_loss
    out(two, RESERVE, 7, kind=kinds.EXCLUSIVE_ACCESS)
    assert may(two, READ) and not may(one, READ) and not may(third, READ)
    assert [take(pair) for pair in three] == [None] * 3


def test_a_device_stands_for_its_known_ports(three, state):
    register(three[0], 5, device_id(INITIATOR), flags=SPEC_I_PT | APTPL | ALL_TG_PT)
    assert (
        state.registrations == {nexus(isid): 5 for isid in (1, 2, 3)} and state.survives_power_loss
    )


def test_names_are_compared_in_lower_case(node, volume):
    one = session(node, 1)
    two = Coupling(
        node, settings(isid=0xAB, initiator_name=STRANGER.upper().replace("IQN", "iqn"))
    ).login()
    assert take(two) == (6, 0x29, 0)
    register(one, 4, port_id(0xAB, STRANGER.upper()))
    assert node.unit_for(volume).reservations.registrations == {
        nexus(1): 4,
        nexus(0xAB, STRANGER): 4,
    }
    out(two, RESERVE, 4, kind=kinds.WRITE_EXCLUSIVE)


def test_who_is_registered_keeps_its_key(three, state):
    out(three[1], REGISTER, 0, 2)
    register(three[0], 7, port_id(2) + port_id(3))
    assert state.registrations == {nexus(2): 2, nexus(1): 7, nexus(3): 7}


def test_what_is_refused_registers_nobody(three, state):
    one = three[0]
    register(one, 0, port_id(2))  # a key of zero registers nobody, and is no error
    with pytest.raises(CommandFailed) as caught:
        register(one, 1, port_id(2), key=9)
    assert caught.value.status == 0x18
    fails("5/26/00", register, one, 1, port_id(2), action=REGISTER_ANY)
    fails("5/26/00", register, one, 1, port_id(2) + device_id(STRANGER))
    fails("5/1A/00", register, one, 1, b"")
    fails("5/1A/00", register, one, 1, port_id(2), flags=0)
    fails(
        "5/1A/00",
        send,
        one,
        REGISTER,
        bytes(15) + b"\1" + bytes(4) + b"\x08" + bytes(7) + port_id(2),
    )
    fails("5/1A/00", send, one, REGISTER, bytes(20) + b"\x08" + bytes(3))
    fails("5/1A/00", send, one, REGISTER_AND_MOVE, bytes(23))
    fails("5/1A/00", send, one, CLEAR, bytes(28))
    assert state.registrations == {}
    out(one, REGISTER, 0, 1)
    fails("5/24/00", register, one, 1, port_id(2), key=1)
    state.registrations.update(
        {NexusId(f"port-{number}", 1): 1 for number in range(kinds.REGISTRATIONS_MAX - 2)}
    )
    fails("5/55/04", register, three[1], 1, port_id(3))
    assert nexus(2) not in state.registrations


BAD_IDS = {
    "another protocol": (b"\x06" + port_id(2)[1:], 0),
    "a format that does not exist": (b"\x85" + port_id(2)[1:], 0),
    "cut off": (port_id(2)[:3], 0),
    "longer than the list": (port_id(2)[:-4], 2),
    "not a multiple of four": (port_id(2)[:3] + b"\x2d" + port_id(2)[4:] + b"\0", 2),
    "too short": (b"\x45\0\0\x10" + b"iqn.a:b,i,0x12\0\0", 2),
    "without a zero": (b"\x05\0\0\x14" + b"a" * 20, 4),
    "bytes behind the zero": (b"\x05\0\0\x14" + b"iqn.2026-01.a:b\0xxxx", 4),
    "a port in the device format": (b"\x05" + port_id(2)[1:], 4),
    "a device in the port format": (b"\x45" + device_id(INITIATOR)[1:], 4),
    "an ISID that is short": (b"\x45\0\0\x18" + b"iqn.2026-01.a:b,i,0x12\0\0", 4),
    "an ISID that is no number": (
        b"\x45\0\0\x24" + b"iqn.2026-01.a:b,i,0x00000000000g".ljust(36, b"\0"),
        4,
    ),
    "not UTF-8": (b"\x05\0\0\x14" + "iqn.2026-01.a:ü".encode("latin-1").ljust(20, b"\0"), 4),
    "no name": (b"\x05\0\0\x14" + bytes(20), 4),
    "a name that is too long": (
        b"\x05\0\0\xe4" + b"iqn.2026-01.a:".ljust(225, b"b").ljust(228, b"\0"),
        4,
    ),
}


@pytest.mark.parametrize(("ids", "at"), BAD_IDS.values(), ids=BAD_IDS)
def test_bad_ids_are_refused_with_a_pointer_to_what_is_wrong(three, state, ids, at):
    with pytest.raises(BadTransportId) as caught:
        decode_transport_ids(ids)
    assert caught.value.at == at
    fails("5/26/00", register, three[0], 1, port_id(3) + ids)
    assert state.registrations == {}


@given(st.from_regex(r"\Aiqn\.2026-01\.[a-z0-9:.-]{1,200}\Z"), st.integers(0, (1 << 48) - 1))
def test_what_is_encoded_is_decoded(name, isid):
    encoded = encode_transport_id(port(isid, name))
    assert len(encoded) % 4 == 0
    assert decode_transport_ids(encoded * 2) == [TransportId(name, f"{isid:012x}")] * 2


@given(st.binary(max_size=80))
def test_any_bytes_are_decoded_or_refused(data):
    at = 0
    try:
        decode_transport_ids(data)
    except BadTransportId as error:
        at = error.at
    assert at == 0 or at < len(data)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("named", [port_id(2), device_id(STRANGER)], ids=["port", "device"])
def test_a_reservation_moves_to_the_port_that_is_named(node, volume, kind, named):
    one, third = session(node, 1), session(node, 3)
    two = (
        session(node, 2)
        if named == port_id(2)
        else Coupling(node, settings(isid=2, initiator_name=STRANGER)).login()
    )
    take(two)
    out(one, REGISTER, 0, 1)
    out(third, REGISTER, 0, 3)
    out(one, RESERVE, 1, kind=kind)
    if kind in kinds.ALL_REGISTRANTS_KINDS:
        with pytest.raises(CommandFailed) as caught:
            move(one, 1, 22, named)
        assert caught.value.status == 0x18 and held(one) == (0, kind)
        return
    before = report(one, 0)[3]
    move(one, 1, 22, named)
    assert held(third) == (22, kind) and report(one, 0)[3] == before + 1
    assert may(two, WRITE) and may(one, WRITE) == (kind in kinds.REGISTRANTS_KINDS)
    out(one, REGISTER, 1, 0)
    assert held(third) == (22, kind) and take(third) is None
    assert not node.unit_for(volume).reservations.survives_power_loss


def test_a_move_can_unregister_the_sender_and_change_a_key(three, state):
    one, two, _ = three
    out(one, REGISTER, 0, 1)
    out(two, REGISTER, 0, 2)
    out(one, RESERVE, 1, kind=kinds.WRITE_EXCLUSIVE)
    move(one, 1, 22, port_id(2), flags=UNREG | APTPL)
    assert (
        state.registrations == {nexus(2): 22}
        and held(two) == (22, kinds.WRITE_EXCLUSIVE)
        and state.survives_power_loss
    )
    assert not may(one, WRITE)


def test_moves_that_are_refused(three, state):
    one, two, third = three
    out(two, REGISTER, 0, 2)
    for pair, key in ((one, 0), (two, 9)):
        with pytest.raises(CommandFailed) as caught:
            move(pair, key, 5, port_id(3))
        assert caught.value.status == 0x18
    fails("5/24/00", move, two, 2, 5, port_id(3))  # there is no reservation
    out(one, REGISTER, 0, 1)
    out(one, RESERVE, 1, kind=kinds.WRITE_EXCLUSIVE)
    before = state.export()
    with pytest.raises(CommandFailed) as caught:
        move(two, 2, 5, port_id(3))  # not the holder
    assert caught.value.status == 0x18
    fails("5/26/00", move, one, 1, 0, port_id(3))
    fails("5/26/00", move, one, 1, 5, port_id(3), relative_port=2)
    fails("5/26/00", move, one, 1, 5, port_id(1))  # to itself
    fails("5/26/00", move, one, 1, 5, device_id(INITIATOR))  # which of its ports
    fails("5/26/00", move, one, 1, 5, port_id(2) + port_id(3))
    fails("5/26/00", move, one, 1, 5, device_id(STRANGER))
    fails("5/1A/00", move, one, 1, 5, b"")
    fails("5/1A/00", send, one, REGISTER_AND_MOVE, bytes(16384 + 4))
    conflicts(third, RESERVE, 0, kind=kinds.WRITE_EXCLUSIVE)
    assert state.export() == before


class Keeper:
    """A `StateKeeper` of one unit, in memory."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None

    def kept(self, uuid: UUID) -> dict[str, Any] | None:
        return self.state

    def keep(self, uuid: UUID, state: dict[str, Any] | None, done: Completion) -> None:
        self.state = state
        done(None)


def test_a_moved_reservation_outlives_a_restart(volume):
    keeper = Keeper()
    node = recorded({0: volume})
    node.keeper = keeper
    one = session(node, 1)
    register(one, 1, port_id(2), flags=SPEC_I_PT | APTPL)
    out(one, RESERVE, 1, kind=kinds.EXCLUSIVE_ACCESS)
    move(one, 1, 5, port_id(4), flags=APTPL)
    anew = recorded({0: volume})
    anew.keeper = keeper
    first, fourth = session(anew, 1), session(anew, 4)
    assert (
        held(first) == (5, kinds.EXCLUSIVE_ACCESS) and may(fourth, WRITE) and not may(first, READ)
    )
    assert anew.unit_for(volume).reservations.registrations == {
        nexus(1): 1,
        nexus(2): 1,
        nexus(4): 5,
    }
