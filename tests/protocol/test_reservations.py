"""Persistent reservations: who may do what, who is told what, and what outlives a session."""

import itertools

import pytest

from protocol.iscsi import task_management
from protocol.iscsi.initiator.task import CommandFailed
from protocol.scsi import reservations as kinds
from protocol.scsi.errors import STATUS_RESERVATION_CONFLICT
from protocol.scsi.reservations import NexusId, Reservations
from tests.protocol.coupling import Coupling, settings
from tests.protocol.directory import INITIATOR, RecordedNode, recorded
from tests.protocol.exchanges import Results, manage
from tests.protocol.memory_volume import MemoryVolume

SIZE = 1 << 20
REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, REGISTER_ANY = range(7)
READ, WRITE = bytes((0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0)), bytes((0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0))
SECTOR = bytes(512)
ALL_KINDS = sorted(kinds.KINDS)


@pytest.fixture
def volume() -> MemoryVolume:
    return MemoryVolume(SIZE)


@pytest.fixture
def node(volume: MemoryVolume) -> RecordedNode:
    return recorded({0: volume})


def session(node: RecordedNode, isid: int) -> Coupling:
    pair = Coupling(node, settings(isid=isid)).login()
    assert take(pair) == (6, 0x29, 0)
    return pair


@pytest.fixture
def three(node: RecordedNode) -> list[Coupling]:
    return [session(node, isid) for isid in (1, 2, 3)]


def parameters(key: int = 0, new: int = 0, flags: int = 0) -> bytes:
    return key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes(4) + bytes((flags, 0, 0, 0))


def out_cdb(action: int, kind: int = 0, size: int = 24) -> bytes:
    return bytes((0x5F, action, kind, 0, 0)) + size.to_bytes(4, "big") + b"\0"


def out(
    pair: Coupling,
    action: int,
    key: int = 0,
    new: int = 0,
    kind: int = 0,
    flags: int = 0,
    size: int = 24,
) -> None:
    body = parameters(key, new, flags)[:size]
    pair.command(out_cdb(action, kind, len(body)), data=body)


def report(pair: Coupling, action: int) -> bytes:
    return pair.command(bytes((0x5E, action, 0, 0, 0, 0, 0, 1, 0, 0)), read_bytes=256)


def held(pair: Coupling) -> tuple[int, int] | None:
    """Holder's key and kind."""
    data = report(pair, 1)
    return (int.from_bytes(data[8:16], "big"), data[21]) if len(data) > 8 else None


def take(pair: Coupling) -> tuple[int, int, int] | None:
    """The unit attention that waits for this nexus."""
    try:
        pair.command(bytes(6))
    except CommandFailed as error:
        return error.key, error.asc, error.ascq
    return None


def may(pair: Coupling, cdb: bytes) -> bool:
    """Whether a command passes; it may fail only by a reservation conflict."""
    try:
        pair.command(
            cdb, data=SECTOR if cdb[0] == 0x2A else b"", read_bytes=512 if cdb[0] == 0x28 else 0
        )
    except CommandFailed as error:
        if error.status != STATUS_RESERVATION_CONFLICT:
            raise
        return False
    return True


def conflicts(pair: Coupling, *arguments: int, **more: int) -> None:
    with pytest.raises(CommandFailed) as caught:
        out(pair, *arguments, **more)
    assert caught.value.status == STATUS_RESERVATION_CONFLICT


