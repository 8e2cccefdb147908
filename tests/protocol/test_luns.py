"""Several logical units behind one target, some of which come and go under open sessions; portals;
what outlives a restart.
"""

from uuid import UUID

import pytest

from protocol.iscsi.initiator.task import CommandFailed
from tests.protocol.coupling import Coupling, settings
from tests.protocol.directory import INITIATOR, TARGET, Keeper, RecordedNode, recorded
from tests.protocol.exchanges import Results
from tests.protocol.memory_volume import MemoryVolume

SIZE = 1 << 20
TEST_UNIT_READY = bytes(6)
READ = bytes((0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0))
LUNS_CHANGED, POWER_ON, NO_UNIT = (6, 0x3F, 0x0E), (6, 0x29, 0), (5, 0x25, 0)


def volume(number: int) -> MemoryVolume:
    return MemoryVolume(SIZE, f"disk{number}", UUID(int=number))


def ready(pair: Coupling, lun: int = 0) -> tuple[int, int, int] | None:
    """Sense of a TEST UNIT READY, None when it is."""
    try:
        pair.command(TEST_UNIT_READY, lun=lun)
    except CommandFailed as error:
        return error.key, error.asc, error.ascq
    return None


def luns(pair: Coupling) -> list[int]:
    data = pair.command(bytes((0xA0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0)), read_bytes=512)
    return [data[at + 1] for at in range(8, 8 + int.from_bytes(data[:4], "big"), 8)]


def session(node: RecordedNode, isid: int = 1) -> Coupling:
    pair = Coupling(node, settings(isid=isid)).login()
    for lun in node.directory.targets[TARGET]:
        assert ready(pair, lun) == POWER_ON
    return pair


def test_a_lun_that_comes_is_told_to_every_session_and_works() -> None:
    first, second = volume(1), volume(2)
    node = recorded({0: first})
    pairs = [session(node, isid) for isid in (1, 2)]
    second.data[:512] = b"\x22" * 512
    node.lun_mapped(TARGET, 5, second)
    for pair in pairs:
        assert luns(pair) == [0, 5]
        assert ready(pair) == LUNS_CHANGED
        assert ready(pair) is None
        assert ready(pair, 5) == POWER_ON
        assert ready(pair, 5) is None
        assert pair.command(READ, lun=5, read_bytes=512) == b"\x22" * 512


def test_a_lun_that_goes_is_told_on_those_that_stay_and_is_forgotten() -> None:
    first, second = volume(1), volume(2)
    node = recorded({0: first, 5: second})
    pair = session(node)
    node.lun_unmapped(TARGET, 5, second)
    assert luns(pair) == [0]
    assert ready(pair) == LUNS_CHANGED
    assert ready(pair) is None
    assert ready(pair, 5) == NO_UNIT
    assert list(node.units) == [first.uuid]
    node.lun_unmapped(TARGET, 7, second)
    assert ready(pair) is None, "nothing went, and yet something was told"


def test_other_targets_hear_nothing_of_it() -> None:
    first, second = volume(1), volume(2)
    node = recorded({0: first})
    pair = session(node)
    node.lun_mapped(f"{TARGET}-other", 5, second)
    assert luns(pair) == [0]
    assert ready(pair) is None


@pytest.mark.parametrize("write", [False, True])
def test_commands_under_way_on_a_lun_that_goes_end_as_they_would_have(write: bool) -> None:
    first, second = volume(1), volume(2)
    second.hold_reads = second.hold_writes = True
    node = recorded({0: first, 5: second})
    pair = session(node)
    results = Results()
    if write:
        pair.initiator.submit_write(5, 0, b"\x33" * 512, results)
    else:
        pair.initiator.submit_read(5, 0, 512, results)
    pair.run()
    assert results.got == []
    node.lun_unmapped(TARGET, 5, second)
    second.release()
    pair.run()
    assert results.data == (b"" if write else bytes(512))
    assert second.data[:512] == (b"\x33" * 512 if write else bytes(512))


def test_a_lun_that_goes_while_its_gate_is_closed_leaves_no_command_behind() -> None:
    disk = volume(1)
    node = recorded({0: disk})
    pair = session(node)
    disk.hold_reads = True
    swapped, written = Results(), Results()
    pair.initiator.submit(
        0, bytes((0x89, *bytes(12), 1, 0, 0)), swapped, data=bytes(512) + b"n" * 512
    )
    pair.initiator.submit_write(0, 4096, b"w" * 4096, written)
    pair.run()
    node.lun_unmapped(TARGET, 0, disk)
    assert not node.units
    disk.hold_reads = False
    disk.release()
    pair.run()
    assert swapped.data == written.data == b"" and pair.target.describe()["commands_in_flight"] == 0
    assert disk.data[:1] == b"n" and disk.data[4096:8192] == b"w" * 4096


