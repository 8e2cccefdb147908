"""The fixed newstyle handshake: every option, what it answers when it is well formed, and the error
that the document has for it when it is not.
"""

import struct

import pytest

from protocol.nbd import limits, wire
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.nbd_client import (
    ABORT,
    ACK,
    EXPORT_NAME,
    EXT_REQD,
    EXTENDED,
    GO,
    INFO,
    INVALID,
    LIST,
    LIST_META,
    PEEK,
    POLICY,
    REP_INFO,
    SERVER,
    SET_META,
    SHUTDOWN,
    SIZE,
    STARTTLS,
    STRUCTURED,
    TOO_BIG,
    UNKNOWN,
    UNSUP,
    Client,
    MemoryDirectory,
    MemoryExport,
    context_data,
    info_data,
    option,
    replies,
)

HAS, RO, FLUSH, FUA = 1, 2, 4, 8
TRIM, ZEROES, DF, MULTI, CACHE, FAST, PAYLOAD = 32, 64, 128, 256, 1024, 2048, 4096
PLAIN = HAS | FLUSH | FUA | TRIM | ZEROES | MULTI | CACHE | FAST


def client(flags: int | None = 3, chunk: int = 1 << 30, **more: object) -> Client:
    exports = (
        MemoryExport(MemoryVolume(SIZE), **more),  # type: ignore[arg-type]
        MemoryExport(MemoryVolume(4096), "disk@monday", read_only=True),
    )
    return Client(MemoryDirectory(*exports, default="disk"), flags=flags, chunk=chunk)


def test_constants_are_those_of_the_document() -> None:
    assert wire.GREETING.pack(wire.MAGIC, wire.OPTION_MAGIC, 3) == b"NBDMAGICIHAVEOPT\0\x03"
    assert wire.REQUEST.size == 28 and wire.EXTENDED_REQUEST.size == 32
    assert wire.SIMPLE_REPLY.size == 16 and wire.STRUCTURED_REPLY.size == 20
    assert wire.EXTENDED_REPLY.size == 32
    assert (wire.REP_ERR_UNSUP, wire.REP_ERR_EXT_HEADER_REQD) == (0x80000001, 0x8000000A)


# --- Flags and EXPORT_NAME -----------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "padding"), [(0, 124), (1, 124), (2, 0), (3, 0)])
def test_export_name_gives_size_and_flags(flags: int, padding: int) -> None:
    peer = client(flags)
    peer.send(option(EXPORT_NAME, b"disk"))
    assert peer.transport.take() == struct.pack(">QH", SIZE, PLAIN) + bytes(padding)
    assert peer.request(0, 0, 512)[0].data == bytes(512)


@pytest.mark.parametrize("flags", [4, 7, 1 << 31])
def test_an_unknown_client_flag_ends_the_connection(flags: int) -> None:
    peer = client(flags)
    assert peer.transport.closed and peer.connection.failure


def test_the_empty_name_is_the_default_export() -> None:
    peer = client()
    peer.send(option(EXPORT_NAME, b""))
    assert peer.transport.take() == struct.pack(">QH", SIZE, PLAIN)


@pytest.mark.parametrize("name", [b"nothing", b"\xff", b"a\0b", b"x" * 4097, b"x" * 20000])
def test_export_name_that_cannot_be_granted_ends_the_connection(name: bytes) -> None:
    peer = client()
    peer.send(option(EXPORT_NAME, name))
    assert peer.transport.closed and not peer.transport.take()


def test_export_name_after_extended_headers_ends_the_connection() -> None:
    peer = client()
    peer.negotiate(EXTENDED)
    peer.send(option(EXPORT_NAME, b"disk"))
    assert peer.transport.closed and not peer.transport.take()


def test_structured_replies_hold_behind_export_name() -> None:
    peer = client()
    peer.negotiate(STRUCTURED)
    peer.send(option(EXPORT_NAME, b"disk"))
    assert peer.transport.take() == struct.pack(">QH", SIZE, PLAIN | DF)
    assert peer.read(0, 512) == bytes(512)


