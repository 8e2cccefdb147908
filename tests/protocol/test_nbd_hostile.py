"""Hostile bytes: whatever comes, nothing is raised, memory stays bounded, and chunking changes
nothing.
"""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.nbd import limits
from protocol.nbd.handshake import TlsMode
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.nbd_client import (
    SIZE,
    STRUCTURED,
    STYLES,
    ChangedContext,
    Client,
    DepthVolume,
    MemoryDirectory,
    MemoryExport,
    context_data,
    info_data,
    option,
)

numbers = st.one_of(
    st.integers(0, 13), st.integers(0, 13), st.sampled_from([99, 0x80000000, 0xFFFFFFFF])
)
names = st.sampled_from(["disk", "secret", "nothing", "", "x" * 4096, "x" * 4097, "ä", "a\0b"])
queries = st.lists(
    st.sampled_from(
        [
            *("base:", "base:allocation", "qemu:", "qemu:allocation-depth"),
            *("cleaved:changed/monday", ":", "", "x", "x:", "ä:ö", "base:" + "y" * 5000),
        ]
    ),
    max_size=5,
)
data = st.one_of(
    st.just(b""),
    st.binary(max_size=40),
    st.builds(lambda name, wanted: info_data(name, *wanted), names, st.lists(st.integers(0, 9))),
    st.builds(lambda name, asked: context_data(name, *asked), names, queries),
    names.map(str.encode),
    st.integers(0, 60000).map(bytes),
)


@st.composite
def options(draw: st.DrawFn) -> bytes:
    """One option with a plausible frame and any content; sometimes cut, or with a byte changed."""
    message = bytearray(option(draw(numbers), draw(data)))
    if draw(st.integers(0, 19)) == 0:
        message[draw(st.integers(0, len(message) - 1))] ^= draw(st.integers(1, 255))
    if draw(st.integers(0, 19)) == 0:
        del message[draw(st.integers(0, len(message))) :]
    return bytes(message)


def hostile(mode: TlsMode, flags: int | None = 3, chunk: int = 1 << 30) -> Client:
    disk = MemoryExport(DepthVolume(SIZE))
    disk.contexts["cleaved:changed/monday"] = ChangedContext()
    secret = MemoryExport(MemoryVolume(SIZE), "secret", tls_required=True)
    return Client(MemoryDirectory(disk, secret, default="disk"), mode, flags, chunk)


@settings(deadline=None, max_examples=150)
@given(
    mode=st.sampled_from([TlsMode.NONE, TlsMode.OFFERED, TlsMode.REQUIRED]),
    flags=st.one_of(st.integers(0, 3), st.integers(0, 0xFFFFFFFF)),
    messages=st.lists(options(), max_size=8),
    tail=st.binary(max_size=60),
    chunk=st.sampled_from([1 << 30, 1, 7, 1000]),
)
def test_hostile_handshakes(
    mode: TlsMode, flags: int, messages: list[bytes], tail: bytes, chunk: int
) -> None:
    peer = hostile(mode, flags, chunk)
    for message in [*messages, tail]:
        if not peer.transport.closed:
            peer.send(message)
        assert len(peer.connection._receive.storage) <= limits.RECEIVE_BUFFER_BYTES
    if mode is TlsMode.REQUIRED:
        assert peer.connection.session is None
    session = peer.connection.session
    assert session is None or session.export.name == "disk"
    peer.connection.connection_lost()
    peer.transport.run()


@settings(deadline=None, max_examples=60)
@given(messages=st.lists(options(), max_size=8), chunk=st.integers(1, 300))
def test_chunks_change_nothing_in_a_handshake(messages: list[bytes], chunk: int) -> None:
    sent = []
    for size in (1 << 30, chunk):
        peer = hostile(TlsMode.NONE, chunk=size)
        peer.send(b"".join(messages))
        sent.append((peer.transport.take(), peer.transport.closed, peer.connection.failure))
    assert sent[0] == sent[1]


