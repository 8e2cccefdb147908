"""Persistent reservations belong to the I_T nexus (SPC-4 5.13): one initiator port that reaches a
unit by two targets has two of all.
"""

from uuid import UUID

import pytest

from protocol.iscsi.initiator.task import CommandFailed
from protocol.scsi import reservations as kinds
from protocol.scsi.reservations import NexusId
from tests.protocol.coupling import Coupling, settings
from tests.protocol.directory import INITIATOR, TARGET, Keeper, RecordedNode, recorded
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.test_reservations import (
    CLEAR,
    PREEMPT,
    READ,
    REGISTER,
    REGISTER_ANY,
    RELEASE,
    RESERVE,
    RESERVE_6,
    WRITE,
    conflicts,
    held,
    may,
    out,
    report,
    take,
)
from tests.protocol.test_scsi_identity import page
from tests.protocol.test_transport_ids import (
    ALL_TG_PT,
    APTPL,
    SPEC_I_PT,
    UNREG,
    fails,
    move,
    nexus,
    port_id,
    register,
)

CLUSTER = "iqn.2026-01.io.cleaved:cluster"
FIRST, SECOND = 1, 2


@pytest.fixture
def volume() -> MemoryVolume:
    return MemoryVolume(1 << 20)


@pytest.fixture
def node(volume: MemoryVolume) -> RecordedNode:
    return two_targets(volume)


def two_targets(volume: MemoryVolume) -> RecordedNode:
    node = recorded({0: volume})
    node.directory.targets[CLUSTER] = {0: volume}
    return node


def session(node: RecordedNode, target: str = TARGET, isid: int = 1) -> Coupling:
    pair = Coupling(node, settings(isid=isid, target_name=target)).login()
    assert take(pair) == (6, 0x29, 0)
    return pair


@pytest.fixture
def both(node: RecordedNode) -> tuple[Coupling, Coupling]:
    """One initiator port, by both targets."""
    return session(node), session(node, CLUSTER)


def statuses(pair: Coupling) -> list[tuple[int, bool, int]]:
    """Key, holder or not, and relative target port of each full status descriptor."""
    data, found = report(pair, 3)[8:], []
    while data:
        assert data[12] & 2 == 0, "ALL_TG_PT: each descriptor is of one nexus"
        found.append(
            (
                int.from_bytes(data[:8], "big"),
                bool(data[12] & 1),
                int.from_bytes(data[18:20], "big"),
            )
        )
        data = data[24 + int.from_bytes(data[20:24], "big") :]
    return found


def test_each_nexus_registers_for_itself(both):
    first, second = both
    out(first, REGISTER, 0, 1)
    out(first, RESERVE, 1, kind=kinds.WRITE_EXCLUSIVE_REGISTRANTS)
    assert may(second, READ) and not may(second, WRITE)  # it has not registered
    conflicts(second, RELEASE, 1, kind=kinds.WRITE_EXCLUSIVE_REGISTRANTS)
    out(second, REGISTER, 0, 2)
    assert may(second, WRITE) and statuses(first) == [(1, True, FIRST), (2, False, SECOND)]
    out(second, REGISTER, 2, 0)
    assert (
        may(first, WRITE)
        and not may(second, WRITE)
        and held(second) == (1, kinds.WRITE_EXCLUSIVE_REGISTRANTS)
    )


def test_one_is_told_of_what_the_other_does(both):
    first, second = both
    out(first, REGISTER, 0, 1)
    out(second, REGISTER, 0, 2)
    out(first, RESERVE, 1, kind=kinds.WRITE_EXCLUSIVE)
    assert not may(second, WRITE)
    out(second, PREEMPT, 2, 1, kind=kinds.WRITE_EXCLUSIVE)
    assert take(first) == (6, 0x2A, 5) and not may(first, WRITE) and may(second, WRITE)
    out(second, CLEAR, 2)
    assert statuses(first) == [] and take(first) is None