def test_registering_and_what_is_reported(three):
    one, two, _ = three
    out(one, REGISTER, 0, 0x11)
    out(two, REGISTER_ANY, 0x99, 0x22)
    assert report(one, 0) == bytes(3) + b"\2" + (16).to_bytes(4, "big") + (0x11).to_bytes(
        8, "big"
    ) + (0x22).to_bytes(8, "big")
    out(one, REGISTER, 0x11, 0x12)
    conflicts(one, REGISTER, 0x11, 0x13)
    conflicts(two, REGISTER, 0, 0x22)
    out(one, REGISTER, 0x12, 0)
    assert report(one, 0)[3] == 4 and report(one, 0)[8:] == (0x22).to_bytes(8, "big")
    status = report(one, 3)
    assert f"{INITIATOR},i,0x000000000002".encode() in status
    assert report(one, 2)[:6] == bytes((0, 8, 0x0D, 0x80, 0xEA, 1))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_who_may_read_and_write(three, kind):
    holder, registered, stranger = three
    out(holder, REGISTER, 0, 1)
    out(registered, REGISTER, 0, 2)
    out(holder, RESERVE, 1, kind=kind)
    exclusive, registrants = kind in kinds.EXCLUSIVE_KINDS, kind in kinds.REGISTRANTS_KINDS
    assert held(stranger) == (0 if kind in kinds.ALL_REGISTRANTS_KINDS else 1, kind)
    assert (may(holder, READ), may(holder, WRITE)) == (True, True)
    assert (may(registered, READ), may(registered, WRITE)) == (
        registrants or not exclusive,
        registrants,
    )
    assert (may(stranger, READ), may(stranger, WRITE)) == (not exclusive, False)
    for allowed in (
        bytes(6),
        bytes((0x25,)).ljust(10, b"\0"),
        bytes((0x12, 0, 0, 0, 96, 0)),
        bytes((0x03, 0, 0, 0, 18, 0)),
    ):
        assert may(stranger, allowed)
    for forbidden in (bytes((0x1B, 0, 0, 0, 0, 0)), bytes((0x42,)).ljust(10, b"\0")):
        assert not may(stranger, forbidden)


@pytest.mark.parametrize(("kind", "again"), list(itertools.product(ALL_KINDS, ALL_KINDS)))
def test_reserving_again(three, kind, again):
    one, two, stranger = three
    out(one, REGISTER, 0, 1)
    out(two, REGISTER, 0, 2)
    out(one, RESERVE, 1, kind=kind)
    if kind == again:
        out(one, RESERVE, 1, kind=again)
    else:
        conflicts(one, RESERVE, 1, kind=again)
    if kind == again and kind in kinds.ALL_REGISTRANTS_KINDS:
        out(two, RESERVE, 2, kind=again)
    else:
        conflicts(two, RESERVE, 2, kind=again)
    conflicts(stranger, RESERVE, 0, kind=again)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_release(three, kind):
    one, two, stranger = three
    out(one, REGISTER, 0, 1)
    out(two, REGISTER, 0, 2)
    out(one, RESERVE, 1, kind=kind)
    with pytest.raises(CommandFailed, match="5/26/04"):
        out(one, RELEASE, 1, kind=ALL_KINDS[ALL_KINDS.index(kind) - 1])
    conflicts(stranger, RELEASE, 0, kind=kind)
    if kind not in kinds.ALL_REGISTRANTS_KINDS:
        out(two, RELEASE, 2, kind=kind)  # not the holder: nothing happens
        assert held(one) == (1, kind)
    out(one, RELEASE, 1, kind=kind)
    assert held(one) is None and may(stranger, WRITE)
    assert take(two) == ((6, 0x2A, 4) if kind in kinds.REGISTRANTS_KINDS else None)
    assert take(one) is None and take(stranger) is None


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_unregistering_the_holder(three, kind):
    one, two, _ = three
    out(one, REGISTER, 0, 1)
    out(two, REGISTER, 0, 2)
    out(one, RESERVE, 1, kind=kind)
    out(one, REGISTER, 1, 0)
    everyone = kind in kinds.ALL_REGISTRANTS_KINDS
    assert take(two) == ((6, 0x2A, 4) if kind in kinds.REGISTRANTS_KINDS and not everyone else None)
    assert held(two) == ((0, kind) if everyone else None)
    out(two, REGISTER, 2, 0)
    assert held(two) is None


def test_clear(three):
    one, two, stranger = three
    out(one, REGISTER, 0, 1)
    out(two, REGISTER, 0, 2)
    out(one, RESERVE, 1, kind=kinds.EXCLUSIVE_ACCESS)
    conflicts(stranger, CLEAR, 0)
    out(two, CLEAR, 2)
    assert take(one) == (6, 0x2A, 3)
    assert take(two) is None and held(two) is None and len(report(two, 0)) == 8


