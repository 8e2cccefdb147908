"""The write cache's state, as a client saved it: a client that switched it off flushes no more, so
it must stay off.
"""

import pytest

from protocol.iscsi import task_management
from protocol.iscsi.initiator.task import CommandFailed
from tests.protocol.coupling import Coupling
from tests.protocol.directory import Keeper
from tests.protocol.exchanges import manage
from tests.protocol.test_luns import kept_node, keys, ready, register, session

# MODE SELECT(6) with PF and SP, and without SP; page controls of MODE SENSE(6).
SAVE, SELECT = 0x11, 0x10
CURRENT, SAVED = 0, 3
ON, OFF = 0x04, 0x00


def select(pair: Coupling, flags: int, cache: int) -> None:
    pair.command(
        bytes((0x15, flags, 0, 0, 24, 0)), data=bytes(4) + bytes((0x08, 0x12, cache)) + bytes(17)
    )


def caches(pair: Coupling) -> tuple[int, int]:
    """The write cache as it is, and as it was saved."""
    current, saved = (
        pair.command(bytes((0x1A, 8, control << 6 | 0x08, 0, 255, 0)), read_bytes=255)
        for control in (CURRENT, SAVED)
    )
    assert (
        current[4:6] == saved[4:6] == bytes((0x88, 0x12))
    )  # PS, by which Linux asks for saving by itself
    return current[6], saved[6]


def reset(pair: Coupling) -> None:
    assert manage(pair, task_management.LOGICAL_UNIT_RESET) == [task_management.COMPLETE]
    assert ready(pair) is not None


def test_a_saved_write_cache_outlives_a_restart_and_a_reset() -> None:
    keeper = Keeper()
    node, disk = kept_node(keeper)
    select(session(node), SAVE, OFF)
    node, disk = kept_node(keeper)  # another life, another node
    pair = session(node)
    assert caches(pair) == (OFF, OFF)
    reset(pair)
    assert caches(pair) == (OFF, OFF)
    select(pair, SAVE, ON)
    assert keeper.states[disk.uuid] is None
    assert caches(session(kept_node(keeper)[0])) == (ON, ON)


def test_it_outlives_the_last_session() -> None:
    """A client that lost its connection comes back without setting the cache again."""
    node, _ = kept_node(Keeper())
    for flags in (SELECT, SAVE):
        pair = session(node)
        select(pair, flags, OFF)
        pair.target.connection_lost()
        assert caches(session(node, 2))[0] == OFF


def test_what_is_not_saved_ends_with_a_reset() -> None:
    keeper = Keeper()
    node, _ = kept_node(keeper)
    pair = session(node)
    select(pair, SELECT, OFF)
    assert caches(pair) == (OFF, ON) and keeper.states == {}
    reset(pair)
    assert caches(pair) == (ON, ON)


def test_saving_is_answered_when_it_is_kept_and_fails_when_it_cannot_be() -> None:
    keeper = Keeper()
    pair = session(kept_node(keeper)[0])
    keeper.error = OSError("the pool is read-only")
    keeper.error.errno = 30
    with pytest.raises(CommandFailed):
        select(pair, SAVE, OFF)
    assert caches(pair) == (OFF, ON)


def test_reservations_and_the_write_cache_are_kept_together() -> None:
    keeper = Keeper()
    pair = session(kept_node(keeper)[0])
    register(pair, 7)
    select(pair, SAVE, OFF)
    pair = session(kept_node(keeper)[0])
    assert (keys(pair), caches(pair)) == ((7).to_bytes(8, "big"), (OFF, OFF))
    register(pair, 0)
    assert caches(session(kept_node(keeper)[0])) == (OFF, OFF)
