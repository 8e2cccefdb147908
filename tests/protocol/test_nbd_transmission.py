"""Every command of the transmission phase, with every flag, in every style of replies, and the
error of each that may not be carried out.
"""

import errno

import pytest

from protocol.nbd import limits
from protocol.volume import Buffer, Completion
from tests.protocol.memory_volume import MemoryVolume, VolumeError
from tests.protocol.nbd_client import (
    BLOCK_STATUS,
    CACHE,
    DATA,
    DF,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    ERROR,
    ERROR_OFFSET,
    ESHUTDOWN,
    FAST_ZERO,
    FLUSH,
    FUA,
    HOLE,
    NO_HOLE,
    NONE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    SIZE,
    STYLES,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Client,
    assemble,
    served,
)

styles = pytest.mark.parametrize("style", sorted(STYLES))
chunked = pytest.mark.parametrize("style", ["extended", "structured"])
BIG = 40 << 20


class RecordingVolume(MemoryVolume):
    """Knows in which order it was asked for what."""

    def __init__(self, size_bytes: int = SIZE) -> None:
        super().__init__(size_bytes)
        self.asked: list[tuple[str, int, int, bool]] = []

    def try_read(self, offset_bytes: int, length_bytes: int) -> Buffer | None:
        self.asked.append(("read", offset_bytes, length_bytes, False))
        return super().try_read(offset_bytes, length_bytes)

    def write(self, offset_bytes: int, data: Buffer, fua: bool, done: Completion) -> None:
        self.asked.append(("write", offset_bytes, len(data), fua))
        super().write(offset_bytes, data, fua, done)

    def write_zeros(
        self, offset_bytes: int, length_bytes: int, fua: bool, done: Completion
    ) -> None:
        self.asked.append(("zeros", offset_bytes, length_bytes, fua))
        super().write_zeros(offset_bytes, length_bytes, fua, done)

    def flush(self, done: Completion) -> None:
        self.asked.append(("flush", 0, 0, False))
        super().flush(done)


def pattern(length: int) -> bytes:
    return (b"0123456789abcde" * (length // 15 + 1))[:length]


# --- READ ---


@styles
@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 512), (0, 4096), (512, 1024), (SIZE - 512, 512), (3584, 300 * 1024), (0, SIZE)],
)
@pytest.mark.parametrize("hold", [False, True])
def test_read(style: str, flags: int, offset: int, length: int, hold: bool) -> None:
    volume = MemoryVolume(SIZE)
    volume.data[:] = pattern(SIZE)
    peer, _ = served(style, volume)
    volume.hold_reads = hold
    peer.send(peer.encode(READ, offset, length, flags))
    while volume.held:
        volume.release()
        peer.transport.run()
    data = assemble(peer.answers({77: length}), offset, length)
    assert data == volume.data[offset : offset + length]


@chunked
def test_zeros_are_holes(style: str) -> None:
    volume = MemoryVolume(4 << 20)
    volume.data[600 * 1024 : 600 * 1024 + 4096] = pattern(4096)
    peer, _ = served(style, volume)
    (whole,) = peer.request(READ, 0, 4096)
    assert (whole.kind, whole.done, whole.data) == (HOLE, True, bytes(4096))
    found = peer.request(READ, 0, 1 << 20)
    assert [(chunk.kind, chunk.offset, len(chunk.data)) for chunk in found] == [
        (HOLE, 0, 256 << 10),
        (HOLE, 256 << 10, 256 << 10),
        (HOLE, 512 << 10, 64 << 10),
        (DATA, 576 << 10, 64 << 10),
        (HOLE, 640 << 10, 128 << 10),
        (HOLE, 768 << 10, 256 << 10),
    ]
    assert peer.read(0, 1 << 20) == volume.data[: 1 << 20]


@chunked
@pytest.mark.parametrize("hold", [False, True])
def test_df_is_one_chunk(style: str, hold: bool) -> None:
    volume = MemoryVolume(4 << 20)
    volume.data[-1] = 1
    peer, _ = served(style, volume)
    volume.hold_reads = hold
    peer.send(peer.encode(READ, 1 << 20, 3 << 20, DF))
    while volume.held:
        volume.release()
        peer.transport.run()
    (chunk,) = peer.answers({})
    assert (chunk.kind, chunk.offset) == (DATA, 1 << 20)
    assert chunk.data == volume.data[1 << 20 :]
    volume.hold_reads = False
    (hole,) = peer.request(READ, 0, 2 << 20, DF)
    assert (hole.kind, len(hole.data)) == (HOLE, 2 << 20)


