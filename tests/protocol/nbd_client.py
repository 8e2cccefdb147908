"""The other side for tests of the NBD server: a transport and a directory in memory, and a client
that knows the protocol's layouts by itself, so that a mistake of the server's is not made twice.
"""

import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from uuid import UUID

from protocol.nbd.connection import NbdConnection
from protocol.nbd.export import Attached, Extents, ExtentsCompletion, Listed, MetaContext
from protocol.nbd.handshake import TlsMode
from protocol.volume import Buffer
from tests.protocol.memory_volume import MemoryVolume

GREETING = b"NBDMAGICIHAVEOPT\0\x03"
SIZE = 1 << 20

# Options and replies by number, as the document lists them.
EXPORT_NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = (
    range(1, 12)
)
ACK, SERVER, REP_INFO, REP_META = 1, 2, 3, 4
(
    UNSUP,
    POLICY,
    INVALID,
    PLATFORM,
    TLS_REQD,
    UNKNOWN,
    SHUTDOWN,
    BLOCK_SIZE_REQD,
    TOO_BIG,
    EXT_REQD,
) = ((1 << 31) + number for number in range(1, 11))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108
NONE, DATA, HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 32769, 32770


class FakeTransport:
    """Keeps what is sent; ``paused`` pauses the connection at the next send, as a full socket
    does.
    """

    def __init__(self) -> None:
        self.connection: NbdConnection | None = None
        self.sent = bytearray()
        self.sends = 0
        self.closed = False
        self.woken = False
        self.reading = True
        self.tls_asked = 0
        self.turns: deque[Callable[[], None]] = deque()
        self.pause_above: int | None = None

    def send(self, buffers: list[Buffer]) -> None:
        assert not self.closed, "sent after close"
        self.sends += 1
        self.sent += b"".join(buffers)
        if self.pause_above is not None and len(self.sent) > self.pause_above:
            assert self.connection is not None
            self.connection.pause_writing()

    def wake(self) -> None:
        assert not self.woken, "woken twice"
        self.woken = True

    def turn(self, step: Callable[[], None]) -> None:
        self.turns.append(step)

    def set_reading(self, wanted: bool) -> None:
        assert wanted is not self.reading
        self.reading = wanted

    def start_tls(self) -> None:
        self.tls_asked += 1

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True

    def run(self) -> None:
        """Flush and take turns until nothing moves."""
        assert self.connection is not None
        while self.woken or self.turns:
            if self.woken:
                self.woken = False
                self.connection.flush_output()
            elif self.turns:
                self.turns.popleft()()

    def take(self) -> bytes:
        sent = bytes(self.sent)
        self.sent.clear()
        return sent


class ChangedContext:
    """A context that an export serves beside the usual ones: blocks written since a snapshot."""

    name = "cleaved:changed/monday"

    def __init__(self) -> None:
        self.answer: Extents = [(4096, 1), (8192, 0)]
        self.asked: list[tuple[int, int, int]] = []
        self.error: Exception | None = None

    def extents(
        self, offset_bytes: int, length_bytes: int, extents_max: int, done: ExtentsCompletion
    ) -> None:
        self.asked.append((offset_bytes, length_bytes, extents_max))
        if self.error is not None:
            done(None, self.error)
        else:
            done(self.answer, None)


class MemoryExport:
    def __init__(
        self,
        volume: MemoryVolume,
        name: str = "disk",
        read_only: bool = False,
        tls_required: bool = False,
    ) -> None:
        self.volume = volume
        self.name = name
        self.description = f"the {name}"
        self.read_only = read_only
        self.tls_required = tls_required
        self.read_errno = 0
        self.write_errno = 0
        self.contexts: dict[str, MetaContext] = {}
        self.attached: list[Attached] = []
        self.detached: list[Attached] = []

    def context_names(self) -> Iterable[str]:
        return list(self.contexts)

    def context(self, name: str) -> MetaContext | None:
        return self.contexts.get(name)

    def attach(self, connection: Attached) -> None:
        self.attached.append(connection)

    def detach(self, connection: Attached) -> None:
        self.detached.append(connection)


class MemoryDirectory:
    def __init__(self, *exports: MemoryExport, default: str = "") -> None:
        self.exports = {export.name: export for export in exports}
        self.default = default

    def list(self) -> Iterator[Listed]:
        for export in self.exports.values():
            yield Listed(export.name, export.description, export.tls_required)

    def find(self, name: str) -> MemoryExport | None:
        return self.exports.get(name or self.default)