# --- ABORT, LIST --------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"bye"])
def test_abort_is_acknowledged_and_ends(data: bytes) -> None:
    peer = client()
    peer.send(option(ABORT, data))
    assert replies(peer.transport.take())[0].kind == ACK
    assert peer.transport.closed and peer.connection.failure is None


def test_list_names_every_export_with_its_description() -> None:
    peer = client()
    found = peer.option(LIST)
    assert [reply.kind for reply in found] == [SERVER, SERVER, ACK]
    assert found[0].data == b"\0\0\0\x04diskthe disk"
    assert found[1].data == b"\0\0\0\x0bdisk@mondaythe disk@monday"


def test_a_long_list_takes_turns_and_waits_for_a_client_that_does_not_drain() -> None:
    volume = MemoryVolume(4096)
    directory = MemoryDirectory(*(MemoryExport(volume, f"vdisk{n}") for n in range(2000)))
    peer = Client(directory)
    peer.transport.pause_above = 20000
    peer.send(option(LIST))
    found = replies(peer.transport.take())
    assert 0 < len(found) < 2000
    while not peer.is_reading():
        peer.connection.resume_writing()
        peer.transport.run()
        found += replies(peer.transport.take())
    assert [reply.kind for reply in found] == [SERVER] * 2000 + [ACK]
    peer.transport.pause_above = None
    assert peer.kinds(GO, info_data("vdisk1"))[-1] == ACK


def test_an_option_behind_a_list_waits_for_its_end() -> None:
    peer = client()
    peer.send(option(LIST) + option(STRUCTURED))
    found = replies(peer.transport.take())
    assert [(reply.option, reply.kind) for reply in found] == [
        (LIST, SERVER),
        (LIST, SERVER),
        (LIST, ACK),
        (STRUCTURED, ACK),
    ]


def test_a_client_that_goes_during_a_list_leaves_nothing_behind() -> None:
    peer = client()
    feed_only = option(LIST)
    peer.connection.get_buffer()[: len(feed_only)] = feed_only
    peer.connection.buffer_updated(len(feed_only))
    peer.connection.connection_lost()
    peer.transport.run()
    assert not peer.transport.take()


# --- INFO, GO ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [INFO, GO])
def test_info_and_go_give_what_is_asked_for(number: int) -> None:
    peer = client()
    found = peer.option(number, info_data("disk", 1, 2, 3, 99))
    assert [reply.kind for reply in found] == [REP_INFO] * 4 + [ACK]
    assert [reply.data for reply in found[:-1]] == [
        struct.pack(">HQH", 0, SIZE, PLAIN),
        struct.pack(">HIII", 3, 512, 4096, 32 << 20),
        b"\0\x01disk",
        b"\0\x02the disk",
    ]


def test_without_requests_there_are_size_and_block_sizes() -> None:
    found = client().option(INFO, info_data(""))
    assert [reply.data[:2] for reply in found] == [b"\0\0", b"\0\x03", b""]


def test_info_gives_the_canonical_name_of_the_default_export() -> None:
    found = client().option(INFO, info_data("", 1))
    assert b"\0\x01disk" in [reply.data for reply in found]


@pytest.mark.parametrize(
    ("negotiated", "name", "flags"),
    [
        ((), "disk", PLAIN),
        ((STRUCTURED,), "disk", PLAIN | DF),
        ((EXTENDED,), "disk", PLAIN | DF),
        ((STRUCTURED, EXTENDED), "disk", PLAIN | DF),
        ((), "disk@monday", HAS | RO | FLUSH | FUA | MULTI | CACHE),
        ((STRUCTURED,), "disk@monday", HAS | RO | FLUSH | FUA | MULTI | CACHE | DF),
    ],
)
def test_transmission_flags(negotiated: tuple[int, ...], name: str, flags: int) -> None:
    peer = client()
    peer.negotiate(*negotiated)
    for number in (INFO, GO):
        (first, *_) = peer.option(number, info_data(name))
        assert first.data[-2:] == struct.pack(">H", flags)


