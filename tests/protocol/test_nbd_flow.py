"""Back-pressure, limits in flight, and the ways in which a connection ends."""

import gc
from collections.abc import Callable

import pytest

from protocol.nbd import limits
from protocol.nbd.fast_path import FastWrite
from protocol.nbd.session import Session
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.nbd_client import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    EINVAL,
    ESHUTDOWN,
    FLUSH,
    NO_HOLE,
    READ,
    SIZE,
    STRUCTURED,
    STYLES,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Answer,
    Client,
    MemoryDirectory,
    MemoryExport,
    feed,
    served,
)

styles = pytest.mark.parametrize("style", sorted(STYLES))


def in_flight(peer: Client) -> int:
    assert peer.connection.session is not None
    return peer.connection.session.in_flight


def later(peer: Client, volume: MemoryVolume, lengths: dict[int, int]) -> list[Answer]:
    """Answers once everything that the volume holds has ended."""
    while volume.held or peer.transport.woken or peer.transport.turns:
        volume.release()
        peer.transport.run()
    return peer.answers(lengths)


# --- Limits ---


@styles
@pytest.mark.parametrize("command", [READ, WRITE])
def test_no_more_requests_are_read_than_may_be_in_flight(style: str, command: int) -> None:
    volume = MemoryVolume(SIZE)
    peer, _ = served(style, volume)
    volume.hold_reads = volume.hold_writes = True
    count = 2 * limits.PIECES_MAX + 10
    data = b"x" * 512 if command == WRITE else b""
    peer.send(b"".join(peer.encode(command, 0, 512, data=data, cookie=n) for n in range(count)))
    assert in_flight(peer) == limits.PIECES_MAX and not peer.transport.reading
    volume.release()
    peer.transport.run()
    assert in_flight(peer) == limits.PIECES_MAX
    found = later(peer, volume, {} if data else dict.fromkeys(range(count), 512))
    assert {answer.cookie for answer in found} == set(range(count))
    assert in_flight(peer) == 0 and peer.transport.reading


@styles
@pytest.mark.parametrize("command", [READ, FLUSH, 99])
def test_a_flood_takes_turns(style: str, command: int) -> None:
    peer, _ = served(style)
    count, length = 4 * limits.REQUESTS_A_TURN, 512 if command == READ else 0
    turns: list[int] = []
    take = peer.transport.turn

    def turn(step: Callable[[], None]) -> None:
        turns.append(len(peer.transport.sent))
        take(step)

    peer.transport.turn = turn  # type: ignore[method-assign]
    peer.send(b"".join(peer.encode(command, 0, length, cookie=n) for n in range(count)))
    assert [answer.cookie for answer in peer.answers(dict.fromkeys(range(count), length))] == list(
        range(count)
    )
    assert len(turns) in {3, 4} and sorted(set(turns)) == turns
    assert peer.transport.reading


def test_a_flood_of_a_client_that_goes() -> None:
    peer, export = served()
    feed(peer.transport, peer.encode(READ, 0, 512) * 4 * limits.REQUESTS_A_TURN)
    assert not peer.transport.reading
    peer.connection.connection_lost()
    peer.transport.run()
    assert export.detached == [peer.connection]


def test_volumes_that_complete_at_once_are_not_waited_for() -> None:
    peer, _ = served()
    count = 3 * limits.PIECES_MAX
    peer.send(b"".join(peer.encode(WRITE, 0, data=b"x" * 512, cookie=n) for n in range(count)))
    assert len(peer.answers({})) == count and peer.transport.reading


@pytest.mark.parametrize("style", ["simple", "structured"])
def test_bytes_in_flight_are_bounded(style: str) -> None:
    volume = MemoryVolume(32 << 20)
    peer, _ = served(style, volume)
    volume.hold_reads = True
    message = b"".join(peer.encode(READ, 0, 32 << 20, cookie=n) for n in range(4))
    peer.send(message)
    if style == "structured":  # one piece each
        assert in_flight(peer) == 4
        return
    assert in_flight(peer) == 256 and not peer.transport.reading
    found = later(peer, volume, dict.fromkeys(range(4), 32 << 20))
    assert [len(answer.data) for answer in found] == [32 << 20] * 4


