"""Bytes to PDUs and back: the receive buffer, the output list, digests and padding.

`ReceiveBuffer` invariant: ``0 <= start <= end <= len(storage)``; bytes before ``start`` were
handled. After `compact` the free part is never empty and the PDU that is under way fits.
"""

from collections import deque
from collections.abc import Callable
from struct import Struct
from typing import Final

from crc32c import crc32c

from protocol.iscsi.errors import HeaderDigestError, ProtocolError
from protocol.iscsi.limits import OUTPUT_BYTES_HIGH
from protocol.iscsi.pdu import HEADER_BYTES, Pdu
from protocol.volume import Buffer

DIGEST_BYTES: Final = 4
# RFC 7143 13.1: the CRC's bits travel in an order that makes it a little-endian integer.
_DIGEST: Final = Struct("<I")
_LENGTHS: Final = Struct(">I")
_LENGTHS_AT: Final = 4
_PADDING: Final = (b"", b"\0\0\0", b"\0\0", b"\0")


class ReceiveBuffer:
    """A flat buffer that the socket fills and the parser empties; views into it stay valid until
    `compact`.
    """

    __slots__ = (
        "data_bytes_max",
        "data_digest",
        "end",
        "header_digest",
        "start",
        "storage",
        "view",
    )

    def __init__(self, size_bytes: int, data_bytes_max: int) -> None:
        self.storage = bytearray(size_bytes)
        self.view = memoryview(self.storage)
        self.start = 0
        self.end = 0
        self.data_bytes_max = data_bytes_max
        self.header_digest = False
        self.data_digest = False

    def free(self) -> memoryview:
        """The part to be filled next."""
        return self.view[self.end :]

    def grow(self, size_bytes: int, data_bytes_max: int) -> None:
        """Move to a larger buffer, with the unhandled bytes."""
        rest = self.view[self.start : self.end]
        self.storage = bytearray(size_bytes)
        self.view = memoryview(self.storage)
        self.view[: len(rest)] = rest
        self.start, self.end = 0, len(rest)
        self.data_bytes_max = data_bytes_max

    def release(self) -> None:
        """Nothing will be received any more: free half a megabyte now, even while this object is
        referenced.
        """
        self.storage = bytearray()
        self.view = memoryview(self.storage)
        self.start = self.end = 0

    def compact(self) -> None:
        """Move an incomplete tail to the front, but only if its PDU would not fit where it is."""
        start, end = self.start, self.end
        if start == end:
            self.start = self.end = 0
        elif start and len(self.storage) - start < self._needed():
            self.view[: end - start] = self.view[start:end]
            self.start, self.end = 0, end - start

    def _needed(self) -> int:
        if self.end - self.start < HEADER_BYTES:
            return HEADER_BYTES + DIGEST_BYTES
        return self._sizes(self.start)[2]

    def _sizes(self, start: int) -> tuple[int, int, int]:
        """Bytes of additional headers, bytes of data, and length of the whole PDU at ``start``."""
        (lengths,) = _LENGTHS.unpack_from(self.storage, start + _LENGTHS_AT)
        ahs_bytes, data_bytes = (lengths >> 24) * 4, lengths & 0xFFFFFF
        total = HEADER_BYTES + ahs_bytes + (DIGEST_BYTES if self.header_digest else 0)
        if data_bytes:
            total += data_bytes + (-data_bytes % 4) + (DIGEST_BYTES if self.data_digest else 0)
        return ahs_bytes, data_bytes, total

    def next_pdu(self) -> Pdu | None:
        """The next whole PDU, or None. Raises ProtocolError for a data segment above what was
        declared, HeaderDigestError.
        """
        start = self.start
        if self.end - start < HEADER_BYTES:
            return None
        ahs_bytes, data_bytes, total = self._sizes(start)
        if data_bytes > self.data_bytes_max:
            raise ProtocolError(
                f"a data segment of {data_bytes} bytes, {self.data_bytes_max} were declared"
            )
        if self.end - start < total:
            return None
        self.start = start + total
        data_at = start + HEADER_BYTES + ahs_bytes
        if self.header_digest:
            self._check_header(start, data_at)
            data_at += DIGEST_BYTES
        header = bytes(self.view[start : start + HEADER_BYTES])
        ahs = (
            bytes(self.view[start + HEADER_BYTES : start + HEADER_BYTES + ahs_bytes])
            if ahs_bytes
            else b""
        )
        intact = not (self.data_digest and data_bytes) or self._data_intact(data_at, data_bytes)
        return Pdu(header, ahs, self.view[data_at : data_at + data_bytes], intact)

    def _check_header(self, start: int, digest_at: int) -> None:
        if crc32c(self.view[start:digest_at]) != _DIGEST.unpack_from(self.storage, digest_at)[0]:
            raise HeaderDigestError("header digest")

    def _data_intact(self, data_at: int, data_bytes: int) -> bool:
        padded_end = data_at + data_bytes + (-data_bytes % 4)
        value: int = _DIGEST.unpack_from(self.storage, padded_end)[0]
        return crc32c(self.view[data_at:padded_end]) == value