def test_payloads_of_block_status_are_offered_with_extended_headers_and_a_context() -> None:
    peer = client()
    peer.negotiate(EXTENDED)
    assert peer.contexts("base:allocation") == [1]
    (first, *_) = peer.option(GO, info_data("disk"))
    assert first.data[-2:] == struct.pack(">H", PLAIN | DF | PAYLOAD)


def test_a_size_that_is_no_multiple_of_the_block_is_cut() -> None:
    peer = Client(MemoryDirectory(MemoryExport(MemoryVolume(5000))))
    (first, *_) = peer.option(INFO, info_data("disk"))
    assert first.data[2:10] == struct.pack(">Q", 4608)


def test_go_attaches_the_export() -> None:
    export = MemoryExport(MemoryVolume(SIZE))
    peer = Client(MemoryDirectory(export))
    assert peer.kinds(INFO, info_data("disk"))[-1] == ACK
    assert not export.attached
    peer.go()
    assert export.attached == [peer.connection]
    peer.connection.connection_lost()
    assert export.detached == [peer.connection]


# --- Every error ----------------------------------------------------------------------------------

LONG = "n" * 4097
MALFORMED_INFO = [
    b"",
    b"\0\0",
    struct.pack(">I", 5) + b"disk",
    struct.pack(">I", 0xFFFFFFFF) + b"disk" + bytes(2),
    info_data("disk") + b"\0",
    info_data("disk", 1)[:-1],
    struct.pack(">I", 4) + b"disk" + b"\xff\xff",
    struct.pack(">I", 2) + b"\xff\xfe" + bytes(2),
    info_data("a\0b"),
    info_data(LONG),
]
MALFORMED_CONTEXTS = [
    b"",
    struct.pack(">I", 4) + b"disk",
    context_data("disk", "base:allocation") + b"x",
    context_data("disk", "base:allocation")[:-1],
    struct.pack(">I", 4) + b"disk" + struct.pack(">I", 1000),
    context_data("disk", "nocolon"),
    context_data("disk", ":leaf"),
    context_data("disk", "base:" + "x" * 5000),
    context_data(LONG),
    context_data("disk", "base:a\0"),
]
ERRORS = [
    *((number, data, INVALID) for number in (INFO, GO) for data in MALFORMED_INFO),
    *((number, data, INVALID) for number in (LIST_META, SET_META) for data in MALFORMED_CONTEXTS),
    *((number, b"x", INVALID) for number in (LIST, STARTTLS, STRUCTURED, EXTENDED)),
    *((number, bytes(40000), TOO_BIG) for number in (LIST, STARTTLS, INFO, GO, STRUCTURED)),
    *((number, bytes(40000), TOO_BIG) for number in (LIST_META, SET_META, EXTENDED)),
    *((number, info_data("nothing"), UNKNOWN) for number in (INFO, GO)),
    *((number, context_data("nothing"), UNKNOWN) for number in (LIST_META, SET_META)),
    *((number, context_data("disk", *["x:y"] * 129), TOO_BIG) for number in (LIST_META, SET_META)),
    (STARTTLS, b"", POLICY),
    (PEEK, b"", UNSUP),
    (PEEK, b"disk", UNSUP),
    (0, b"", UNSUP),
    (12, b"", UNSUP),
    (0xFFFFFFFF, bytes(40000), UNSUP),
]


@pytest.mark.parametrize(("number", "data", "kind"), ERRORS)
@pytest.mark.parametrize("chunk", [1 << 30, 7])
def test_errors_of_options(number: int, data: bytes, kind: int, chunk: int) -> None:
    """And the next option is answered."""
    peer = client(chunk=chunk)
    if number in {LIST_META, SET_META}:
        peer.negotiate(STRUCTURED)
    (reply,) = peer.option(number, data)
    assert (reply.option, reply.kind) == (number, kind)
    assert reply.data.decode()
    assert peer.kinds(INFO, info_data("disk"))[-1] == ACK


