"""SANITIZE: what a disk reads as afterwards, what is possible meanwhile, and how a
failure is left.
"""

import errno

import pytest

from protocol.iscsi import task_management
from protocol.iscsi.initiator.task import CommandFailed
from protocol.scsi import limits
from tests.protocol.coupling import Coupling, coupled, settings
from tests.protocol.directory import Keeper, recorded
from tests.protocol.exchanges import Results, manage
from tests.protocol.memory_volume import MemoryVolume, VolumeError
from tests.protocol.test_scsi_identity import fails

SIZE = 4 * limits.SANITIZE_STEP_BYTES
OVERWRITE, ERASE, EXIT = 1, 2, 0x1F
IN_PROGRESS, FAILED, BAD_CDB, BAD_LIST = (2, 4, 0x1B), (3, 0x31, 3), (5, 0x24, 0), (5, 0x26, 0)
IMMED, AUSE = 0x80, 0x20
READ, WRITE = bytes((0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0)), bytes((0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0))
TEST_UNIT_READY = bytes(6)


@pytest.fixture
def volume() -> MemoryVolume:
    volume = MemoryVolume(SIZE)
    volume.data[:] = b"a" * SIZE
    return volume


@pytest.fixture
def pair(volume: MemoryVolume) -> Coupling:
    return coupled(volume)


def kept_session(keeper: Keeper, volume: MemoryVolume) -> Coupling:
    node = recorded({0: volume})
    node.keeper = keeper
    pair = Coupling(node, settings()).login()
    node.unit_for(volume).nexuses[0].take_attention()
    return pair


def sanitize(action: int, size: int = 0, flags: int = 0) -> bytes:
    return bytes((0x48, flags | action, 0, 0, 0, 0, 0)) + size.to_bytes(2, "big") + b"\0"


def pattern(data: bytes, flags: int = 1) -> bytes:
    return bytes((flags, 0)) + len(data).to_bytes(2, "big") + data


def begin(pair: Coupling, cdb: bytes, data: bytes = b"") -> Results:
    results = Results()
    pair.initiator.submit(0, cdb, results, data=data)
    pair.run()
    return results


def finish(pair: Coupling, volume: MemoryVolume) -> None:
    for _ in range(100):
        volume.release()
        pair.run()


