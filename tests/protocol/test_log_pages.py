"""LOG SENSE: the provisioning page, the clone page, and how both are asked for."""

from typing import NamedTuple

import pytest

from tests.protocol.coupling import coupled
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.test_scsi_identity import fails, page

BAD_CDB = (5, 0x24, 0)


class Usage(NamedTuple):
    used_bytes: int
    available_bytes: int


class SplitState(NamedTuple):
    holes_remaining_blocks: int | None
    holes_total_blocks: int | None
    running: bool


class ThinClone(MemoryVolume):
    """Knows its usage, and how much of it is backed."""

    def __init__(self, state: SplitState | None) -> None:
        super().__init__(1 << 20)
        self.state = state

    def usage(self) -> Usage:
        return Usage((3 << 20) + 1, 10 << 20)

    def split_state(self) -> SplitState | None:
        return self.state


def log_sense(
    code: int, subpage: int = 0, first: int = 0, control: int = 1, allocation: int = 512
) -> bytes:
    return (
        bytes((0x4D, 0, control << 6 | code, subpage, 0))
        + first.to_bytes(2, "big")
        + allocation.to_bytes(2, "big")
        + b"\0"
    )


def parameters(pair, code: int, first: int = 0) -> dict[int, bytes]:
    data = pair.command(log_sense(code, first=first), read_bytes=512)
    assert data[:2] == bytes((code, 0)) and int.from_bytes(data[2:4], "big") == len(data) - 4
    found, at = {}, 4
    while at < len(data):
        assert data[at + 2] == 3
        found[int.from_bytes(data[at : at + 2], "big")] = data[at + 4 : at + 4 + data[at + 3]]
        at += 4 + data[at + 3]
    return found


def numbers(pair) -> dict[int, int]:
    return {code: int.from_bytes(value, "big") for code, value in parameters(pair, 0x30).items()}


def test_supported_pages():
    pair = coupled(MemoryVolume(1 << 20))
    assert pair.command(log_sense(0), read_bytes=512) == bytes((0, 0, 0, 3, 0, 0x0C, 0x30))
    assert pair.command(log_sense(0, 0xFF), read_bytes=512) == bytes(
        (0x40, 0xFF, 0, 8, 0, 0, 0, 0xFF, 0x0C, 0, 0x30, 0)
    )
    assert pair.command(log_sense(0, allocation=5), read_bytes=512) == bytes((0, 0, 0, 3, 0))


def test_usage_in_the_units_of_the_provisioning_page():
    volume = ThinClone(None)
    pair = coupled(volume)
    unit_bytes = 512 << page(pair, 0xB2)[4]
    assert unit_bytes == 1 << 20
    assert parameters(pair, 0x0C) == {
        1: bytes((0, 0, 0, 10, 2, 0, 0, 0)),
        2: bytes((0, 0, 0, 4, 1, 0, 0, 0)),
    }
    assert list(parameters(pair, 0x0C, first=2)) == [2]


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (None, {3: 0}),
        (SplitState(None, None, False), {3: 1}),
        (SplitState(77, None, False), {1: 77, 3: 1}),
        (SplitState(77, 1 << 40, True), {1: 77, 2: 1 << 40, 3: 2}),
        (SplitState(0, 9, True), {1: 0, 2: 9, 3: 2}),
    ],
)
def test_how_much_of_a_clone_is_backed(state, told):
    assert numbers(coupled(ThinClone(state))) == told


def test_volumes_that_know_nothing():
    pair = coupled(MemoryVolume(1 << 20))
    assert parameters(pair, 0x0C) == {} and numbers(pair) == {3: 0}


def test_what_is_refused():
    pair = coupled(ThinClone(None))
    for control in (0, 2, 3):
        fails(pair, log_sense(0x0C, control=control), BAD_CDB)
    for code in set(range(64)) - {0, 0x0C, 0x30}:
        fails(pair, log_sense(code), BAD_CDB)
    fails(pair, log_sense(0x0C, subpage=1), BAD_CDB)
    fails(pair, log_sense(0x0C, first=3), BAD_CDB)
    fails(pair, b"\x4d\x01" + log_sense(0x0C)[2:], BAD_CDB)


def test_the_soft_threshold_is_told_to_every_nexus():
    volume = ThinClone(None)
    pair = coupled(volume)
    pair.node.soft_threshold_reached()
    fails(pair, bytes(6), (6, 0x38, 7))
    pair.command(bytes(6))