class DepthVolume(MemoryVolume):
    """Its second half comes from a backing store."""

    def allocation_depth(
        self, offset_bytes: int, length_bytes: int, runs_max: int, done: ExtentsCompletion
    ) -> None:
        half = self.size_bytes // 2
        own = max(0, min(half - offset_bytes, length_bytes))
        done([(own, 1), (length_bytes - own, 2)], None)


def feed(transport: FakeTransport, data: bytes, chunk: int = 1 << 30) -> int:
    """Give ``data`` to a connection as a socket would, as long as it reads: how much it took."""
    view, connection = memoryview(data), transport.connection
    assert connection is not None
    while view and transport.reading:
        buffer = connection.get_buffer()
        size = min(len(buffer), len(view), chunk)
        assert size, "an empty receive buffer"
        buffer[:size] = view[:size]
        connection.buffer_updated(size)
        view = view[size:]
    return len(data) - len(view)


class Reply(NamedTuple):
    """One reply to an option."""

    option: int
    kind: int
    data: bytes


class Answer(NamedTuple):
    """One simple reply (``kind`` None) or chunk."""

    kind: int | None
    done: bool
    cookie: int
    error: int
    data: bytes
    offset: int | None = None


class Client:
    """A connection in memory; the replies to options and requests, decoded."""

    def __init__(
        self,
        directory: MemoryDirectory,
        mode: TlsMode = TlsMode.NONE,
        flags: int | None = 3,
        chunk: int = 1 << 30,
    ) -> None:
        self.transport = FakeTransport()
        self.connection = NbdConnection(directory, mode, self.transport, "127.0.0.1:50000")
        self.transport.connection = self.connection
        self.chunk = chunk
        self.unread = bytearray()
        self.connection.start()
        assert self.transport.take() == GREETING
        self.structured = self.extended = False
        if flags is not None:
            self.send(flags.to_bytes(4, "big"))

    def send(self, data: bytes) -> None:
        """What the connection does not read waits in ``unread``."""
        self.unread += data
        taken = 1
        while taken:
            taken = feed(self.transport, bytes(self.unread), self.chunk)
            del self.unread[:taken]
            self.transport.run()

    def is_closed(self) -> bool:
        return self.transport.closed

    def is_reading(self) -> bool:
        return self.transport.reading

    # --- Handshake ---

    def option(self, number: int, data: bytes = b"") -> list[Reply]:
        self.send(option(number, data))
        return replies(self.transport.take())

    def kinds(self, number: int, data: bytes = b"") -> list[int]:
        return [reply.kind for reply in self.option(number, data)]

    def negotiate(self, *numbers: int) -> None:
        for number in numbers:
            assert self.kinds(number) == [ACK]
            self.structured |= number == STRUCTURED
            self.extended |= number == EXTENDED

    def contexts(self, *names: str, export: str = "disk") -> list[int]:
        found = self.option(SET_META, context_data(export, *names))
        assert found[-1].kind == ACK
        return [int.from_bytes(reply.data[:4], "big") for reply in found[:-1]]

    def go(self, name: str = "disk") -> "Client":
        assert self.kinds(GO, info_data(name))[-1] == ACK
        return self

    # --- Transmission ---

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        data: bytes = b"",
        cookie: int = 77,
    ) -> list[Answer]:
        """One request, and what was answered until nothing moves."""
        self.send(self.encode(command, offset, length, flags, data, cookie))
        return self.answers({cookie: length} if command == READ else {})

    def encode(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        data: bytes = b"",
        cookie: int = 77,
    ) -> bytes:
        if self.extended:
            flags |= PAYLOAD_LEN if data else 0
            magic, layout = 0x21E41C71, ">IHHQQQ"
        else:
            magic, layout = 0x25609513, ">IHHQQI"
        size = len(data) if data else length
        return struct.pack(layout, magic, flags, command, cookie, offset, size) + data

    def error(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b""
    ) -> int:
        """The error of a request that has one final answer."""
        found = self.request(command, offset, length, flags, data)
        assert len(found) == 1, found
        assert found[0].done
        return found[0].error

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """Data of a successful read, put together from its chunks."""
        return assemble(self.request(READ, offset, length, flags), offset, length)

    def answers(self, lengths: dict[int, int]) -> list[Answer]:
        """Decode all output; ``lengths`` of reads by cookie, which simple replies do not say."""
        return list(decode(self.transport.take(), lengths, self.structured, self.extended))


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def info_data(name: str, *wanted: int) -> bytes:
    text = name.encode()
    head = struct.pack(">I", len(text)) + text + struct.pack(">H", len(wanted))
    return head + b"".join(struct.pack(">H", kind) for kind in wanted)


