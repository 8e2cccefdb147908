"""Long commands take turns of the event loop: what one turn may hold, and that sessions are served
in between.
"""

from collections import deque

import pytest

from protocol.scsi.limits import AT_ONCE_BYTES_MAX, PIECE_BYTES
from protocol.turns import Step, Turns
from tests.protocol.coupling import Coupling, coupled
from tests.protocol.exchanges import Results, read
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.test_extended_copy import cdb as copy_cdb
from tests.protocol.test_extended_copy import copy_list, naa, segment, target

PIECES = 4
SIZE = 4 * PIECES * PIECE_BYTES
SECTORS = PIECES * PIECE_BYTES // 512


class Loop:
    """An event loop's ``call_soon``."""

    def __init__(self) -> None:
        self.calls: deque[Step] = deque()

    def call_soon(self, step: Step) -> None:
        self.calls.append(step)

    def turn(self) -> None:
        """What one turn carries out: the calls that waited when it began."""
        for _ in range(len(self.calls)):
            self.calls.popleft()()


class CountedVolume(MemoryVolume):
    """Counts the bytes that were moved since the last look."""

    moved = 0

    def try_read(self, offset_bytes, length_bytes):
        self.moved += length_bytes
        return super().try_read(offset_bytes, length_bytes)

    def write(self, offset_bytes, data, fua, done):
        self.moved += len(data)
        super().write(offset_bytes, data, fua, done)

    def taken(self) -> int:
        moved, self.moved = self.moved, 0
        return moved


def sixteen(opcode: int, flags: int = 0, sectors: int = SECTORS) -> bytes:
    return bytes((opcode, flags)) + bytes(8) + sectors.to_bytes(4, "big") + bytes(2)


def carry(pair: Coupling, cdb: bytes, data: bytes = b"") -> Results:
    """Give one command to the target."""
    results = Results()
    pair.initiator.submit(0, cdb, results, data=data)
    pair.run()
    return results


@pytest.fixture
def volume() -> CountedVolume:
    return CountedVolume(SIZE)


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def pair(volume: CountedVolume, loop: Loop) -> Coupling:
    found = coupled(volume)
    found.node.turns.call_soon = loop.call_soon
    return found


LONG = {
    "VERIFY": (sixteen(0x8F), b"", 1),
    "VERIFY of a pattern": (sixteen(0x8F, 0x06), bytes(512), 1),
    "WRITE SAME": (sixteen(0x93), b"x" * 512, 1),
    "EXTENDED COPY": (b"", b"", 2),
}


@pytest.mark.parametrize("name", LONG)
def test_a_turn_holds_one_piece_of_one_command_and_sessions_are_served_between(
    pair, volume, loop, name
):
    cdb, data, moves = LONG[name]
    if name == "EXTENDED COPY":
        data = copy_list(
            [target(naa(pair, 0))], [segment(0, 0, SECTORS, 0, 2 * SECTORS)], use=3, list_id=0
        )
        cdb = copy_cdb(len(data))
    volume.taken()
    waiting = [carry(pair, cdb, data) for _ in range(3)]
    assert volume.taken() == 0
    for _ in range(3 * PIECES):
        assert read(pair, 0, 512) is not None and volume.taken() == 512
        assert not all(results.got for results in waiting)
        loop.turn()
        assert volume.taken() == moves * PIECE_BYTES
    pair.run()
    assert [results.data for results in waiting] == [b""] * 3 and not loop.calls


@pytest.mark.parametrize("opcode", [0x8F, 0x93])
def test_what_is_small_needs_no_turn(pair, loop, opcode):
    data = b"x" * 512 if opcode == 0x93 else b""
    assert (
        carry(pair, sixteen(opcode, sectors=AT_ONCE_BYTES_MAX // 512), data).data == b""
        and not loop.calls
    )
    assert (
        carry(pair, sixteen(opcode, sectors=AT_ONCE_BYTES_MAX // 512 + 1), data).got == []
        and len(loop.calls) == 1
    )


def test_turns_come_in_order_and_one_that_fails_does_not_end_them():
    loop, turns, seen = Loop(), Turns(), []

    def failing():
        raise ValueError

    turns.call_soon = loop.call_soon
    for step in (
        lambda: seen.append(1),
        failing,
        lambda: turns.take(lambda: seen.append(3)),
        lambda: seen.append(2),
    ):
        turns.take(step)
    loop.turn()
    with pytest.raises(ValueError):
        loop.turn()
    while loop.calls:
        loop.turn()
    assert seen == [1, 2, 3]