def test_a_long_write_waits_for_its_pieces() -> None:
    volume = MemoryVolume(16 << 20)
    peer, _ = served("simple", volume)
    volume.hold_writes = True
    peer.connection.session.in_flight = limits.PIECES_MAX - 3  # type: ignore[union-attr]
    peer.chunk = 50_000
    peer.send(peer.encode(WRITE, 0, data=b"x" * (8 << 20)))
    assert in_flight(peer) == limits.PIECES_MAX and not peer.transport.reading
    assert len(peer.unread) > (8 << 20) - 3 * limits.PIECE_BYTES - limits.RECEIVE_BUFFER_BYTES
    while peer.unread:
        volume.release()
        peer.transport.run()
        peer.send(b"")
    assert [answer.error for answer in later(peer, volume, {})] == [0]
    assert volume.data[: 8 << 20] == b"x" * (8 << 20)


# --- A client that does not drain ---


@styles
@pytest.mark.parametrize("size", [4096, 1 << 20])
def test_reads_wait_for_a_client_that_does_not_drain(style: str, size: int) -> None:
    volume = MemoryVolume(1 << 20)
    volume.data[:] = b"x" * (1 << 20)
    peer, _ = served(style, volume)
    peer.transport.pause_above = 3 << 20
    count = (16 << 20) // size
    message = b"".join(peer.encode(READ, 0, size, cookie=n) for n in range(count))
    peer.chunk, taken = 1000, 0
    peer.unread += message
    output = b""
    while len(output) < count * size:
        peer.send(b"")
        piece = peer.transport.take()
        assert len(piece) < 7 << 20
        output += piece
        taken += 1
        peer.connection.resume_writing()
        peer.transport.run()
    assert taken > 2
    peer.transport.sent += output
    found = peer.answers(dict.fromkeys(range(count), size))
    assert sum(len(answer.data) for answer in found) == count * size
    assert in_flight(peer) == 0


def test_a_lost_client_does_not_keep_a_read_waiting() -> None:
    volume = MemoryVolume(8 << 20)
    volume.data[:] = b"x" * (8 << 20)
    peer, export = served("structured", volume)
    peer.transport.pause_above = 1 << 20
    peer.send(peer.encode(READ, 0, 8 << 20))
    assert in_flight(peer) == 1
    peer.connection.connection_lost()
    assert in_flight(peer) == 0 and export.detached


# --- Lost connections ---


@styles
@pytest.mark.parametrize(
    ("command", "length", "flags"),
    [
        (READ, 4096, 0),
        (READ, 1 << 19, 0),
        (WRITE, 4096, 0),
        (WRITE, 1 << 19, 0),
        (TRIM, 8192, 0),
        (WRITE_ZEROES, 1 << 19, NO_HOLE),
        (CACHE, 1 << 19, 0),
        (FLUSH, 0, 0),
    ],
)
def test_an_export_is_detached_when_its_volume_holds_nothing(
    style: str, command: int, length: int, flags: int
) -> None:
    volume = MemoryVolume(SIZE)
    peer, export = served(style, volume)
    volume.hold_reads = volume.hold_writes = True
    data = b"x" * length if command == WRITE else b""
    peer.send(peer.encode(command, 0, length, flags, data))
    assert in_flight(peer) > 0
    peer.connection.connection_lost()
    assert not export.detached
    later(peer, volume, {})
    assert export.detached == [peer.connection]
    assert not peer.transport.sent
    assert len(peer.connection.get_buffer()) == 0


@styles
def test_a_connection_leaves_no_ring_of_references(style: str) -> None:
    """A process that makes no rings collects garbage rarely."""

    def alive() -> int:
        return sum(isinstance(thing, Session | FastWrite) for thing in gc.get_objects())

    gc.collect()
    before = alive()
    gc.disable()
    try:
        peer, export = served(style)
        peer.request(WRITE, 0, data=b"x" * 4096)
        peer.request(WRITE, 512, data=b"x" * (1 << 19))
        assert peer.error(READ, 512, 1) == EINVAL
        peer.connection.connection_lost()
        assert alive() > before
        export.attached.clear()
        export.detached.clear()
        peer.transport.connection = None
        del peer
        assert alive() == before
    finally:
        gc.enable()