def test_a_lun_comes_and_goes_under_the_fast_path() -> None:
    first, second = volume(1), volume(2)
    node = recorded({0: first})
    pair = session(node)
    for _ in range(3):
        node.lun_mapped(TARGET, 0, first)  # the same number again: the newest stands
        node.lun_mapped(TARGET, 1, second)
        assert ready(pair, 1) in {POWER_ON, LUNS_CHANGED}
        while ready(pair, 1) is not None:
            continue
        assert pair.command(READ, lun=1, read_bytes=512) == bytes(512)
        node.lun_unmapped(TARGET, 1, second)
        with pytest.raises(CommandFailed) as caught:
            pair.command(READ, lun=1, read_bytes=512)
        assert (caught.value.key, caught.value.asc, caught.value.ascq) == NO_UNIT


# --- What may change while somebody logs in -------------------------------------------------------


def waiting_login(node: RecordedNode, held: MemoryVolume) -> tuple[Coupling, Coupling]:
    """An old session with a write under way, and a login of the same port, which waits for it."""
    old = session(node)
    held.hold_writes = True
    old.initiator.submit_write(0, 0, bytes(512), Results())
    old.run()
    new = Coupling(node, settings(isid=1))
    new.initiator.start()
    new.run()
    assert new.login_result == []
    return old, new


def test_a_target_that_goes_during_a_login_ends_it() -> None:
    held = volume(1)
    node = recorded({0: held})
    old, new = waiting_login(node, held)
    node.directory.targets.clear()
    held.release()
    new.run()
    assert new.peer.closed
    assert node.directory.closed == [old.target]
    assert not node.sessions
    assert not node.units


def test_the_luns_are_those_at_the_end_of_the_login() -> None:
    held, other = volume(1), volume(2)
    node = recorded({0: held})
    _, new = waiting_login(node, held)
    node.directory.targets[TARGET] = {3: other}
    held.release()
    new.run()
    assert new.login_result == [None]
    assert luns(new) == [3]


# --- Portals --------------------------------------------------------------------------------------


def test_discovery_tells_all_portals_and_names_in_any_case() -> None:
    node = recorded({0: volume(1)})
    node.portals = lambda portal: [portal, "[2001:db8::1]:3260"]
    pair = Coupling(node, settings(target_name="")).login()
    found: list[list[tuple[str, str]]] = []
    pair.initiator.send_targets(found.append)
    pair.run()
    addresses = [("TargetAddress", "127.0.0.1:3260,1"), ("TargetAddress", "[2001:db8::1]:3260,1")]
    assert found == [[("TargetName", TARGET), *addresses]]


# --- Reservations over a restart ------------------------------------------------------------------


def register(pair: Coupling, key: int, aptpl: bool = True) -> Results:
    results = Results()
    body = bytes(8) + key.to_bytes(8, "big") + bytes(4) + bytes((aptpl, 0, 0, 0))
    pair.initiator.submit(0, bytes((0x5F, 6, 0, 0, 0, 0, 0, 0, 24, 0)), results, data=body)
    pair.run()
    return results


def reserve(pair: Coupling, key: int) -> None:
    pair.command(bytes((0x5F, 1, 1, 0, 0, 0, 0, 0, 24, 0)), data=key.to_bytes(8, "big") + bytes(16))


def keys(pair: Coupling) -> bytes:
    return pair.command(bytes((0x5E, 0, 0, 0, 0, 0, 0, 1, 0, 0)), read_bytes=256)[8:]


def kept_node(keeper: Keeper) -> tuple[RecordedNode, MemoryVolume]:
    disk = volume(1)
    node = recorded({0: disk})
    node.keeper = keeper
    return node, disk


def test_registration_and_reservation_outlive_a_restart() -> None:
    keeper = Keeper()
    node, _ = kept_node(keeper)
    pair = session(node)
    assert register(pair, 0xABCD).data == b""
    reserve(pair, 0xABCD)
    node, _ = kept_node(keeper)  # another life, another node
    other, holder = session(node, 2), session(node, 1)
    assert keys(other) == (0xABCD).to_bytes(8, "big")
    holder.initiator.submit_write(0, 0, bytes(512), held := Results())
    holder.run()
    assert held.data == b""
    other.initiator.submit_write(0, 0, bytes(512), refused := Results())
    other.run()
    assert refused.failure.status == 0x18


def test_a_registration_is_answered_when_it_is_kept_and_fails_when_it_cannot_be() -> None:
    keeper = Keeper()
    node, disk = kept_node(keeper)
    pair = session(node)
    keeper.held = []
    results = register(pair, 1)
    assert results.got == []
    keeper.held.pop()(None)
    pair.run()
    assert results.data == b""
    assert keeper.states[disk.uuid] is not None
    error = OSError("the pool is read-only")
    error.errno = 30
    keeper.held, keeper.error = None, error
    assert register(pair, 2).failure.key == 7


def test_without_aptpl_and_after_unregistering_nothing_is_kept() -> None:
    keeper = Keeper()
    node, disk = kept_node(keeper)
    pair = session(node)
    register(pair, 1, aptpl=False)
    assert keeper.states == {disk.uuid: None}
    register(pair, 1)
    assert keeper.states[disk.uuid] == {
        "registrations": {f"{INITIATOR},i,0x000000000001,t,0x0001": 1},
        "holder": None,
        "kind": 0,
        "generation": 2,
    }
    register(pair, 0)
    assert keeper.states == {disk.uuid: None}