@styles
def test_read_of_nothing(style: str) -> None:
    (answer,) = served(style)[0].request(READ, 0, 0)
    assert (answer.kind, answer.error) == (None if style == "simple" else NONE, 0)


@chunked
def test_an_error_in_the_middle_of_a_read_says_where(style: str) -> None:
    volume = MemoryVolume(SIZE)
    volume.data[:] = pattern(SIZE)
    peer, _ = served(style, volume)

    class Fails(VolumeError):
        offset_bytes = 300 * 1024

    def fail(offset: int, length: int) -> Buffer | None:
        if offset:
            raise Fails(errno.EIO)
        return MemoryVolume.try_read(volume, offset, length)

    volume.try_read = fail  # type: ignore[method-assign, assignment]
    first, error = peer.request(READ, 0, SIZE)
    assert (first.kind, first.offset, first.done) == (DATA, 0, False)
    assert (error.kind, error.error, error.offset, error.done) == (
        ERROR_OFFSET,
        EIO,
        300 * 1024,
        True,
    )
    (error,) = peer.request(READ, 0, SIZE, DF)
    assert (error.kind, error.offset) == (ERROR_OFFSET, 300 * 1024)


@styles
@pytest.mark.parametrize("hold", [False, True])
def test_an_error_of_a_whole_read(style: str, hold: bool) -> None:
    peer, export = served(style)
    export.volume.hold_reads = hold
    export.volume.fail_reads = None if hold else errno.EIO
    peer.send(peer.encode(READ, 0, SIZE))
    export.volume.fail_reads = errno.EIO
    export.volume.release()
    peer.transport.run()
    (answer,) = peer.answers({77: SIZE})
    assert answer.error == EIO and answer.kind == (None if style == "simple" else ERROR)


# --- WRITE ---


@styles
@pytest.mark.parametrize("fua", [0, FUA])
@pytest.mark.parametrize("chunk", [1 << 30, 100_000])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 512), (512, 4096), (4096, 4096), (0, 256 << 10), (512, 300 << 10), (1536, 33 << 18)],
)
def test_write(style: str, fua: int, chunk: int, offset: int, length: int) -> None:
    volume = RecordingVolume(9 << 20)
    peer, _ = served(style, volume)
    peer.chunk = chunk
    assert peer.error(WRITE, offset, flags=fua, data=pattern(length)) == 0
    assert volume.data[offset : offset + length] == pattern(length)
    assert volume.data.count(0) == len(volume.data) - length  # a pattern has no zeros
    written = [asked for asked in volume.asked if asked[0] == "write"]
    if length <= limits.PIECE_BYTES:
        assert written == [("write", offset, length, bool(fua))]
    else:
        assert all((at + size) % 4096 == 0 for _, at, size, _ in written[:-1])
        assert not any(durable for *_, durable in written)
        assert (volume.asked[-1][0] == "flush") == bool(fua)
    assert peer.connection.describe()["write_bytes"] == length


@styles
def test_the_largest_write_and_read(style: str) -> None:
    volume = MemoryVolume(BIG)
    peer, _ = served(style, volume)
    data = pattern(32 << 20)
    assert peer.error(WRITE, 0, data=data) == 0
    assert peer.read(0, 32 << 20) == data


@styles
@pytest.mark.parametrize("length", [512, 1 << 19])
@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, ENOSPC),
        (errno.EDQUOT, ENOSPC),
        (errno.EFBIG, ENOSPC),
        (errno.EROFS, EPERM),
        (errno.EACCES, EPERM),
        (errno.EIO, EIO),
        (errno.EBADE, EIO),
        (errno.ENOMEM, 12),
        (errno.ESHUTDOWN, ESHUTDOWN),
    ],
)
def test_what_a_volume_says_of_a_write(style: str, length: int, number: int, error: int) -> None:
    peer, export = served(style)
    export.volume.fail_writes = number
    assert peer.error(WRITE, 0, data=pattern(length)) == error
    export.volume.fail_writes = None
    assert peer.error(WRITE, 0, data=pattern(512)) == (ESHUTDOWN if error == ESHUTDOWN else 0)


@styles
def test_a_failed_flush_of_a_durable_write(style: str) -> None:
    peer, export = served(style)
    export.volume.flush = lambda done: done(VolumeError(errno.EIO))  # type: ignore[method-assign]
    assert peer.error(WRITE, 0, flags=FUA, data=pattern(1 << 19)) == EIO


