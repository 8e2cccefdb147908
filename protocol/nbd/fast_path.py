"""The hot path: plain READ and WRITE requests, straight from the receive buffer to the volume and
back.

`run` takes requests from the front of the receive buffer as long as each is a READ without flags or
a WRITE that is whole, of at most one piece, and stops before the first that is not; that one goes
the general way (`protocol.nbd.transmission`), which gives byte-identical answers for all of them.
Nothing here checks less: a request is taken only if every field is what the general way would
accept without a word.

Measured rules: one unpack for a header; ints in locals; no object for a read; a pooled one for a
write; what an export says is asked once a wake-up, since nothing else runs within one.
"""

from typing import Final

from protocol.nbd import wire
from protocol.nbd.framing import ReceiveBuffer
from protocol.nbd.limits import (
    HOLE_BYTES_MIN,
    MINIMUM_BLOCK_BYTES,
    OUTPUT_BYTES_HIGH,
    PIECE_BYTES,
    PIECES_MAX,
    REQUESTS_A_TURN,
)
from protocol.nbd.replies import EXTENDED_DATA, STRUCTURED_DATA, ZEROS
from protocol.nbd.request import Request
from protocol.nbd.session import Session

_UNALIGNED: Final = MINIMUM_BLOCK_BYTES - 1
_COMPACT_WRITES: Final = frozenset((0, wire.CMD_FLAG_FUA))
_EXTENDED_WRITES: Final = frozenset(
    (wire.CMD_FLAG_PAYLOAD_LEN, wire.CMD_FLAG_PAYLOAD_LEN | wire.CMD_FLAG_FUA)
)
_OFFSET_BYTES: Final = wire.OFFSET.size


class FastWrite:
    """A write on the hot path. Pooled: ``done`` is bound once for life."""

    __slots__ = ("_path", "cookie", "done", "offset")

    def __init__(self, path: "FastPath") -> None:
        self._path = path
        self.cookie = self.offset = 0
        self.done = self._done

    def _done(self, error: Exception | None) -> None:
        path = self._path
        session = path.session
        if error is not None or session.over:
            session.fail(
                Request(0, wire.CMD_WRITE, self.cookie, self.offset, 0),
                error or OSError("the connection is over"),
            )
            session.ended()
            del self.done  # not used again: it and this object hold each other
            return
        session.replies.success(self.cookie, self.offset)
        session.in_flight -= 1
        path.free_writes.append(self)
        session.wake()


class FastPath:
    """The hot path of one session, with its pool of writes."""

    __slots__ = ("_layout", "_magic", "_write_flags", "free_writes", "session")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.free_writes: list[FastWrite] = []
        if session.extended:
            self._layout, self._magic = wire.EXTENDED_REQUEST, wire.EXTENDED_REQUEST_MAGIC
            self._write_flags = _EXTENDED_WRITES
        else:
            self._layout, self._magic = wire.REQUEST, wire.REQUEST_MAGIC
            self._write_flags = _COMPACT_WRITES

    def run(self, receive: ReceiveBuffer) -> None:
        """Carry out plain requests from ``receive.start`` on. Stops at anything else, and when
        enough output has gathered.
        """
        session, outbox, free_writes = self.session, self.session.outbox, self.free_writes
        volume, export, chunks = session.volume, session.export, session.chunks
        extended, size_bytes, layout = session.extended, session.size_bytes, self._layout
        unpack, header_bytes, request_magic = layout.unpack_from, layout.size, self._magic
        reads, writes = not export.read_errno, not (export.read_only or export.write_errno)
        storage, view, position, end = receive.storage, receive.view, receive.start, receive.end
        requests = read_bytes = write_bytes = 0
        for _ in range(REQUESTS_A_TURN):
            if position + header_bytes > end:
                break
            magic, flags, command, cookie, offset, length = unpack(storage, position)
            if (
                magic != request_magic
                or (offset | length) & _UNALIGNED
                or not 0 < length <= PIECE_BYTES
                or offset + length > size_bytes
                or session.in_flight >= PIECES_MAX
            ):
                break
            data_at = position + header_bytes
            if command == wire.CMD_READ:
                if flags or not reads:
                    break
                try:
                    data = volume.try_read(offset, length)
                except Exception:  # noqa: BLE001 - the general way meets it too, and answers it
                    break
                if data is None:
                    break
                position = data_at
                if chunks is None:
                    outbox.pending.append(
                        wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie)
                    )
                    outbox.pending.append(data)
                    outbox.pending_bytes += length
                elif length > HOLE_BYTES_MIN or ZEROS.startswith(data):
                    chunks.content(cookie, offset, offset, data, True)
                else:
                    outbox.pending.append(_data_header(extended, cookie, offset, length))
                    outbox.pending.append(data)
                    outbox.pending_bytes += length
                read_bytes += length
            elif command == wire.CMD_WRITE:
                after = data_at + length
                if flags not in self._write_flags or after > end or not writes:
                    break
                position = after
                write = free_writes.pop() if free_writes else FastWrite(self)
                write.cookie, write.offset = cookie, offset
                session.in_flight += 1
                fua = flags & wire.CMD_FLAG_FUA != 0
                volume.write(offset, view[data_at:after], fua, write.done)
                write_bytes += length
            else:
                break
            requests += 1
            if outbox.pending_bytes >= OUTPUT_BYTES_HIGH:
                break
        receive.start = position
        session.requests += requests
        session.read_bytes += read_bytes
        session.write_bytes += write_bytes
        if write_bytes:
            session.unsettled = True

    def release(self) -> None:
        """The pool refers back to here: empty it, so that no ring of references is left."""
        for write in self.free_writes:
            del write.done
        self.free_writes.clear()


def _data_header(extended: bool, cookie: int, offset: int, length: int) -> bytes:
    done, kind, payload = wire.REPLY_FLAG_DONE, wire.REPLY_TYPE_OFFSET_DATA, length + _OFFSET_BYTES
    if extended:
        return EXTENDED_DATA.pack(
            wire.EXTENDED_REPLY_MAGIC, done, kind, cookie, offset, payload, offset
        )
    return STRUCTURED_DATA.pack(wire.STRUCTURED_REPLY_MAGIC, done, kind, cookie, payload, offset)
