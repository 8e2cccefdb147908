"""Data between initiator and target, coupled in memory: every data phase, residuals, errors of the
volume, resizes.
"""

import errno
import itertools
import os

import pytest

from protocol.iscsi import limits
from protocol.iscsi.initiator.cdbs import parse_capacity
from protocol.iscsi.initiator.task import CommandFailed
from protocol.volume import Buffer
from tests.protocol.coupling import Coupling, coupled, settings
from tests.protocol.directory import recorded
from tests.protocol.exchanges import Results, read, write
from tests.protocol.memory_volume import MemoryVolume

SIZE = 8 << 20


FLOWS = list(
    itertools.product([False, True], [False, True], [False, True], [False, True], [1 << 30, 997])
)


@pytest.mark.parametrize(("digests", "immediate", "initial_r2t", "unsolicited", "chunk"), FLOWS)
def test_every_data_phase_moves_the_same_bytes(digests, immediate, initial_r2t, unsolicited, chunk):
    volume = MemoryVolume(SIZE)
    pair = coupled(
        volume,
        chunk,
        header_digest=digests,
        data_digest=digests,
        immediate_data=immediate,
        initial_r2t=initial_r2t,
        unsolicited_data=unsolicited,
        data_segment_bytes=8192,
        max_burst_bytes=100_000,
        first_burst_bytes=20_000,
    )
    for size in (512, 4096, 8192, 20_480, 65_536, 307_200):
        data = os.urandom(size)
        write(pair, 4096, data)
        assert volume.data[4096 : 4096 + size] == data
        assert read(pair, 4096, size) == data
    assert pair.target.failure is None
    assert pair.target.describe()["commands_in_flight"] == 0


def test_a_transfer_of_many_bursts():
    volume = MemoryVolume(SIZE)
    pair = coupled(volume, data_segment_bytes=512, max_burst_bytes=1536, first_burst_bytes=512)
    data = os.urandom(512 * 101)
    write(pair, 512, data)
    assert read(pair, 512, len(data)) == data


def test_many_commands_are_in_flight_within_the_window():
    volume = MemoryVolume(SIZE)
    volume.hold_reads = True
    pair = coupled(volume)
    results = [Results() for _ in range(3 * limits.COMMAND_WINDOW)]
    for index, result in enumerate(results):
        volume.data[index * 512] = index & 0xFF
        pair.initiator.submit_read(0, index * 512, 512, result)
    pair.run()
    assert (
        pair.target.describe()["commands_in_flight"]
        == pair.initiator.in_flight
        == limits.COMMAND_WINDOW
    )
    while pair.initiator.in_flight:
        volume.release()
        pair.run()
    assert [result.data[0] for result in results] == [index & 0xFF for index in range(len(results))]


def test_the_write_allowance_bounds_what_is_solicited(monkeypatch):
    monkeypatch.setattr(limits, "WRITE_BUFFER_BYTES", 300_000)
    volume = MemoryVolume(SIZE)
    pair = coupled(volume, immediate_data=False, max_burst_bytes=4096)
    pieces = [os.urandom(100_352) for _ in range(10)]
    results = [Results() for _ in pieces]
    for index, (piece, result) in enumerate(zip(pieces, results, strict=True)):
        pair.initiator.submit_write(0, index * 100_352, piece, result)
    pair.run()
    assert [result.data for result in results] == [b""] * 10
    assert volume.data[: 10 * 100_352] == b"".join(pieces)


def test_a_write_larger_than_the_whole_allowance_goes_alone(monkeypatch):
    monkeypatch.setattr(limits, "WRITE_BUFFER_BYTES", 1000)
    pair = coupled(MemoryVolume(SIZE), immediate_data=False)
    write(pair, 0, os.urandom(8192))


ERRORS = [
    (errno.ENOSPC, True, (0x7, 0x27, 0x07)),
    (errno.EIO, False, (0x3, 0x11, 0x00)),
    (errno.EIO, True, (0x3, 0x0C, 0x00)),
    (errno.EROFS, True, (0x7, 0x27, 0x00)),
    (errno.EINVAL, True, (0x5, 0x21, 0x00)),
    (errno.EINVAL, False, (0x5, 0x21, 0x00)),
    (errno.ESHUTDOWN, True, (0x2, 0x04, 0x00)),
    (errno.ESHUTDOWN, False, (0x2, 0x04, 0x00)),
    (errno.ENOMEM, True, (0x4, 0x44, 0x00)),
]


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize(("number", "writing", "expected"), ERRORS)
def test_every_error_of_a_volume_has_its_sense(number, writing, expected, digests, held):
    volume = MemoryVolume(SIZE)
    pair = coupled(volume, header_digest=digests)
    results = Results()
    volume.hold_reads = volume.hold_writes = held
    if writing:
        volume.fail_writes = number
        pair.initiator.submit_write(0, 0, bytes(512), results)
    else:
        volume.fail_reads = None if held else number
        pair.initiator.submit_read(0, 0, 512, results)
    pair.run()
    volume.fail_reads = None if writing else number
    volume.release()
    pair.run()
    failure = results.failure
    assert (failure.status, (failure.key, failure.asc, failure.ascq)) == (0x02, expected)
    assert pair.target.describe()["commands_in_flight"] == 0