def test_reserve_6_is_of_one_nexus(both):
    first, second = both
    assert may(first, RESERVE_6) and may(first, WRITE) and not may(second, READ)
    first.initiator.logout(lambda _: None)
    first.run()
    assert may(second, WRITE)


def test_each_target_port_has_its_identifier(both):
    for pair, expected in zip(both, (FIRST, SECOND), strict=True):
        data, found = page(pair, 0x83)[4:], []
        while data:
            if data[1] & 0x3F == 0x14:  # relative target port, associated with the port
                found.append(int.from_bytes(data[4:8], "big"))
            data = data[4 + data[3] :]
        assert found == [expected]


@pytest.mark.parametrize("action", [REGISTER, REGISTER_ANY])
def test_all_target_ports_are_registered_at_once(both, action):
    first, second = both
    out(first, action, 0, 1, flags=ALL_TG_PT)
    assert statuses(second) == [(1, False, FIRST), (1, False, SECOND)]
    assert report(first, 2)[2] & 0x0C == 0x0C  # SIP_C and ATP_C are true
    out(second, RESERVE, 1, kind=kinds.EXCLUSIVE_ACCESS_REGISTRANTS)
    assert may(first, WRITE)
    out(first, REGISTER, 1, 0)
    assert statuses(second) == [(1, True, SECOND)] and not may(first, READ)
    out(second, REGISTER, 1, 3, flags=ALL_TG_PT)
    assert statuses(second) == [(3, True, SECOND), (3, False, FIRST)]
    out(first, REGISTER, 3, 0, flags=ALL_TG_PT)
    assert statuses(second) == [] and held(second) is None


def test_all_target_ports_conflict_where_one_has_another_key(both):
    first, second = both
    out(second, REGISTER, 0, 2)
    conflicts(first, REGISTER, 0, 1, flags=ALL_TG_PT)
    assert statuses(first) == [(2, False, SECOND)]
    out(first, REGISTER_ANY, 0, 1, flags=ALL_TG_PT)
    assert statuses(first) == [(1, False, SECOND), (1, False, FIRST)]


def test_ports_of_a_unit_that_another_target_does_not_have_are_left_out(volume):
    node = two_targets(volume)
    node.directory.targets["iqn.2026-01.io.cleaved:third"] = {
        0: MemoryVolume(1 << 20, "other", UUID(int=7))
    }
    node.directory.targets["iqn.2026-01.io.cleaved:fourth"] = {3: volume}
    first = session(node)
    out(first, REGISTER, 0, 1, flags=ALL_TG_PT)
    assert [port for _, _, port in statuses(first)] == [1, 2, 4]


def test_specified_initiator_ports_are_of_this_target_port_or_of_all(both, node, volume):
    first, second = both
    register(second, 5, port_id(9))
    known = node.unit_for(volume).reservations.registrations
    assert known == {nexus(1, target_port=SECOND): 5, nexus(9, target_port=SECOND): 5}
    register(first, 6, port_id(8), flags=SPEC_I_PT)
    out(first, CLEAR, 6)
    register(first, 7, port_id(9), flags=SPEC_I_PT | ALL_TG_PT)
    assert known == {
        nexus(isid, target_port=target_port): 7
        for isid in (1, 9)
        for target_port in (FIRST, SECOND)
    }


def test_a_reservation_moves_to_another_target_port(both):
    first, second = both
    out(first, REGISTER, 0, 1)
    out(first, RESERVE, 1, kind=kinds.WRITE_EXCLUSIVE)
    fails("5/26/00", move, first, 1, 5, port_id(1), relative_port=FIRST)  # to itself
    fails("5/26/00", move, first, 1, 5, port_id(1), relative_port=3)
    move(first, 1, 5, port_id(1), flags=UNREG, relative_port=SECOND)
    assert statuses(first) == [(5, True, SECOND)] and may(second, WRITE) and not may(first, WRITE)


