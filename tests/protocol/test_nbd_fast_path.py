"""The fast path and the general way give byte-identical answers, and the fast path is really taken
by what it is for.
"""

import errno
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.nbd.fast_path import FastPath
from protocol.nbd.transmission import Transmission
from protocol.volume import Buffer, Completion
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.nbd_client import (
    DF,
    FUA,
    PAYLOAD_LEN,
    READ,
    SIZE,
    STYLES,
    WRITE,
    Client,
    served,
)

styles = pytest.mark.parametrize("style", sorted(STYLES))


@dataclass(frozen=True)
class Plain:
    """One READ or WRITE, and in what it differs from a plain one."""

    command: int
    offset: int
    length: int
    flags: int = 0
    byte: int = 1
    payload_less: int = 0
    magic: int = 0

    def encode(self, peer: Client, cookie: int) -> bytes:
        data = bytes([self.byte]) * self.length if self.command == WRITE else b""
        message = peer.encode(self.command, self.offset, self.length, self.flags, data, cookie)
        return bytes([message[0] ^ self.magic]) + message[1 : len(message) - self.payload_less]


blocks = st.integers(0, 20).map(lambda number: number * 4096)
near_the_end = st.integers(-8, 2).map(lambda number: SIZE + number * 512)
plain = st.builds(
    Plain,
    command=st.sampled_from([READ, WRITE]),
    offset=st.one_of(blocks, near_the_end),
    length=st.sampled_from([512, 4096, 4096, 8192, 65536, 65536 + 4096, 200 * 1024, 256 * 1024]),
    flags=st.sampled_from([0, 0, 0, FUA]),
    byte=st.sampled_from([0, 1, 255]),
)
ODDITIES: dict[str, list[int]] = {
    "command": [3, 4, 5, 6, 7, 8, 0x8000],
    "offset": [1, 511, SIZE, SIZE - 512, 1 << 63, (1 << 64) - 512],
    "length": [0, 1, 511, 513, 256 * 1024 + 512, 300 * 1024, SIZE],
    "flags": [2, DF, DF | FUA, 8, 16, PAYLOAD_LEN, 64, 0x8000],
    "payload_less": [1, 512],
    "magic": [1],
}


@st.composite
def odd(draw: st.DrawFn) -> Plain:
    """A plain request with one or two things about it that are not plain."""
    names = draw(st.lists(st.sampled_from(sorted(ODDITIES)), min_size=1, max_size=2, unique=True))
    return replace(draw(plain), **{name: draw(st.sampled_from(ODDITIES[name])) for name in names})