@styles
def test_a_write_of_nothing(style: str) -> None:
    assert served(style)[0].error(WRITE, 0, 0, PAYLOAD_LEN if style == "extended" else 0) == 0


def test_an_extended_write_without_the_flag_has_no_payload() -> None:
    peer, export = served("extended")
    peer.send(peer.encode(WRITE, 0, 4096))
    assert [answer.error for answer in peer.answers({})] == [EINVAL]
    assert peer.read(0, 512) == bytes(512)
    assert not any(export.volume.data)


# --- FLUSH, TRIM, WRITE_ZEROES, CACHE ---


@styles
def test_flush_is_behind_the_writes_before_it(style: str) -> None:
    volume = RecordingVolume()
    peer, _ = served(style, volume)
    peer.send(peer.encode(WRITE, 0, data=pattern(4096)) + peer.encode(FLUSH, cookie=78))
    assert [answer.cookie for answer in peer.answers({})] == [77, 78]
    assert volume.flushes == 1


@styles
@pytest.mark.parametrize("fua", [0, FUA])
def test_trim_takes_whole_blocks(style: str, fua: int) -> None:
    volume = RecordingVolume()
    peer, _ = served(style, volume)
    assert peer.error(TRIM, 512, 16384, fua) == 0
    assert volume.unmapped == [(4096, 12288)]
    assert peer.error(TRIM, 512, 1024, fua) == 0
    assert volume.unmapped == [(4096, 12288)]
    assert volume.flushes == (2 if fua else 0)


@styles
@pytest.mark.parametrize("fua", [0, FUA])
@pytest.mark.parametrize("flags", [0, FAST_ZERO, NO_HOLE])
def test_write_zeroes(style: str, fua: int, flags: int) -> None:
    volume = RecordingVolume()
    volume.data[:] = pattern(SIZE)
    peer, _ = served(style, volume)
    assert peer.error(WRITE_ZEROES, 4096, 300 << 10, flags | fua) == 0
    assert volume.data[4096 : 4096 + (300 << 10)] == bytes(300 << 10)
    assert volume.data[:4096] == pattern(4096) and volume.data[-1]
    kinds = [kind for kind, *_ in volume.asked if kind != "flush"]
    assert kinds == (["write", "write"] if flags == NO_HOLE else ["zeros"])
    assert volume.flushes == (1 if fua else 0)


@styles
@pytest.mark.parametrize(
    ("offset", "length", "flags"),
    [(0, 4096, FAST_ZERO | NO_HOLE), (512, 4096, FAST_ZERO), (0, 512, FAST_ZERO)],
)
def test_a_zero_that_is_not_fast_changes_nothing(
    style: str, offset: int, length: int, flags: int
) -> None:
    volume = RecordingVolume()
    peer, _ = served(style, volume)
    assert peer.error(WRITE_ZEROES, offset, length, flags) == ENOTSUP
    assert not volume.asked


@styles
@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES])
def test_long_ranges_go_step_by_step(
    style: str, command: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.nbd.sweeps.SWEEP_STEP_BYTES", 1 << 18)
    volume = RecordingVolume()
    volume.data[:] = pattern(SIZE)
    peer, _ = served(style, volume)
    assert peer.error(command, 0, SIZE) == 0
    assert not any(volume.data)
    assert len(volume.unmapped or volume.asked) == 4


@styles
@pytest.mark.parametrize("hold", [False, True])
def test_cache_reads_and_sends_nothing(style: str, hold: bool) -> None:
    volume = RecordingVolume()
    peer, _ = served(style, volume)
    volume.hold_reads = hold
    peer.send(peer.encode(CACHE, 512, 600 << 10))
    while volume.held:
        volume.release()
        peer.transport.run()
    assert [answer.error for answer in peer.answers({})] == [0]
    assert [(at, size) for _, at, size, _ in volume.asked] == [
        (512, 256 << 10),
        (512 + (256 << 10), 256 << 10),
        (512 + (512 << 10), 88 << 10),
    ]


@styles
@pytest.mark.parametrize("hold", [False, True])
def test_cache_says_what_cannot_be_loaded(style: str, hold: bool) -> None:
    peer, export = served(style)
    export.volume.hold_reads = hold
    export.volume.fail_reads = None if hold else errno.EIO
    peer.send(peer.encode(CACHE, 0, 4096))
    export.volume.fail_reads = errno.EIO
    export.volume.release()
    peer.transport.run()
    assert [answer.error for answer in peer.answers({})] == [EIO]


@styles
@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES, FLUSH])
def test_what_a_volume_says_of_other_commands(style: str, command: int) -> None:
    peer, export = served(style)
    if command == FLUSH:
        export.volume.flush = lambda done: done(VolumeError(errno.EIO))  # type: ignore[method-assign]
    export.volume.fail_writes = errno.ENOSPC
    length = 0 if command == FLUSH else 4096
    assert peer.error(command, 0, length) == (EIO if command == FLUSH else ENOSPC)


