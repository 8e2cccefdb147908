"""COMPARE AND WRITE and ORWRITE, and the gate that lets them run alone."""

import errno

import pytest

from protocol.iscsi import task_management
from protocol.iscsi.initiator.task import CommandFailed
from protocol.scsi.gate import Gate
from tests.protocol.coupling import Coupling, coupled, settings
from tests.protocol.directory import recorded
from tests.protocol.exchanges import Results, manage
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.test_scsi_identity import fails

SIZE = 8 << 20
OLD, NEW, OTHER = b"\x0f" * 512, b"\xf0" * 512, b"\x33" * 512


def compare_and_write(lba: int, sectors: int, flags: int = 0) -> bytes:
    return bytes((0x89, flags)) + lba.to_bytes(8, "big") + bytes((0, 0, 0, sectors, 0, 0))


def or_write(lba: int, sectors: int) -> bytes:
    return bytes((0x8B, 0)) + lba.to_bytes(8, "big") + sectors.to_bytes(4, "big") + bytes(2)


@pytest.fixture
def volume() -> MemoryVolume:
    volume = MemoryVolume(SIZE)
    volume.data[:8192] = OLD * 16
    return volume


@pytest.fixture
def pair(volume: MemoryVolume) -> Coupling:
    return coupled(volume)


def test_an_equal_range_is_written(pair, volume):
    pair.command(compare_and_write(1, 2), data=OLD * 2 + NEW * 2)
    assert volume.data[:2048] == OLD + NEW * 2 + OLD
    pair.command(compare_and_write(0, 255), data=bytes(volume.data[: 255 * 512]) + OTHER * 255)
    assert volume.data[: 255 * 512] == OTHER * 255


def test_a_difference_is_told_with_its_offset_and_nothing_is_written(pair, volume):
    wrong = bytearray(OLD * 2)
    wrong[700] ^= 1
    failure = fails(pair, compare_and_write(0, 2), (14, 0x1D, 0), data=bytes(wrong) + NEW * 2)
    assert int.from_bytes(failure.sense[3:7], "big") == 700
    assert volume.data[:1024] == OLD * 2


@pytest.mark.parametrize("data", [OLD, OLD * 3, b""])
def test_the_data_are_exactly_two_copies(pair, data):
    fails(pair, compare_and_write(0, 1), (5, 0x24, 0), data=data)