def test_a_read_that_fails_in_the_middle_tells_what_is_missing():
    volume = MemoryVolume(SIZE)
    pair = coupled(volume)
    whole = volume.try_read

    def first_piece_only(offset_bytes: int, length_bytes: int) -> Buffer | None:
        return whole(offset_bytes, length_bytes) if offset_bytes < 256 * 1024 else None

    volume.try_read = first_piece_only  # type: ignore[method-assign]
    results = Results()
    command = pair.initiator.submit_read(0, 0, 1 << 20, results)
    volume.hold_reads = True
    pair.run()
    volume.fail_reads = errno.EIO
    volume.release()
    pair.run()
    assert (results.failure.key, results.failure.asc) == (0x3, 0x11)
    assert command.residual > 0


def test_a_resize_is_told_once_to_every_nexus():
    volume = MemoryVolume(SIZE)
    node = recorded({0: volume})
    pairs = [Coupling(node, settings(isid=isid)).login() for isid in (1, 2)]
    for pair in pairs:
        with pytest.raises(CommandFailed, match="6/29/00"):
            pair.command(bytes(6))
        pair.command(bytes(6))
    volume.data.extend(bytes(SIZE))
    node.volume_resized(volume)
    for pair in pairs:
        results = Results()
        pair.initiator.submit_read(0, 0, 512, results)
        pair.run()
        assert (results.failure.key, results.failure.asc, results.failure.ascq) == (6, 0x2A, 0x09)
        results = Results()
        pair.initiator.submit_capacity(0, results)
        pair.run()
        assert parse_capacity(results.data) == 2 * SIZE
        assert read(pair, 2 * SIZE - 512, 512) == bytes(512)


def test_a_resize_that_nobody_told_is_noticed_by_the_next_general_command():
    volume = MemoryVolume(SIZE)
    pair = coupled(volume)
    volume.data.extend(bytes(SIZE))
    with pytest.raises(CommandFailed, match="6/2A/09"):
        pair.command(bytes(6))


def residuals(
    pair: Coupling, opcode: int, expected: int, sectors: int, data: bytes = b""
) -> tuple[int, int]:
    """Residual of a READ(10) or WRITE(10): positive underflow, negative overflow; and the bytes
    that came.
    """
    cdb = bytes((opcode, 0, 0, 0, 0, 0, 0, sectors >> 8, sectors & 0xFF, 0))
    results = Results()
    command = pair.initiator.submit(0, cdb, results, read_bytes=0 if data else expected, data=data)
    pair.run()
    return command.residual, len(results.data)


@pytest.mark.parametrize(
    ("expected", "sectors", "residual"),
    [
        (512, 1, 0),
        (1000, 1, 488),
        (10_000, 2, 8976),
        (200, 1, -312),
        (512, 2, -512),
        (4096, 0, 4096),
    ],
)
def test_residuals_of_reads(expected, sectors, residual):
    assert residuals(coupled(MemoryVolume(SIZE)), 0x28, expected, sectors) == (
        residual,
        min(expected, sectors * 512),
    )


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize(
    ("announced", "sectors", "residual", "written"),
    [
        (512, 1, 0, 512),
        (1000, 1, 488, 512),
        (200, 1, -312, 0),
        (512, 2, -512, 512),
        (1536, 1, 1024, 512),
    ],
)
def test_residuals_of_writes(announced, sectors, residual, written, immediate):
    volume = MemoryVolume(SIZE)
    pair = coupled(volume, immediate_data=immediate)
    assert residuals(pair, 0x2A, announced, sectors, b"\xaa" * announced) == (residual, 0)
    assert volume.data[:2048] == b"\xaa" * written + bytes(2048 - written)


def test_unsolicited_data_beyond_what_the_cdb_wants_are_taken_and_dropped():
    volume = MemoryVolume(SIZE)
    pair = coupled(volume, immediate_data=False, unsolicited_data=True, data_segment_bytes=512)
    assert residuals(pair, 0x2A, 4096, 1, b"\xbb" * 4096) == (3584, 0)
    assert volume.data[:1024] == b"\xbb" * 512 + bytes(512)
    assert read(pair, 0, 512) == b"\xbb" * 512