# --- DISC ---


@styles
def test_disc_waits_for_what_is_in_flight(style: str) -> None:
    peer, export = served(style)
    export.volume.hold_writes = True
    peer.send(peer.encode(WRITE, 0, data=pattern(512)) + peer.encode(DISC) + b"more")
    assert not peer.is_closed() and not peer.answers({})
    export.volume.release()
    peer.transport.run()
    assert [answer.error for answer in peer.answers({})] == [0]
    assert peer.transport.closed and peer.connection.failure is None
    assert export.detached == [peer.connection]


@styles
def test_disc_alone_closes_without_a_reply(style: str) -> None:
    peer, _ = served(style)
    peer.send(peer.encode(DISC))
    assert peer.transport.closed and not peer.transport.take()


# --- Errors ---

WRITING = {WRITE, TRIM, WRITE_ZEROES}
RANGED = [READ, WRITE, TRIM, CACHE, WRITE_ZEROES]


def refused(peer: Client, command: int, offset: int, length: int, flags: int = 0) -> int:
    """The error of a request; and the next one is answered."""
    data = bytes(length) if command == WRITE else b""
    error = peer.error(command, offset, length, flags, data)
    assert peer.read(0, 512) == bytes(512)
    return error


@styles
@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 100), (511, 513), (256, 256)])
def test_unaligned(style: str, command: int, offset: int, length: int) -> None:
    assert refused(served(style)[0], command, offset, length) == EINVAL


@styles
@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(
    ("offset", "length"), [(SIZE, 512), (SIZE - 512, 1024), ((1 << 64) - 512, 512), (0, SIZE + 512)]
)
def test_beyond_the_end(style: str, command: int, offset: int, length: int) -> None:
    error = ENOSPC if command in {WRITE, WRITE_ZEROES} else EINVAL
    assert refused(served(style)[0], command, offset, length) == error


@styles
@pytest.mark.parametrize("command", sorted(WRITING))
def test_read_only(style: str, command: int) -> None:
    assert refused(served(style, read_only=True)[0], command, 0, 4096) == EPERM


@styles
@pytest.mark.parametrize("command", RANGED)
def test_a_reservation_of_another_client(style: str, command: int) -> None:
    """It comes and goes while the connection is open."""
    peer, export = served(style)
    export.write_errno = errno.EPERM
    assert refused(peer, command, 0, 4096) == (EPERM if command in WRITING else 0)
    export.read_errno = errno.EPERM
    data = bytes(4096) if command == WRITE else b""
    assert peer.error(command, 0, 4096, 0, data) == EPERM
    assert peer.error(FLUSH) == 0
    export.read_errno = export.write_errno = 0
    assert refused(peer, command, 0, 4096) == 0


@styles
def test_a_reservation_that_comes_in_the_middle_of_a_write(style: str) -> None:
    peer, export = served(style)
    message = peer.encode(WRITE, 0, data=pattern(1 << 19))
    peer.send(message[: 300 << 10])
    export.write_errno = errno.EPERM
    peer.send(message[300 << 10 :])
    assert [answer.error for answer in peer.answers({})] == [EPERM]
    assert not any(export.volume.data[300 << 10 :])


@styles
def test_a_reservation_that_comes_in_the_middle_of_zeros(style: str) -> None:
    peer, export = served(style)
    export.volume.data[:] = pattern(SIZE)
    export.volume.hold_writes = True
    peer.send(peer.encode(WRITE_ZEROES, 0, SIZE, NO_HOLE))
    export.write_errno = errno.EPERM
    export.volume.release()
    peer.transport.run()
    assert [answer.error for answer in peer.answers({})] == [EPERM]
    assert export.volume.data[-1]


