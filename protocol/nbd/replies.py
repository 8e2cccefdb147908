"""Replies of the transmission phase: simple, structured, and with extended headers ("Simple reply
message", "Structured reply chunk message", "Extended reply chunk message").

``origin`` is the offset of the request, which an extended header repeats.
"""

from struct import Struct
from typing import Final

from protocol.nbd import limits, wire
from protocol.nbd.errors import message_bytes
from protocol.nbd.export import Extents
from protocol.nbd.framing import Outbox
from protocol.nbd.request import Request
from protocol.volume import Buffer

# What is no longer than this is zeros exactly if these bytes begin with it: one comparison, which
# ends at the first byte that differs.
ZEROS: Final = bytes(limits.PIECE_BYTES)
# A whole OFFSET_DATA chunk but its data: header and offset of the data.
STRUCTURED_DATA: Final = Struct(">IHHQIQ")
EXTENDED_DATA: Final = Struct(">IHHQQQQ")
_DONE: Final = wire.REPLY_FLAG_DONE


class Replies:
    """Simple replies, for a client that negotiated nothing else."""

    __slots__ = ("outbox",)

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox

    def success(self, cookie: int, origin: int) -> None:
        """Of any request but a read or a block status."""
        self.outbox.pending.append(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie))

    def failure(self, request: Request, error: int, message: str, at: int | None = None) -> None:
        """The whole request failed, or, of chunks, what was not sent; ``at`` is the offset of the
        failure.
        """
        self.outbox.pending.append(
            wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, request.cookie)
        )

    def whole(self, request: Request, pieces: list[Buffer]) -> None:
        """All data of a read at once."""
        self.success(request.cookie, request.offset)
        self._append(pieces)

    def empty(self, request: Request) -> None:
        """Of a read of no bytes."""
        self.success(request.cookie, request.offset)

    def _append(self, pieces: list[Buffer]) -> None:
        self.outbox.pending += pieces
        self.outbox.pending_bytes += sum(map(len, pieces))


class ChunkReplies(Replies):
    """Structured replies. What has no payload is answered with a simple reply, which is shorter."""

    __slots__ = ()

    def failure(self, request: Request, error: int, message: str, at: int | None = None) -> None:
        """ERROR, or ERROR_OFFSET where it is known where."""
        text = message_bytes(message)
        payload = wire.ERROR.pack(error, len(text)) + text
        kind = wire.REPLY_TYPE_ERROR
        if at is not None:
            kind = wire.REPLY_TYPE_ERROR_OFFSET
            payload += wire.OFFSET.pack(at)
        self.outbox.put(
            self._header(_DONE, kind, request.cookie, request.offset, len(payload)), payload
        )

    def empty(self, request: Request) -> None:
        """A chunk of type NONE."""
        kind = wire.REPLY_TYPE_NONE
        self.outbox.pending.append(self._header(_DONE, kind, request.cookie, request.offset, 0))

    def whole(self, request: Request, pieces: list[Buffer]) -> None:
        """All data of a read in one chunk, as a client that does not want fragments asks for."""
        if all(ZEROS.startswith(piece) for piece in pieces):
            self._hole(request.cookie, request.offset, request.offset, request.length, _DONE)
            return
        self._data(request.cookie, request.offset, request.offset, request.length, _DONE)
        self._append(pieces)

    def content(self, cookie: int, origin: int, at: int, data: Buffer, last: bool) -> None:
        """Data of a read from ``at`` on, at most a piece; long runs of zeros are sent as holes.
        ``last``: nothing follows, and nothing can fail any more.
        """
        size, flags = len(data), _DONE if last else 0
        if size <= limits.HOLE_BYTES_MIN:
            self._run(cookie, origin, at, data, ZEROS.startswith(data), flags)
            return
        view = memoryview(data)
        start, zeros = 0, ZEROS.startswith(view[: limits.HOLE_BYTES_MIN])
        for edge in range(limits.HOLE_BYTES_MIN, size, limits.HOLE_BYTES_MIN):
            here = ZEROS.startswith(view[edge : edge + limits.HOLE_BYTES_MIN])
            if here != zeros:
                self._run(cookie, origin, at + start, view[start:edge], zeros, 0)
                start, zeros = edge, here
        self._run(cookie, origin, at + start, view[start:] if start else data, zeros, flags)

    def _run(
        self, cookie: int, origin: int, at: int, data: Buffer, zeros: bool, flags: int
    ) -> None:
        if zeros:
            self._hole(cookie, origin, at, len(data), flags)
        else:
            self._data(cookie, origin, at, len(data), flags)
            self._append([data])

    def _hole(self, cookie: int, origin: int, at: int, size: int, flags: int) -> None:
        payload = wire.HOLE.pack(at, size)
        kind = wire.REPLY_TYPE_OFFSET_HOLE
        self.outbox.pending.append(
            self._header(flags, kind, cookie, origin, len(payload)) + payload
        )

    def _data(self, cookie: int, origin: int, at: int, size: int, flags: int) -> None:
        kind = wire.REPLY_TYPE_OFFSET_DATA
        self.outbox.pending.append(
            STRUCTURED_DATA.pack(
                wire.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, wire.OFFSET.size + size, at
            )
        )

    def status(self, request: Request, context: int, extents: Extents, last: bool) -> None:
        """One BLOCK_STATUS chunk."""
        payload = wire.CONTEXT_ID.pack(context)
        payload += b"".join(wire.EXTENT.pack(*extent) for extent in extents)
        self._status(request, wire.REPLY_TYPE_BLOCK_STATUS, payload, last)

    def _status(self, request: Request, kind: int, payload: bytes, last: bool) -> None:
        flags = _DONE if last else 0
        self.outbox.put(
            self._header(flags, kind, request.cookie, request.offset, len(payload)), payload
        )

    def _header(self, flags: int, kind: int, cookie: int, origin: int, size: int) -> bytes:
        return wire.STRUCTURED_REPLY.pack(wire.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, size)


class ExtendedReplies(ChunkReplies):
    """Every reply is a chunk with the extended header."""

    __slots__ = ()

    def success(self, cookie: int, origin: int) -> None:
        """A chunk of type NONE."""
        self.outbox.pending.append(self._header(_DONE, wire.REPLY_TYPE_NONE, cookie, origin, 0))

    def _data(self, cookie: int, origin: int, at: int, size: int, flags: int) -> None:
        kind = wire.REPLY_TYPE_OFFSET_DATA
        magic, payload = wire.EXTENDED_REPLY_MAGIC, wire.OFFSET.size + size
        self.outbox.pending.append(
            EXTENDED_DATA.pack(magic, flags, kind, cookie, origin, payload, at)
        )

    def status(self, request: Request, context: int, extents: Extents, last: bool) -> None:
        """One BLOCK_STATUS_EXT chunk."""
        payload = wire.EXTENDED_STATUS.pack(context, len(extents))
        payload += b"".join(wire.EXTENDED_EXTENT.pack(*extent) for extent in extents)
        self._status(request, wire.REPLY_TYPE_BLOCK_STATUS_EXT, payload, last)

    def _header(self, flags: int, kind: int, cookie: int, origin: int, size: int) -> bytes:
        return wire.EXTENDED_REPLY.pack(
            wire.EXTENDED_REPLY_MAGIC, flags, kind, cookie, origin, size
        )