# --- Going down ---


@styles
@pytest.mark.parametrize("command", [READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES])
def test_a_shutdown_is_answered_before_the_end(style: str, command: int) -> None:
    volume = MemoryVolume(SIZE)
    peer, export = served(style, volume)
    volume.hold_reads = True
    peer.send(peer.encode(READ, 0, 4096, cookie=1))
    peer.connection.tick(0.0)
    peer.connection.shutdown("the daemon stops")
    length = 0 if command == FLUSH else 4096
    data = b"x" * 4096 if command == WRITE else b""
    assert peer.error(command, 0, length, data=data) == ESHUTDOWN
    (served_still,) = later(peer, volume, {1: 4096})
    assert (served_still.cookie, served_still.error) == (1, 0)
    peer.connection.tick(1.0)
    assert not peer.is_closed()
    assert peer.connection.describe()["state"] == "ending"
    peer.connection.tick(1.0 + limits.SHUTDOWN_SECONDS)
    assert peer.transport.closed and peer.connection.failure == "the daemon stops"
    assert export.detached == [peer.connection]


def test_a_client_that_obeys_a_shutdown_ends_in_order() -> None:
    peer, _ = served()
    peer.connection.shutdown("the daemon stops")
    assert peer.error(READ, 0, 512) == ESHUTDOWN
    peer.send(peer.encode(DISC))
    assert peer.transport.closed and peer.connection.failure is None


def test_block_status_during_a_shutdown() -> None:
    export = MemoryExport(MemoryVolume(SIZE))
    peer = Client(MemoryDirectory(export))
    peer.negotiate(STRUCTURED)
    peer.contexts("base:allocation")
    peer.go()
    peer.connection.shutdown("the daemon stops")
    assert peer.error(BLOCK_STATUS, 0, 4096) == ESHUTDOWN


@styles
@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES])
@pytest.mark.parametrize("length", [4096, 1 << 19])
def test_a_disk_that_shrank_ends_the_connection(style: str, command: int, length: int) -> None:
    peer, export = served(style)
    del export.volume.data[4096:]
    data = b"x" * length if command == WRITE else b""
    assert peer.error(command, 8192, length, data=data) == ESHUTDOWN
    assert peer.error(READ, 0, 512) == ESHUTDOWN
    peer.connection.tick(0.0)
    peer.connection.tick(limits.SHUTDOWN_SECONDS)
    assert peer.transport.closed and peer.connection.failure == "disk has shrunk"


@styles
def test_a_disk_that_shrinks_under_a_write(style: str) -> None:
    peer, export = served(style)
    message = peer.encode(WRITE, 0, data=b"x" * (1 << 19))
    peer.send(message[: 300 << 10])
    del export.volume.data[4096:]
    peer.send(message[300 << 10 :])
    assert [answer.error for answer in peer.answers({})] == [ESHUTDOWN]


@styles
def test_a_disk_that_grew_is_served_as_it_was(style: str) -> None:
    peer, export = served(style)
    export.volume.data += bytes(SIZE)
    assert peer.read(SIZE - 512, 512) == bytes(512)
    assert peer.error(READ, SIZE, 512) == 22


def test_nothing_is_sent_after_the_end() -> None:
    volume = MemoryVolume(SIZE)
    peer, export = served("simple", volume)
    volume.hold_reads = True
    peer.send(peer.encode(READ, 0, 512))
    peer.send(bytes(28))
    assert peer.transport.closed and not export.detached
    volume.release()
    peer.transport.run()
    assert not peer.transport.sent and export.detached
    peer.connection.connection_lost()


def test_describe_counts() -> None:
    peer, _ = served("structured")
    peer.request(WRITE, 0, data=b"x" * 4096)
    peer.request(READ, 0, 1 << 19)
    peer.request(FLUSH)
    assert peer.connection.describe() == {
        "export": "disk",
        "address": "127.0.0.1:50000",
        "tls": False,
        "state": "active",
        "replies": "structured",
        "requests_in_flight": 0,
        "requests": 3,
        "read_bytes": 1 << 19,
        "write_bytes": 4096,
    }