class RecordingVolume(MemoryVolume):
    """Remembers which writes were to be durable."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.written: list[tuple[int, int, bool]] = []

    def write(self, offset_bytes: int, data: Buffer, fua: bool, done: Completion) -> None:
        self.written.append((offset_bytes, len(data), fua))
        super().write(offset_bytes, data, fua, done)


@dataclass(frozen=True)
class World:
    """What is special about the export, and how the bytes come."""

    chunk: int = 1 << 30
    read_only: bool = False
    read_errno: int = 0
    write_errno: int = 0
    fail_reads: int | None = None
    fail_writes: int | None = None
    hold_reads: bool = False
    hold_writes: bool = False


worlds = st.builds(
    World,
    chunk=st.sampled_from([1 << 30, 1 << 30, 5000]),
    read_only=st.sampled_from([False, False, False, True]),
    read_errno=st.sampled_from([0, 0, 0, errno.EPERM]),
    write_errno=st.sampled_from([0, 0, 0, errno.EPERM]),
    fail_reads=st.sampled_from([None, None, None, errno.EIO]),
    fail_writes=st.sampled_from([None, None, None, errno.ENOSPC, errno.ESHUTDOWN]),
    hold_reads=st.booleans(),
    hold_writes=st.booleans(),
)


def outcome(
    style: str, world: World, requests: list[Plain], fast: bool
) -> tuple[bytes, bytes, list[tuple[int, int, bool]], object]:
    """Bytes sent, the disk, the writes, and how the connection stands."""
    volume = RecordingVolume()
    volume.data[8192:16384] = b"y" * 8192
    peer, _ = served(style, volume, read_only=world.read_only)
    export = peer.connection.session.export  # type: ignore[union-attr]
    peer.connection.session.fast = fast  # type: ignore[union-attr]
    peer.chunk = world.chunk
    export.read_errno, export.write_errno = world.read_errno, world.write_errno  # type: ignore[misc]
    for name in ("fail_reads", "fail_writes", "hold_reads", "hold_writes"):
        setattr(volume, name, getattr(world, name))
    peer.send(b"".join(request.encode(peer, n) for n, request in enumerate(requests)))
    sent = peer.transport.take()
    while volume.held:
        volume.release()
        peer.transport.run()
    stands = (peer.transport.closed, peer.connection.failure, peer.connection.describe())
    return sent + peer.transport.take(), bytes(volume.data), volume.written, stands


@styles
@settings(deadline=None, max_examples=60)
@given(
    world=worlds, requests=st.lists(st.one_of(plain, plain, plain, odd()), min_size=1, max_size=12)
)
def test_both_ways_are_the_same(style: str, world: World, requests: list[Plain]) -> None:
    assert outcome(style, world, requests, True) == outcome(style, world, requests, False)


@styles
@settings(deadline=None, max_examples=60)
@given(request=odd())
def test_both_ways_refuse_the_same(style: str, request: Plain) -> None:
    requests = [request, Plain(READ, 0, 4096)]
    assert outcome(style, World(), requests, True) == outcome(style, World(), requests, False)


@styles
@pytest.mark.parametrize("command", [READ, WRITE])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 512), (SIZE - 512, 1024), (SIZE - 4096, 4608), (SIZE - 512, 512), (SIZE, 0), (0, 0)],
)
def test_both_ways_have_the_same_end(style: str, command: int, offset: int, length: int) -> None:
    requests = [Plain(command, offset, length), Plain(READ, 0, 512)]
    assert outcome(style, World(), requests, True) == outcome(style, World(), requests, False)


@styles
@pytest.mark.parametrize(
    "request_",
    [
        Plain(READ, 0, 4096),
        Plain(READ, 8192, 4096),
        Plain(READ, SIZE - 512, 512),
        Plain(READ, 0, 256 * 1024),
        Plain(WRITE, 0, 4096),
        Plain(WRITE, 512, 256 * 1024, FUA),
    ],
)
def test_the_fast_path_is_taken(
    style: str, request_: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = MemoryVolume(SIZE)
    peer, _ = served(style, volume)
    general: list[bool] = []
    step = Transmission._step

    def watched(self: Transmission, receive: object) -> bool:
        general.append(step(self, receive))  # type: ignore[arg-type]
        return general[-1]

    monkeypatch.setattr(Transmission, "_step", watched)
    peer.send(b"".join(request_.encode(peer, n) for n in range(8)))
    found = peer.answers(
        dict.fromkeys(range(8), request_.length if request_.command == READ else 0)
    )
    assert len([answer for answer in found if answer.done]) == 8
    assert not any(general)


@styles
def test_replies_of_one_wake_up_leave_together(style: str) -> None:
    peer, _ = served(style)
    before = peer.transport.sends
    peer.send(b"".join(Plain(n % 2, 0, 4096).encode(peer, n) for n in range(20)))
    assert peer.transport.sends == before + 1


def test_writes_are_pooled() -> None:
    peer, _ = served()
    for number in range(3):
        peer.send(b"".join(Plain(WRITE, 0, 4096).encode(peer, n) for n in range(number + 2)))
    transmission = peer.connection._transmission
    assert transmission is not None
    path: FastPath = transmission._fast_path
    assert len(path.free_writes) == 4
