"""The receive buffer, and the list of buffers that leave together.

`ReceiveBuffer` invariant: ``0 <= start <= end <= len(storage)``; bytes before ``start`` were
handled. After `compact` the message under way fits behind ``start``.
"""

from protocol.volume import Buffer


class ReceiveBuffer:
    """A flat buffer that the socket fills and the parser empties; views into it stay valid until
    `compact`.
    """

    __slots__ = ("end", "needed", "start", "storage", "view")

    def __init__(self, size_bytes: int) -> None:
        self.storage = bytearray(size_bytes)
        self.view = memoryview(self.storage)
        self.start = 0
        self.end = 0
        # Bytes of the message, or the piece of one, that begins at ``start``; 0 where unknown.
        # Never above the buffer's size.
        self.needed = 0

    @property
    def available(self) -> int:
        """Bytes that were received and not handled."""
        return self.end - self.start

    def free(self) -> memoryview:
        """The part to be filled next."""
        return self.view[self.end :]

    def has(self, size: int) -> bool:
        """Whether ``size`` bytes are there; if not, they are what is waited for."""
        if self.end - self.start >= size:
            return True
        self.needed = size
        return False

    def take(self, size: int) -> memoryview:
        """The next ``size`` bytes, which are there."""
        at = self.start
        self.start = at + size
        return self.view[at : at + size]

    def drop(self) -> None:
        """Forget everything that was received."""
        self.start = self.end = 0

    def grow(self, size_bytes: int) -> None:
        """Go over to a larger buffer, unhandled bytes included."""
        rest = self.view[self.start : self.end]
        self.storage = bytearray(size_bytes)
        self.view = memoryview(self.storage)
        self.view[: len(rest)] = rest
        self.start, self.end = 0, len(rest)

    def release(self) -> None:
        """Nothing will be received any more: the memory goes back now, whoever still holds this
        object.
        """
        self.storage = bytearray()
        self.view = memoryview(self.storage)
        self.start = self.end = 0

    def compact(self) -> None:
        """Move an incomplete tail to the front, but only where its message could not be completed
        behind it.
        """
        start, end = self.start, self.end
        if start == end:
            self.start = self.end = 0
        elif start and len(self.storage) - start < max(self.needed, end - start + 1):
            self.view[: end - start] = self.view[start:end]
            self.start, self.end = 0, end - start
        self.needed = 0


class Outbox:
    """What leaves with the next flush. The fast path appends to ``pending`` itself."""

    __slots__ = ("pending", "pending_bytes")

    def __init__(self) -> None:
        self.pending: list[Buffer] = []
        self.pending_bytes = 0  # of data; headers are not counted

    def put(self, header: bytes, data: Buffer = b"") -> None:
        """Queue one message."""
        self.pending.append(header)
        if len(data):
            self.pending.append(data)
            self.pending_bytes += len(data)

    def take(self) -> list[Buffer]:
        """What is pending; the caller sends it."""
        pending = self.pending
        self.pending = []
        self.pending_bytes = 0
        return pending