def test_every_error_leaves_the_export_unentered() -> None:
    for number, data, _ in ERRORS:
        peer = client()
        peer.option(number, data)
        assert peer.connection.session is None


@pytest.mark.parametrize("number", [LIST_META, SET_META])
def test_contexts_need_replies_in_chunks(number: int) -> None:
    assert client().kinds(number, context_data("disk", "base:allocation")) == [INVALID]


def test_structured_replies_after_extended_headers() -> None:
    peer = client()
    peer.negotiate(EXTENDED, EXTENDED)
    assert peer.kinds(STRUCTURED) == [EXT_REQD]


def test_more_contexts_than_are_allowed() -> None:
    export = MemoryExport(MemoryVolume(SIZE))
    for number in range(limits.CONTEXTS_MAX + 1):
        context = type("Context", (), {"name": f"x-a:{number}"})()
        export.contexts[context.name] = context
    peer = Client(MemoryDirectory(export))
    peer.negotiate(STRUCTURED)
    names = list(export.contexts)
    assert peer.contexts(*names[1:]) == list(range(1, limits.CONTEXTS_MAX + 1))
    assert peer.kinds(SET_META, context_data("disk", *names)) == [TOO_BIG]


def test_an_option_without_its_magic_number_ends_the_connection() -> None:
    peer = client()
    peer.send(b"IHAVEOP!" + bytes(8))
    assert peer.transport.closed and peer.connection.failure


@pytest.mark.parametrize("number", [LIST, INFO, GO, STRUCTURED, SET_META, STARTTLS, 99])
def test_a_server_that_goes_down_says_so(number: int) -> None:
    peer = client()
    peer.connection.shutdown("the daemon stops")
    assert peer.kinds(number) == [SHUTDOWN]
    assert peer.kinds(ABORT) == [ACK]


# --- Limits ---------------------------------------------------------------------------------------


def test_too_many_options_end_the_connection_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OPTIONS_MAX", 3)
    peer = client()
    assert peer.kinds(99) + peer.kinds(99) + peer.kinds(99) == [UNSUP] * 3
    assert peer.kinds(99) == [TOO_BIG]
    assert peer.transport.closed and peer.connection.failure


def test_too_many_bytes_end_the_connection_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_BYTES_MAX", 50000)
    peer = client()
    assert peer.kinds(99, bytes(40000)) == [UNSUP]
    assert peer.kinds(99, bytes(10000)) == [TOO_BIG]
    assert peer.transport.closed


def test_an_endless_option_is_refused_at_its_header() -> None:
    peer = client()
    peer.send(b"IHAVEOPT" + struct.pack(">II", 99, 0xFFFFFFFF))
    assert [reply.kind for reply in replies(peer.transport.take())] == [TOO_BIG]
    assert peer.transport.closed


def test_the_handshake_has_its_time() -> None:
    peer = client()
    peer.connection.tick(100.0)
    peer.connection.tick(100.0 + limits.OPTION_SECONDS_MAX)
    assert not peer.transport.closed
    peer.option(99)
    peer.connection.tick(101.0 + limits.OPTION_SECONDS_MAX)
    peer.connection.tick(100.0 + 2 * limits.OPTION_SECONDS_MAX)
    assert not peer.transport.closed
    peer.connection.tick(200.0 + 2 * limits.OPTION_SECONDS_MAX)
    assert peer.transport.closed


def test_even_a_busy_handshake_ends() -> None:
    peer = client()
    peer.connection.tick(0.0)
    seconds = 0.0
    while not peer.transport.closed:
        peer.option(99)
        seconds += 10.0
        peer.connection.tick(seconds)
    assert seconds == limits.HANDSHAKE_SECONDS_MAX + 10.0


def test_no_time_limit_behind_the_handshake() -> None:
    peer = client().go()
    peer.connection.tick(0.0)
    peer.connection.tick(1e9)
    assert not peer.transport.closed