FLAGS = {
    READ: DF,
    WRITE: 0,
    FLUSH: 0,
    TRIM: 0,
    CACHE: 0,
    WRITE_ZEROES: NO_HOLE | FAST_ZERO,
    BLOCK_STATUS: REQ_ONE,
}


def foreign_flags() -> list[tuple[str, int, int]]:
    """Style, command and each flag that the command has not."""
    found = []
    for style in sorted(STYLES):
        for command, flags in FLAGS.items():
            known = flags | FUA
            known &= ~DF if style == "simple" else -1
            known |= PAYLOAD_LEN if style == "extended" else 0
            found += [(style, command, 1 << bit) for bit in range(16) if not known & 1 << bit]
    return found


@pytest.mark.parametrize(("style", "command", "flag"), foreign_flags())
def test_flags_that_a_command_has_not(style: str, command: int, flag: int) -> None:
    length = 0 if command == FLUSH else 512
    assert refused(served(style)[0], command, 0, length, flag) == EINVAL


@styles
@pytest.mark.parametrize("command", [8, 9, 100, 0xFFFF])
def test_unknown_commands(style: str, command: int) -> None:
    assert refused(served(style)[0], command, 0, 512) == EINVAL


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 99])
@pytest.mark.parametrize("size", [1, 512, 8192, 1 << 20])
def test_payloads_that_a_command_has_not_are_received(command: int, size: int) -> None:
    peer, export = served("extended")
    assert peer.error(command, 0, data=bytes(size)) == EINVAL
    assert peer.read(0, 512) == bytes(512)
    assert not export.volume.unmapped


@styles
@pytest.mark.parametrize(("offset", "length"), [(512, 0), (0, 512)])
def test_flush_has_no_range(style: str, offset: int, length: int) -> None:
    assert refused(served(style)[0], FLUSH, offset, length) == EINVAL


@styles
def test_reads_and_caches_that_are_too_long(style: str) -> None:
    peer, _ = served(style, MemoryVolume(BIG))
    too_long = (32 << 20) + 512
    assert refused(peer, READ, 0, too_long) == (EINVAL if style == "simple" else EOVERFLOW)
    assert refused(peer, CACHE, 0, too_long) == EOVERFLOW
    assert refused(peer, CACHE, 0, 32 << 20) == 0


@styles
def test_a_payload_that_is_too_long_is_refused_and_ends_the_connection(style: str) -> None:
    peer, _ = served(style, MemoryVolume(BIG))
    flags = PAYLOAD_LEN if style == "extended" else 0
    peer.send(peer.encode(WRITE, 0, (32 << 20) + 512, flags))
    assert [answer.error for answer in peer.answers({})] == [EINVAL]
    assert peer.transport.closed and peer.connection.failure


def test_effect_lengths_of_64_bits() -> None:
    peer, export = served("extended")
    assert peer.error(WRITE_ZEROES, 0, 1 << 40) == ENOSPC
    assert peer.error(TRIM, 0, (1 << 64) - 512) == EINVAL
    assert peer.error(CACHE, 0, 1 << 63) == EINVAL
    assert not export.volume.unmapped


@styles
def test_without_its_magic_number_the_stream_ends(style: str) -> None:
    peer, export = served(style)
    peer.send(bytes(32))
    assert peer.transport.closed and peer.connection.failure
    assert export.detached == [peer.connection]


@pytest.mark.parametrize(
    ("style", "other"), [("simple", "extended"), ("structured", "extended"), ("extended", "simple")]
)
def test_headers_are_of_what_was_negotiated(style: str, other: str) -> None:
    peer, _ = served(style)
    stranger, _ = served(other)
    peer.send(stranger.encode(READ, 0, 512) + bytes(4))
    assert peer.transport.closed


@pytest.mark.parametrize("style", ["structured", "extended"])
def test_errors_come_with_a_message(style: str) -> None:
    (answer,) = served(style)[0].request(READ, SIZE, 512)
    assert b"beyond the 1048576 bytes of disk" in answer.data


def test_an_extended_reply_repeats_the_offset() -> None:
    peer, _ = served("extended")
    for message in (
        peer.encode(READ, 4096, 512),
        peer.encode(WRITE, 4096, data=bytes(512)),
        peer.encode(CACHE, 4096, 512),
        peer.encode(READ, 4096, 511),
    ):
        peer.send(message)
        sent = peer.transport.take()
        assert sent[16:24] == (4096).to_bytes(8, "big")
