"""NBD_OPT_STARTTLS: the three modes of the document, and that nothing crosses over into TLS
(CVE-2021-3716 is the class of mistake).
"""

import pytest

from protocol.nbd.handshake import TlsMode
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.nbd_client import (
    ABORT,
    ACK,
    BLOCK_STATUS,
    EINVAL,
    EXPORT_NAME,
    EXTENDED,
    GO,
    INFO,
    INVALID,
    LIST,
    LIST_META,
    POLICY,
    SERVER,
    SET_META,
    SHUTDOWN,
    SIZE,
    STARTTLS,
    STRUCTURED,
    TLS_REQD,
    UNKNOWN,
    Client,
    MemoryDirectory,
    MemoryExport,
    context_data,
    feed,
    info_data,
    option,
    replies,
)


def client(mode: TlsMode, flags: int = 3) -> Client:
    open_to_all = MemoryExport(MemoryVolume(SIZE), "open")
    closed = MemoryExport(MemoryVolume(SIZE), "disk", tls_required=True)
    return Client(MemoryDirectory(open_to_all, closed), mode, flags=flags)


def begin(peer: Client, *exports: MemoryExport) -> Client:
    """STARTTLS, and TLS there, for a client who is known now."""
    assert peer.kinds(STARTTLS) == [ACK]
    assert peer.transport.tls_asked == 1 and not peer.transport.reading
    peer.transport.reading = True  # the transport that wraps it reads
    known = exports or (MemoryExport(MemoryVolume(SIZE), tls_required=True),)
    peer.connection.tls_started(MemoryDirectory(*known))
    peer.structured = peer.extended = False
    return peer


@pytest.mark.parametrize("mode", [TlsMode.OFFERED, TlsMode.REQUIRED])
def test_tls_begins_once(mode: TlsMode) -> None:
    peer = begin(client(mode))
    assert peer.connection.describe()["tls"] is True
    assert peer.kinds(STARTTLS) == [INVALID]
    assert peer.kinds(STARTTLS, b"x") == [INVALID]
    assert peer.transport.tls_asked == 1
    peer.go()
    assert peer.read(0, 512) == bytes(512)


@pytest.mark.parametrize("mode", [TlsMode.OFFERED, TlsMode.REQUIRED])
def test_starttls_with_data_is_invalid(mode: TlsMode) -> None:
    peer = client(mode)
    assert peer.kinds(STARTTLS, b"x") == [INVALID]
    assert not peer.transport.tls_asked
    begin(peer).go()


NUMBERS = [0, LIST, 4, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED, 12, 0xFFFFFFFF]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("data", [b"", b"nonsense", info_data("open"), bytes(40000)])
def test_required_tls_refuses_every_option(number: int, data: bytes) -> None:
    peer = client(TlsMode.REQUIRED)
    assert peer.kinds(number, data) == [TLS_REQD]
    begin(peer).go()


def test_required_tls_ends_a_connection_that_names_an_export() -> None:
    peer = client(TlsMode.REQUIRED)
    peer.send(option(EXPORT_NAME, b"open"))
    assert peer.transport.closed and not peer.transport.take()


def test_required_tls_lets_a_client_abort() -> None:
    peer = client(TlsMode.REQUIRED)
    assert peer.kinds(ABORT) == [ACK]
    assert peer.transport.closed


@pytest.mark.parametrize("flags", [0, 2])
def test_required_tls_is_not_for_clients_that_cannot_begin_it(flags: int) -> None:
    assert client(TlsMode.REQUIRED, flags).transport.closed


def test_tls_is_refused_where_there_is_none() -> None:
    peer = client(TlsMode.NONE)
    assert peer.kinds(STARTTLS) == [POLICY]
    assert peer.kinds(GO, info_data("disk")) == [UNKNOWN]
    peer.go("open")


def test_offered_tls_needs_fixed_newstyle() -> None:
    assert client(TlsMode.OFFERED, 2).kinds(STARTTLS) == [POLICY]


@pytest.mark.parametrize("name", ["disk", "nothing"])
def test_offered_tls_does_not_tell_what_requires_it(name: str) -> None:
    peer = client(TlsMode.OFFERED)
    assert peer.kinds(INFO, info_data(name)) == [TLS_REQD]
    assert peer.kinds(GO, info_data(name)) == [TLS_REQD]
    peer.negotiate(STRUCTURED)
    assert peer.kinds(LIST_META, context_data(name)) == [UNKNOWN]
    assert peer.kinds(SET_META, context_data(name, "base:allocation")) == [UNKNOWN]
    found = peer.option(LIST)
    assert [reply.kind for reply in found] == [SERVER, ACK] and b"open" in found[0].data
    peer.send(option(EXPORT_NAME, name.encode()))
    assert peer.transport.closed and not peer.transport.take()