@pytest.mark.parametrize(
    ("flags", "data", "sector"),
    [
        (1, b"\xaa" * 512, b"\xaa" * 512),
        (3, b"abc", (b"abc" * 171)[:512]),
        (0x81, b"\x0f", b"\x0f" * 512),
        (0x82, b"\x0f", b"\xf0" * 512),
        (0x1F, b"\0", bytes(512)),
    ],
)
def test_overwrite(pair, volume, flags, data, sector):
    parameters = pattern(data, flags)
    pair.command(sanitize(OVERWRITE, len(parameters)), data=parameters)
    assert volume.data == sector * (SIZE // 512)
    assert volume.flushes == SIZE // limits.SANITIZE_STEP_BYTES
    assert len(pair.command(READ, read_bytes=512)) == 512


def test_a_disk_that_is_no_multiple_of_the_step():
    volume = MemoryVolume(limits.SANITIZE_STEP_BYTES + 1536)
    coupled(volume).command(sanitize(OVERWRITE, 5), data=pattern(b"x"))
    assert volume.data == b"x" * len(volume.data)


def test_block_erase_deallocates(pair, volume):
    pair.command(sanitize(ERASE))
    assert volume.data == bytes(SIZE) and sum(length for _, length in volume.unmapped) == SIZE


def test_wrong_parameters(pair, volume):
    for size in (0, 1, 4, 517, 600):
        fails(pair, sanitize(OVERWRITE, size), BAD_CDB, data=bytes(600)[:size])
    for wrong in (pattern(b"x", 0), pattern(b"x", 0x21), b"\x01\0\0\0x", b"\x01\0\0\x02x"):
        fails(pair, sanitize(OVERWRITE, len(wrong)), BAD_LIST, data=wrong)
    fails(pair, sanitize(OVERWRITE, 12), (5, 0x1A, 0), data=pattern(b"x"))
    for action in (ERASE, EXIT):
        fails(pair, sanitize(action, 8), BAD_CDB, data=bytes(8))
    for action in set(range(32)) - {OVERWRITE, ERASE, EXIT}:
        fails(pair, sanitize(action), BAD_CDB)
    assert volume.data == b"a" * SIZE


def test_only_commands_about_the_unit_are_possible_meanwhile(pair, volume):
    volume.hold_writes = True
    results = begin(pair, sanitize(OVERWRITE, 5), pattern(b"x"))
    assert results.got == []
    for cdb in (
        TEST_UNIT_READY,
        READ,
        bytes((0x1B, 0, 0, 0, 1, 0)),
        sanitize(ERASE),
        sanitize(EXIT),
        bytes((0x1A, 0, 0x3F, 0, 255, 0)),
    ):
        fails(pair, cdb, IN_PROGRESS)
    fails(pair, bytes((0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0)), IN_PROGRESS, data=bytes(512))
    assert pair.command(bytes((0x12, 0, 0, 0, 96, 0)), read_bytes=96)
    assert pair.command(bytes((0xA3, 0x0C)) + bytes(6) + b"\x10\0\0\0", read_bytes=4096)
    finish(pair, volume)
    assert results.data == b"" and volume.data == b"x" * SIZE
    pair.command(TEST_UNIT_READY)


def test_progress_grows(pair, volume):
    volume.hold_writes = True
    results = begin(pair, sanitize(OVERWRITE, 5, IMMED), pattern(b"x"))
    assert results.data == b""
    seen = []
    while True:
        data = pair.command(bytes((3, 0, 0, 0, 18, 0)), read_bytes=18)
        if (data[2], data[12], data[13]) != IN_PROGRESS:
            break
        assert data[15] == 0x80
        seen.append(int.from_bytes(data[16:18], "big"))
        volume.release()  # a write
        volume.release()  # its flush
    assert seen == [0, 0x4000, 0x8000, 0xC000] and volume.data == b"x" * SIZE


def test_resets_aborts_and_the_end_of_the_session_leave_it_alone(volume):
    node = recorded({0: volume})
    pair = Coupling(node, settings()).login()
    node.unit_for(volume).nexuses[0].take_attention()
    volume.hold_writes = True
    results = begin(pair, sanitize(OVERWRITE, 5), pattern(b"x"))
    for function in (
        task_management.ABORT_TASK_SET,
        task_management.LOGICAL_UNIT_RESET,
        task_management.TARGET_WARM_RESET,
    ):
        assert manage(pair, function) == [task_management.COMPLETE]
    assert (
        manage(pair, task_management.TARGET_COLD_RESET) == [task_management.COMPLETE]
        and pair.peer.closed
    )
    pair.target.connection_lost()
    assert not node.sessions and node.units
    again = Coupling(node, settings()).login()
    unit = node.unit_for(volume)
    unit.nexuses[0].take_attention()
    fails(again, TEST_UNIT_READY, IN_PROGRESS)
    for _ in range(2 * SIZE // limits.SANITIZE_STEP_BYTES):
        volume.release()
    again.command(TEST_UNIT_READY)
    assert volume.data == b"x" * SIZE and unit.nexuses[0].plain_read and not unit.gate.closed
    assert all(error is not None for _, error in results.got)


def test_it_waits_for_the_writes_before_it(pair, volume):
    volume.hold_writes = True
    write = begin(pair, bytes((0x2A, 0, 0, 0, 0, 0, 0, 0, 1, 0)), bytes(512))
    results = begin(pair, sanitize(ERASE))
    assert volume.unmapped == [] and write.got == results.got == []
    finish(pair, volume)
    assert write.data == results.data == b"" and volume.data == bytes(SIZE)


@pytest.mark.parametrize("flags", [0, IMMED])
def test_a_write_that_waited_behind_it_is_refused_or_comes_after_it(pair, volume, flags):
    volume.hold_writes = True
    begin(pair, WRITE, bytes(512))
    sanitized = begin(pair, sanitize(OVERWRITE, 5, flags), pattern(b"x"))
    written = begin(pair, WRITE, b"w" * 512)
    again = begin(pair, sanitize(ERASE))
    finish(pair, volume)
    assert sanitized.data == b""
    if flags:
        for refused in (written.failure, again.failure):
            assert (refused.key, refused.asc, refused.ascq) == IN_PROGRESS
        assert volume.data == b"x" * SIZE
    else:
        assert written.data == again.data == b"" and volume.data == bytes(SIZE)


@pytest.mark.parametrize("flags", [0, AUSE, IMMED])
def test_one_that_a_restart_broke_off_has_failed(volume, flags):
    keeper = Keeper()
    pair = kept_session(keeper, volume)
    volume.hold_writes = True
    keeper.held = []
    begin(pair, sanitize(OVERWRITE, 5, flags), pattern(b"x"))
    assert not volume.held  # nothing is overwritten before it is durable that it will be
    keeper.held.pop()(None)
    assert volume.held
    volume.hold_writes, keeper.held = False, None
    pair = kept_session(keeper, volume)  # another life
    fails(pair, READ, FAILED)
    if flags == AUSE:
        pair.command(sanitize(EXIT))
    else:
        fails(pair, sanitize(EXIT), BAD_CDB)
        pair.command(sanitize(ERASE))
    assert keeper.states == {volume.uuid: None}
    pair.command(READ, read_bytes=512)


@pytest.mark.parametrize("before", ["nothing", "failed"])
def test_one_that_cannot_be_kept_does_not_begin(volume, before):
    keeper = Keeper()
    pair = kept_session(keeper, volume)
    if before == "failed":
        volume.fail_writes = errno.EIO
        fails(pair, sanitize(OVERWRITE, 5), FAILED, data=pattern(b"x"))
        volume.fail_writes = None
    keeper.error = VolumeError(errno.EROFS)
    fails(pair, sanitize(OVERWRITE, 5), (7, 0x27, 0), data=pattern(b"x"))
    assert volume.data == b"a" * SIZE
    if before == "failed":
        fails(pair, READ, FAILED)
    else:
        pair.command(READ, read_bytes=512)


def test_the_end_of_one_that_cannot_be_kept_is_a_failure(volume):
    keeper = Keeper()
    pair = kept_session(keeper, volume)
    keeper.held = []
    answer = begin(pair, sanitize(ERASE))
    keeper.held.pop()(None)
    keeper.held.pop()(VolumeError(errno.EROFS))
    pair.run()
    assert (answer.failure.key, answer.failure.asc) == (3, 0x31)
    fails(pair, READ, FAILED)


def test_a_failure_stays_until_it_is_given_up_or_done_again(pair, volume):
    volume.fail_writes = errno.ENOSPC
    fails(pair, sanitize(OVERWRITE, 5), FAILED, data=pattern(b"x"))
    for cdb in (TEST_UNIT_READY, READ):
        fails(pair, cdb, FAILED)
    fails(pair, sanitize(EXIT), BAD_CDB)  # it was begun without AUSE
    fails(pair, sanitize(ERASE, flags=AUSE), FAILED)
    pair.command(sanitize(EXIT))
    pair.command(TEST_UNIT_READY)
    volume.fail_writes = errno.EIO
    fails(pair, sanitize(ERASE), FAILED)
    volume.fail_writes = None
    pair.command(sanitize(ERASE))
    assert pair.command(READ, read_bytes=512) == bytes(512)
    pair.command(sanitize(EXIT))  # nothing has failed: no error


def test_protection_and_reservations(pair, volume):
    volume.read_only = True
    fails(pair, sanitize(ERASE), (7, 0x27, 0))
    volume.read_only = False
    unit = pair.node.unit_for(volume)
    unit.reservations.reserve_spc2("somebody")
    with pytest.raises(CommandFailed) as conflict:
        pair.command(sanitize(ERASE))
    assert conflict.value.status == 0x18 and volume.data == b"a" * SIZE