def test_no_sectors(pair):
    pair.command(compare_and_write(0, 0))
    pair.command(or_write(0, 0))
    fails(pair, compare_and_write(0, 0), (5, 0x24, 0), data=OLD * 512)
    fails(pair, compare_and_write(SIZE // 512, 1), (5, 0x21, 0), data=OLD * 2)


def test_or(pair, volume):
    pair.command(or_write(1, 2), data=NEW + OTHER)
    assert volume.data[:2048] == OLD + b"\xff" * 512 + b"\x3f" * 512 + OLD
    volume.fail_reads = errno.EIO
    fails(pair, or_write(1, 1), (3, 0x0C, 0), data=NEW)


def sessions(volume: MemoryVolume, count: int) -> list[Coupling]:
    node = recorded({0: volume})
    pairs = [Coupling(node, settings(isid=isid)).login() for isid in range(1, count + 1)]
    for mapped in node.unit_for(volume).nexuses:
        mapped.take_attention()
    return pairs


def run(*pairs: Coupling) -> None:
    for _ in range(3):
        for pair in pairs:
            pair.run()


@pytest.mark.parametrize("held", [False, True])
def test_of_many_at_once_one_wins(volume, held):
    volume.hold_reads = volume.hold_writes = held
    pairs = sessions(volume, 4)
    results = []
    for number, pair in enumerate(pairs):
        for _ in range(30):
            results.append(Results())
            pair.initiator.submit(
                0, compare_and_write(0, 1), results[-1], data=OLD + bytes([number]) * 512
            )
    for _ in range(1000):
        run(*pairs)
        if not volume.held:
            break
        volume.release()
    errors = [result.got[0][1] for result in results]
    assert errors.count(None) == 1
    assert {(error.key, error.asc) for error in errors if isinstance(error, CommandFailed)} == {
        (14, 0x1D)
    }


def test_a_write_does_not_pass_between_compare_and_write(volume):
    volume.hold_reads = True
    one, other = sessions(volume, 2)
    swap, write = Results(), Results()
    one.initiator.submit(0, compare_and_write(0, 1), swap, data=OLD + NEW)
    one.run()
    other.initiator.submit_write(0, 0, OTHER, write)
    other.run()
    assert swap.got == write.got == [] and volume.data[:512] == OLD
    volume.release()
    run(one, other)
    assert swap.data == write.data == b"" and volume.data[:512] == OTHER
    volume.hold_reads = False
    other.initiator.submit_write(0, 0, OLD, Results())
    run(other)
    assert other.target._phase is not None and all(
        mapped.plain_write for mapped in other.target._phase.session.units.values()
    )


def test_it_waits_for_writes_under_way(volume):
    volume.hold_writes = True
    one, other = sessions(volume, 2)
    write, swap = Results(), Results()
    other.initiator.submit_write(0, 4096, OTHER, write)
    other.run()
    one.initiator.submit(0, compare_and_write(0, 1), swap, data=OLD + NEW)
    one.run()
    assert volume.data[:512] == OLD and len(volume.held) == 1
    volume.release()
    assert volume.data[:512] == NEW
    volume.release()
    run(one, other)
    assert write.data == swap.data == b""


def test_an_aborted_one_gives_up_its_place(volume):
    volume.hold_writes = True
    one, other = sessions(volume, 2)
    other.initiator.submit_write(0, 4096, OTHER, Results())
    other.run()
    swap, second = Results(), Results()
    task = one.initiator.submit(0, compare_and_write(0, 1), swap, data=OLD + NEW)
    one.initiator.submit(0, compare_and_write(0, 1), second, data=OLD + OTHER)
    one.run()
    assert manage(one, task_management.ABORT_TASK, task=task) == [0]
    for _ in range(3):
        volume.release()
        run(one, other)
    assert swap.got == [] and second.data == b"" and volume.data[:512] == OTHER


def test_the_gate_in_every_order():
    log: list[str] = []
    changed: list[bool] = []
    gate = Gate(lambda: changed.append(gate.closed))

    def instant() -> None:
        log.append("instant")
        gate.leave()

    gate.enter(lambda: log.append("first"), True, 2)
    gate.enter(lambda: log.append("write"), False, 0)
    gate.enter(lambda: log.append("second"), True, 0)
    gate.enter(instant, False, 0)
    seen = []
    for _ in range(5):
        seen.append(list(log))
        gate.leave()
    everything = ["first", "write", "second", "instant"]
    assert seen == [[], [], ["first"], ["first", "write"], ["first", "write", "second"]]
    assert log == everything and not gate.closed
    assert changed[0] and not changed[-1]


def test_a_thousand_that_end_at_once_do_not_recurse():
    gate = Gate(lambda: None)
    ended: list[int] = []

    def instant() -> None:
        ended.append(len(ended))
        gate.leave()

    gate.enter(lambda: None, True, 0)
    for _ in range(5000):
        gate.enter(instant, True, 0)
    gate.leave()
    assert ended == list(range(5000)) and not gate.closed


def write_atomic(lba: int, sectors: int, flags: int = 0) -> bytes:
    return (
        bytes((0x9C, flags))
        + lba.to_bytes(8, "big")
        + bytes(2)
        + sectors.to_bytes(2, "big")
        + bytes(2)
    )


def test_an_atomic_write_reaches_the_volume_in_one_piece(pair, volume):
    pieces = []
    take = volume.write

    def write(offset, data, fua, done):
        pieces.append((offset, len(data), fua))
        take(offset, data, fua, done)

    volume.write = write
    pair.command(write_atomic(8, 256), data=OTHER * 256)
    pair.command(write_atomic(0, 8, 0x08), data=NEW * 8)
    assert pieces == [(4096, 256 * 512, False), (0, 4096, True)]
    assert volume.data[: 264 * 512] == NEW * 8 + OTHER * 256


def test_atomic_writes_that_cannot_be_one_step(pair, volume):
    before = bytes(volume.data)
    for lba, sectors in ((1, 8), (8, 1), (0, 7), (0, 264), (4, 0)):
        fails(pair, write_atomic(lba, sectors), (5, 0x24, 0), data=OTHER * sectors)
    fails(
        pair, write_atomic(0, 16), (5, 0x24, 0), data=OTHER * 8
    )  # fewer data than the command wants
    for lba, sectors in ((SIZE // 512, 8), (SIZE // 512 - 8, 16), (1 << 63, 8), (SIZE // 512, 0)):
        fails(pair, write_atomic(lba, sectors), (5, 0x21, 0), data=OTHER * sectors)
    fails(
        pair,
        write_atomic(0, 8)[:11] + b"\x01" + write_atomic(0, 8)[12:],
        (5, 0x24, 0),
        data=OTHER * 8,
    )
    pair.command(write_atomic(0, 0))
    assert volume.data == before


def test_the_limits_of_atomic_writes_are_told(pair):
    data = pair.command(bytes((0x12, 1, 0xB0, 0, 64, 0)), read_bytes=64)
    assert [int.from_bytes(data[at : at + 4], "big") for at in (44, 48, 52, 56, 60)] == [
        256,
        8,
        8,
        0,
        0,
    ]