def test_offered_tls_serves_the_rest_without_it() -> None:
    assert client(TlsMode.OFFERED).go("open").connection.session is not None


def test_behind_tls_all_is_listed_and_nothing_asks_for_tls() -> None:
    peer = begin(
        client(TlsMode.OFFERED),
        MemoryExport(MemoryVolume(SIZE), "disk", tls_required=True),
        MemoryExport(MemoryVolume(SIZE), "open"),
    )
    assert peer.kinds(LIST) == [SERVER, SERVER, ACK]
    assert peer.kinds(INFO, info_data("nothing")) == [UNKNOWN]


def test_nothing_that_was_negotiated_before_tls_survives_it() -> None:
    peer = client(TlsMode.OFFERED)
    peer.negotiate(STRUCTURED)
    assert peer.contexts("base:allocation", export="open") == [1]
    begin(peer, MemoryExport(MemoryVolume(SIZE), "open"))
    assert peer.kinds(SET_META, context_data("open", "base:allocation")) == [INVALID]
    peer.go("open")
    assert peer.read(0, 4096) == bytes(4096)
    assert peer.error(BLOCK_STATUS, 0, 4096) == EINVAL


def test_extended_headers_do_not_survive_tls() -> None:
    peer = client(TlsMode.OFFERED)
    peer.negotiate(EXTENDED)
    begin(peer, MemoryExport(MemoryVolume(SIZE), "open"))
    peer.send(option(EXPORT_NAME, b"open"))
    assert len(peer.transport.take()) == 10
    assert peer.read(0, 512) == bytes(512)


def test_what_the_client_said_before_options_survives_tls() -> None:
    """The flags are answered to the greeting, which is not repeated."""
    peer = client(TlsMode.OFFERED, flags=1)
    begin(peer, MemoryExport(MemoryVolume(SIZE), "open"))
    peer.send(option(EXPORT_NAME, b"open"))
    assert len(peer.transport.take()) == 134


INJECTED = [
    option(STRUCTURED),
    option(GO, info_data("open")),
    option(SET_META, context_data("open", "base:allocation")),
    option(ABORT),
    b"IHAV",
    b"\x16\x03\x01",
]


@pytest.mark.parametrize("mode", [TlsMode.OFFERED, TlsMode.REQUIRED])
@pytest.mark.parametrize("injected", INJECTED)
def test_bytes_behind_starttls_never_reach_tls(mode: TlsMode, injected: bytes) -> None:
    """They came in plain, whoever wrote them: the connection ends, and TLS does not begin."""
    peer = client(mode)
    feed(peer.transport, option(STARTTLS) + injected)
    assert peer.transport.closed and not peer.transport.tls_asked
    assert peer.connection.failure


def test_the_acknowledgement_of_starttls_is_the_last_plain_byte() -> None:
    peer = client(TlsMode.OFFERED)
    peer.transport.pause_above = 0
    peer.send(option(STARTTLS))
    assert [reply.kind for reply in replies(peer.transport.take())] == [ACK]
    assert peer.transport.tls_asked == 1 and not peer.transport.reading


def test_a_failed_tls_handshake_leaves_nothing() -> None:
    peer = client(TlsMode.OFFERED)
    assert peer.kinds(STARTTLS) == [ACK]
    peer.connection.connection_lost()
    assert peer.connection.session is None


def test_a_slow_tls_handshake_is_ended() -> None:
    peer = client(TlsMode.OFFERED)
    peer.connection.tick(0.0)
    peer.kinds(STARTTLS)
    peer.connection.tick(1.0)
    peer.connection.tick(100.0)
    assert peer.transport.closed


def test_a_shutdown_is_known_behind_tls() -> None:
    peer = client(TlsMode.OFFERED)
    peer.connection.shutdown("the daemon stops")
    assert peer.kinds(STARTTLS) == [SHUTDOWN]
    other = client(TlsMode.OFFERED)
    assert other.kinds(STARTTLS) == [ACK]
    other.connection.shutdown("the daemon stops")
    other.transport.reading = True
    other.connection.tls_started(MemoryDirectory())
    assert other.kinds(LIST) == [SHUTDOWN]