@pytest.mark.parametrize("action", [PREEMPT, PREEMPT_AND_ABORT])
def test_preempt_takes_the_reservation_over(three, volume, action):
    one, two, stranger = three
    out(one, REGISTER, 0, 1)
    out(two, REGISTER, 0, 2)
    out(one, RESERVE, 1, kind=kinds.EXCLUSIVE_ACCESS)
    volume.hold_writes = True
    results = Results()
    one.initiator.submit_write(0, 0, SECTOR, results)
    one.run()
    answers = Results()
    two.initiator.submit(0, out_cdb(action, kinds.WRITE_EXCLUSIVE), answers, data=parameters(2, 1))
    two.run()
    assert len(answers.got) == (
        0 if action == PREEMPT_AND_ABORT else 1
    )  # an abort is answered when it is true
    volume.hold_writes = False
    volume.release()
    one.run()
    two.run()
    assert answers.data == b""
    assert len(results.got) == (0 if action == PREEMPT_AND_ABORT else 1)
    assert held(two) == (2, kinds.WRITE_EXCLUSIVE)
    assert take(one) == (6, 0x2A, 5) and not may(one, WRITE)
    conflicts(stranger, PREEMPT, 0, 2, kind=kinds.WRITE_EXCLUSIVE)
    conflicts(two, PREEMPT, 2, 77, kind=kinds.WRITE_EXCLUSIVE)
    with pytest.raises(CommandFailed, match="5/26/00"):
        out(two, PREEMPT, 2, 0, kind=kinds.WRITE_EXCLUSIVE)


def test_preempt_of_a_registration_leaves_the_reservation(three):
    one, two, third = three
    for pair, key in ((one, 1), (two, 2), (third, 3)):
        out(pair, REGISTER, 0, key)
    out(one, RESERVE, 1, kind=kinds.WRITE_EXCLUSIVE)
    out(two, PREEMPT, 2, 3, kind=kinds.EXCLUSIVE_ACCESS)
    assert (
        held(two) == (1, kinds.WRITE_EXCLUSIVE)
        and take(third) == (6, 0x2A, 5)
        and take(one) is None
    )


def test_preempt_of_all_registrants(three):
    one, two, third = three
    for pair, key in ((one, 1), (two, 2), (third, 3)):
        out(pair, REGISTER, 0, key)
    out(one, RESERVE, 1, kind=kinds.WRITE_EXCLUSIVE_ALL)
    out(two, PREEMPT, 2, 0, kind=kinds.EXCLUSIVE_ACCESS)
    assert held(two) == (2, kinds.EXCLUSIVE_ACCESS)
    assert take(one) == take(third) == (6, 0x2A, 5)


BAD = {
    "a kind that does not exist": ({"action": RESERVE, "key": 1, "kind": 2}, "5/24/00"),
    "a scope that does not exist": ({"action": RESERVE, "key": 1, "kind": 0x11}, "5/24/00"),
    "other initiators' ports, without a list of them": (
        {"action": REGISTER, "key": 1, "new": 2, "flags": 8},
        "5/1A/00",
    ),
    "other initiators' ports, ignoring keys": (
        {"action": REGISTER_ANY, "key": 1, "new": 2, "flags": 8},
        "5/26/00",
    ),
    "a short list": ({"action": REGISTER, "key": 1, "new": 2, "size": 23}, "5/1A/00"),
}


@pytest.mark.parametrize(("arguments", "sense"), BAD.values(), ids=BAD)
def test_bad_requests_change_nothing(three, arguments, sense):
    out(three[0], REGISTER, 0, 1)
    before = report(three[0], 0)
    with pytest.raises(CommandFailed, match=sense):
        out(three[0], **arguments)
    assert report(three[0], 0) == before


def test_registrations_are_bounded(three, node, volume):
    state = node.unit_for(volume).reservations
    state.registrations.update(
        {NexusId(f"port-{number}", 1): 1 for number in range(kinds.REGISTRATIONS_MAX)}
    )
    with pytest.raises(CommandFailed, match="5/55/04"):
        out(three[0], REGISTER, 0, 1)