class Sender:
    """The output of one connection: buffers gather in ``pending`` and leave together.

    ``send(buffers)`` hands them to the transport, in order; ``wake()`` asks it for one `flush`
    soon. While ``corked``, that is while the input of a wake-up is carried out, no flush is asked
    for: one comes at the end. The fast path appends to ``pending`` itself when there are no
    digests. Once ``closed`` nothing is sent.
    """

    __slots__ = (
        "_send",
        "_stalled",
        "_wake",
        "_woken",
        "closed",
        "corked",
        "data_digest",
        "header_digest",
        "paused",
        "pending",
        "pending_bytes",
    )

    def __init__(self, send: Callable[[list[Buffer]], None], wake: Callable[[], None]) -> None:
        self._send = send
        self._wake = wake
        self._woken = False
        self._stalled: deque[Callable[[], None]] = deque()
        self.pending: list[Buffer] = []
        self.pending_bytes = 0
        self.header_digest = False
        self.data_digest = False
        self.corked = False
        self.paused = False  # the peer does not drain
        self.closed = False

    def put(self, header: bytes, data: Buffer = b"") -> None:
        """Queue one PDU; ``header`` holds the length of ``data`` already."""
        pending = self.pending
        pending.append(header)
        if self.header_digest:
            pending.append(_DIGEST.pack(crc32c(header)))
        size = len(data)
        if size:
            self.pending_bytes += size
            pending.append(data)
            pad = _PADDING[size & 3]
            if pad:
                pending.append(pad)
            if self.data_digest:
                pending.append(_DIGEST.pack(crc32c(pad, crc32c(data))))

    def flush(self) -> None:
        """Send what is pending."""
        self._woken = False
        if self.pending and not self.closed:
            pending = self.pending
            self.pending = []
            self.pending_bytes = 0
            self._send(pending)

    def wake(self) -> None:
        """A PDU became ready: within a wake-up it leaves with the others, else a flush is asked for
        once.
        """
        if not (self.corked or self._woken or self.closed):
            self._woken = True
            self._wake()

    # --- Back-pressure ----------------------------------------------------------------------------

    def may_send(self) -> bool:
        """True while the peer drains. To be asked before each piece of what is long."""
        if self.pending_bytes >= OUTPUT_BYTES_HIGH:
            self.flush()
        return not (self.paused or self.closed)

    def stall(self, go_on: Callable[[], None]) -> None:
        """Call ``go_on`` when the peer drains again."""
        self._stalled.append(go_on)

    def resume(self) -> None:
        """The peer drains again."""
        self.paused = False
        for _ in range(len(self._stalled)):
            self._stalled.popleft()()

    def forget_stalled(self) -> None:
        """What waits for the peer to drain is over."""
        self._stalled.clear()