def test_nexuses_outlive_a_restart(volume):
    keeper, node = Keeper(), two_targets(volume)
    node.keeper = keeper
    second = session(node, CLUSTER)
    out(second, REGISTER, 0, 1, flags=APTPL)
    out(second, RESERVE, 1, kind=kinds.EXCLUSIVE_ACCESS)
    anew = two_targets(volume)
    anew.keeper = keeper
    first, second = session(anew), session(anew, CLUSTER)
    assert statuses(first) == [(1, True, SECOND)] and may(second, WRITE) and not may(first, READ)


@pytest.mark.parametrize(
    "kind", [kinds.WRITE_EXCLUSIVE, kinds.EXCLUSIVE_ACCESS_REGISTRANTS, kinds.WRITE_EXCLUSIVE_ALL]
)
def test_what_an_earlier_version_stored_counts_by_every_target(volume, kind):
    """It registered initiator ports, for all targets together; whoever held the disk over the
    update goes on writing.
    """
    keeper, node = Keeper(), two_targets(volume)
    old, other = (f"{INITIATOR},i,0x00000000000{isid}" for isid in (1, 2))
    keeper.states[volume.uuid] = {
        "registrations": {old: 1, other: 2},
        "holder": old,
        "kind": kind,
        "generation": 7,
    }
    node.keeper = keeper
    first, second, another = session(node), session(node, CLUSTER), session(node, CLUSTER, isid=2)
    assert (
        may(first, WRITE)
        and may(second, WRITE)
        and may(another, WRITE) == (kind in kinds.REGISTRANTS_KINDS)
    )
    assert held(another) == (0 if kind in kinds.ALL_REGISTRANTS_KINDS else 1, kind)
    assert len(statuses(first)) == 4 and report(first, 0)[7] == 32
    assert node.unit_for(volume).reservations.export()["holder"] == old
    out(first, REGISTER, 1, 0)
    assert held(second) is not None and may(second, WRITE)
    out(second, REGISTER, 1, 0)
    assert take(another) == ((6, 0x2A, 4) if kind == kinds.EXCLUSIVE_ACCESS_REGISTRANTS else None)
    assert (held(another) is None) == (kind not in kinds.ALL_REGISTRANTS_KINDS)


def test_an_old_holder_is_preempted(volume):
    keeper, node = Keeper(), two_targets(volume)
    old, other = (f"{INITIATOR},i,0x00000000000{isid}" for isid in (1, 2))
    keeper.states[volume.uuid] = {
        "registrations": {old: 1, other: 2},
        "holder": old,
        "kind": kinds.WRITE_EXCLUSIVE,
        "generation": 7,
    }
    node.keeper = keeper
    first, another = session(node), session(node, CLUSTER, isid=2)
    out(another, PREEMPT, 2, 1, kind=kinds.WRITE_EXCLUSIVE)
    assert take(first) == (6, 0x2A, 5)
    assert (
        held(first) == (2, kinds.WRITE_EXCLUSIVE) and not may(first, WRITE) and may(another, WRITE)
    )
    assert node.unit_for(volume).reservations.holder == nexus(2, target_port=SECOND)


@pytest.mark.parametrize(
    "stored",
    [
        "iqn.2026-01.test:a,i,0x000000000001",
        "iqn.2026-01.test:A,i,0x000000000001",
        "iqn.2026-01.test:a,i,0x000000000001,t,0x00ff",
    ],
)
def test_stored_names_of_nexuses(stored):
    assert str(NexusId.parse(stored)) == stored.lower()
    assert NexusId.parse(stored).initiator_port == "iqn.2026-01.test:a,i,0x000000000001"


def test_a_session_that_is_not_registered_fails_to_take_what_is_not_its_own(both):
    first, second = both
    out(first, REGISTER, 0, 1)
    out(first, RESERVE, 1, kind=kinds.WRITE_EXCLUSIVE)
    with pytest.raises(CommandFailed):
        out(second, RESERVE, 1, kind=kinds.WRITE_EXCLUSIVE)
    conflicts(second, REGISTER, 1, 2)  # that key is of the other nexus
    out(second, REGISTER, 0, 2)