def test_a_reservation_outlives_its_sessions(node, volume):
    one = session(node, 1)
    out(one, REGISTER, 0, 1)
    out(one, RESERVE, 1, kind=kinds.WRITE_EXCLUSIVE)
    one.target.connection_lost()
    assert not node.sessions
    other = session(node, 2)
    assert not may(other, WRITE) and may(other, READ)
    again = session(node, 1)
    assert may(again, WRITE)
    out(again, REGISTER, 1, 0)
    again.target.connection_lost()
    other.target.connection_lost()
    assert not node.units


def test_a_unit_kept_by_a_reservation_takes_over_the_volume_that_is_opened_next(node, volume):
    one = session(node, 1)
    out(one, REGISTER, 0, 1)
    one.target.connection_lost()
    anew = MemoryVolume(2 * SIZE)
    node.directory.targets = {name: {0: anew} for name in node.directory.targets}
    again = session(node, 1)
    again.command(WRITE, data=b"\1" * 512)
    assert anew.data[0] == 1 and volume.data[0] == 0
    assert len(report(again, 0)) == 16


def test_a_unit_that_only_a_registration_keeps_goes_with_its_volume(node, volume):
    pair = session(node, 1)
    out(pair, REGISTER, 0, 1)
    pair.initiator.logout(lambda _: None)
    pair.run()
    assert node.units
    node.volume_deleted(volume.uuid)
    node.volume_deleted(volume.uuid)
    assert not node.units


def test_the_fast_path_obeys(three):
    one, two, _ = three
    out(one, REGISTER, 0, 1)
    out(one, RESERVE, 1, kind=kinds.WRITE_EXCLUSIVE)
    flags = [
        [mapped.plain_write for mapped in pair.target._phase.session.units.values()]
        for pair in (one, two)
    ]
    assert flags == [[True], [False]]


def test_export_and_restore():
    calls: list[None] = []
    first = Reservations(lambda: calls.append(None))
    a, b = (
        NexusId("iqn.2026-01.test:a,i,0x000000000001", 1),
        NexusId("iqn.2026-01.test:a,i,0x000000000001", 0xFFFF),
    )
    first.register([a], 1, True)
    first.register([b], 2, True)
    first.reserve(a, kinds.EXCLUSIVE_ACCESS_REGISTRANTS)
    second = Reservations(lambda: None)
    second.restore(**first.export(), target_ports=(7,))  # type: ignore[arg-type]
    assert (
        second.export() == first.export()
        and second.holds(a)
        and not second.holds(b)
        and not second.forbids(b, writes=True)
    )
    assert len(calls) == 3


RESERVE_6, RELEASE_6 = bytes((0x16, 0, 0, 0, 0, 0)), bytes((0x17, 0, 0, 0, 0, 0))


def test_reserve_6_excludes_others_until_it_is_released(three):
    one, two, _ = three
    assert may(one, RESERVE_6) and may(one, RESERVE_6)
    forbidden = (READ, WRITE, bytes(6), bytes((0x1A, 8, 0x3F, 0, 255, 0)), RESERVE_6)
    assert [may(two, cdb) for cdb in forbidden] == [False] * 5
    assert (
        may(two, bytes((0x12, 0, 0, 0, 96, 0)))
        and may(two, bytes((0x03, 0, 0, 0, 18, 0)))
        and may(one, WRITE)
    )
    conflicts(two, REGISTER, 0, 1)
    assert may(two, RELEASE_6) and not may(two, READ)
    assert may(one, RELEASE_6) and may(two, WRITE)


@pytest.mark.parametrize("how", ["lost", "reset"])
def test_reserve_6_ends_with_the_nexus_and_with_a_reset(three, how):
    one, two, _ = three
    assert may(one, RESERVE_6)
    if how == "lost":
        one.target.connection_lost()
    else:
        assert manage(two, task_management.LOGICAL_UNIT_RESET) == [0]
        assert take(two) == (6, 0x29, 3)
    assert may(two, WRITE)


def test_reserve_6_gives_way_to_registrations(three):
    one, two, _ = three
    out(two, REGISTER, 0, 1)
    assert not may(one, RESERVE_6)