offsets = st.one_of(
    st.integers(0, 300).map(lambda number: number * 4096),
    st.sampled_from([0, 1, 512, SIZE - 512, SIZE, 1 << 32, (1 << 64) - 1]),
)
lengths = st.one_of(
    st.sampled_from([0, 1, 512, 4096, 65536, 300 * 1024, SIZE, 32 << 20, 0xFFFFFFFF]),
    st.integers(0, 1 << 20),
)


@st.composite
def requests(draw: st.DrawFn, extended: bool) -> bytes:
    """One request with a plausible frame. Data are zeros, so that the disk stays as it is."""
    command = draw(st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)))
    flags = draw(st.one_of(st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32]), st.integers(0, 0xFFFF)))
    offset, length = draw(offsets), draw(lengths)
    has_payload = flags & 32 if extended else command == 1
    payload = b""
    if has_payload:
        length = min(length, 600_000)
        ids = draw(st.lists(st.integers(0, 4), max_size=4))
        some = struct.pack(f">Q{len(ids)}I", draw(lengths), *ids)
        payload = some if command == 7 and draw(st.booleans()) else bytes(length)
        length = len(payload)
    magic, layout = (0x21E41C71, ">IHHQQQ") if extended else (0x25609513, ">IHHQQI")
    message = bytearray(
        struct.pack(layout, magic, flags, command, draw(st.integers(0, 3)), offset, length)
    )
    if draw(st.integers(0, 29)) == 0:
        message[draw(st.integers(0, len(message) - 1))] ^= draw(st.integers(1, 255))
    return bytes(message) + payload


def transmitting(style: str, chunk: int) -> Client:
    peer = hostile(TlsMode.NONE)
    peer.negotiate(*STYLES[style])
    if style != "simple":
        peer.contexts("base:allocation", "qemu:allocation-depth", "cleaved:changed/monday")
    peer.go()
    peer.chunk = chunk
    return peer


@pytest.mark.parametrize("style", sorted(STYLES))
@settings(deadline=None, max_examples=60)
@given(chosen=st.data())
def test_hostile_requests(style: str, chosen: st.DataObject) -> None:
    messages = chosen.draw(st.lists(requests(style == "extended"), max_size=8))
    tail = chosen.draw(st.binary(max_size=40))
    chunk = chosen.draw(st.sampled_from([1 << 30, 1000, 50_000]))
    hold = chosen.draw(st.booleans())
    peer = transmitting(style, chunk)
    session = peer.connection.session
    assert session is not None
    volume = session.volume
    assert isinstance(volume, MemoryVolume)
    volume.hold_reads = volume.hold_writes = hold
    for message in [*messages, tail]:
        if not peer.transport.closed:
            peer.send(message)
        assert session.in_flight <= limits.PIECES_MAX
        if chosen.draw(st.booleans()):
            volume.release()
            peer.transport.run()
    peer.connection.connection_lost()
    while volume.held:
        volume.release()
    peer.transport.run()
    assert session.in_flight == 0
    assert not any(volume.data)


@pytest.mark.parametrize("style", sorted(STYLES))
@settings(deadline=None, max_examples=30)
@given(chosen=st.data())
def test_chunks_change_nothing_in_transmission(style: str, chosen: st.DataObject) -> None:
    messages = chosen.draw(st.lists(requests(style == "extended"), max_size=6))
    chunk = chosen.draw(st.integers(200, 100_000))
    sent = []
    for size in (1 << 30, chunk):
        peer = transmitting(style, size)
        peer.send(b"".join(messages))
        found = sorted(peer.answers({}), key=repr) if style != "simple" else [peer.transport.take()]
        sent.append((found, peer.transport.closed, peer.connection.failure))
    assert sent[0] == sent[1]


def test_a_flood_of_options_stays_within_its_memory() -> None:
    peer = hostile(TlsMode.NONE)
    peer.transport.pause_above = 1 << 20
    peer.send(b"".join(option(99) for _ in range(60_000)))
    assert len(peer.transport.sent) < (1 << 20) + 10 * limits.HANDSHAKE_BUFFER_BYTES
    assert peer.unread and not peer.transport.reading


def test_structured_replies_are_asked_for_in_vain_behind_the_handshake() -> None:
    peer = transmitting("simple", 1 << 30)
    peer.send(option(STRUCTURED) + bytes(12))
    assert peer.transport.closed