def context_data(name: str, *queries: str) -> bytes:
    def string(text: str) -> bytes:
        return struct.pack(">I", len(text.encode())) + text.encode()

    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def replies(data: bytes) -> list[Reply]:
    found = []
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        assert len(data) >= 20 + length
        found.append(Reply(number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def decode(
    data: bytes, lengths: dict[int, int], structured: bool, extended: bool
) -> Iterator[Answer]:
    view = memoryview(data)
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        assert at <= len(view)
        return bytes(view[at - size : at])

    while at < len(view):
        magic = int.from_bytes(view[at : at + 4], "big")
        if magic == 0x67446698:
            assert not extended
            _, error, cookie = struct.unpack(">IIQ", take(16))
            size = 0 if structured or error else lengths.get(cookie, 0)
            yield Answer(None, True, cookie, error, take(size))
            continue
        if magic == 0x668E33EF:
            assert structured and not extended
            _, flags, kind, cookie, size = struct.unpack(">IHHQI", take(20))
        else:
            assert magic == 0x6E8A278C and extended
            _, flags, kind, cookie, _, size = struct.unpack(">IHHQQQ", take(32))
        assert flags in {0, 1}
        yield _chunk(kind, flags == 1, cookie, take(size))


def _chunk(kind: int, done: bool, cookie: int, payload: bytes) -> Answer:
    if kind in {ERROR, ERROR_OFFSET}:
        error, size = struct.unpack_from(">IH", payload)
        message, rest = payload[6 : 6 + size], payload[6 + size :]
        assert error and len(message) == size and len(rest) == (8 if kind == ERROR_OFFSET else 0)
        message.decode()
        at = int.from_bytes(rest, "big") if rest else None
        return Answer(kind, done, cookie, error, message, at)
    if kind == HOLE:
        at, size = struct.unpack(">QI", payload)
        return Answer(kind, done, cookie, 0, bytes(size), at)
    if kind == DATA:
        assert len(payload) > 8
        return Answer(kind, done, cookie, 0, payload[8:], int.from_bytes(payload[:8], "big"))
    return Answer(kind, done, cookie, 0, payload)


def assemble(answers: list[Answer], offset: int, length: int) -> bytes:
    """Data of a successful read: every byte once, and one end."""
    assert [answer.done for answer in answers] == [False] * (len(answers) - 1) + [True]
    assert not any(answer.error for answer in answers), answers
    if answers[0].kind is None:
        assert len(answers) == 1
        return answers[0].data
    found: dict[int, bytes] = {}
    for answer in answers:
        if answer.offset is not None:
            assert answer.kind in {DATA, HOLE} and answer.offset not in found
            found[answer.offset] = answer.data
    data = b""
    for at in sorted(found):
        assert at == offset + len(data)
        data += found[at]
    assert len(data) == length
    return data


def extents(answer: Answer) -> tuple[int, list[tuple[int, int]]]:
    """Context and descriptors of a block status chunk."""
    if answer.kind == STATUS:
        number, body, layout = int.from_bytes(answer.data[:4], "big"), answer.data[4:], ">II"
    else:
        assert answer.kind == STATUS_EXT
        number, count = struct.unpack_from(">II", answer.data)
        body, layout = answer.data[8:], ">QQ"
        assert len(body) == 16 * count
    return number, [(length, status) for length, status in struct.iter_unpack(layout, body)]


# How a client may have negotiated replies.
STYLES = {"simple": (), "structured": (STRUCTURED,), "extended": (EXTENDED,)}


def served(
    style: str = "simple", volume: MemoryVolume | None = None, **export: object
) -> tuple[Client, MemoryExport]:
    """A client in its transmission phase."""
    served_export = MemoryExport(volume or MemoryVolume(SIZE), **export)  # type: ignore[arg-type]
    client = Client(MemoryDirectory(served_export))
    client.negotiate(*STYLES[style])
    return client.go(), served_export


def other_uuid(number: int) -> UUID:
    return UUID(int=number)
