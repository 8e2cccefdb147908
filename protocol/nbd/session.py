"""What all requests of one connection share in the transmission phase: the export, the replies, and
the count of what is at the volume.

Invariants. ``in_flight`` counts the pieces that the volume holds or that wait for a client that
does not drain; the export is detached when it is 0 and the session is over. After ``over`` nothing
is replied any more. After ``ending`` was set every new request is answered with NBD_ESHUTDOWN.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

from protocol.nbd import limits, wire
from protocol.nbd.errors import RequestRefused, error_of, error_value
from protocol.nbd.framing import Outbox
from protocol.nbd.handshake import Entered
from protocol.nbd.replies import ChunkReplies, ExtendedReplies, Replies
from protocol.nbd.request import Request, command_name

Step = Callable[[], None]


def _nothing() -> None:
    """What a session that was released does when it is asked for something."""


def _never() -> bool:
    """It is not paused."""
    return False


class Stream(Protocol):
    """A reply that goes out piece by piece, and waits while the client does not drain."""

    def pump(self) -> None:
        """Go on."""


class Session:
    """``wake`` asks for a flush soon, ``flush`` sends what is pending, ``is_paused`` says that the
    client does not drain, and ``turn`` takes a step for a turn of its own.
    """

    __slots__ = (
        "blocked",
        "chunks",
        "contexts",
        "disconnecting",
        "ending",
        "export",
        "extended",
        "fast",
        "flush",
        "in_flight",
        "is_paused",
        "outbox",
        "over",
        "read_bytes",
        "replies",
        "requests",
        "size_bytes",
        "stalled",
        "turn",
        "unsettled",
        "volume",
        "wake",
        "when_drained",
        "write_bytes",
    )

    def __init__(
        self,
        entered: Entered,
        outbox: Outbox,
        wake: Step,
        flush: Step,
        is_paused: Callable[[], bool],
        turn: Callable[[Step], None],
    ) -> None:
        self.export = entered.export
        self.volume = entered.export.volume
        self.size_bytes = entered.size_bytes  # as the client was told
        self.extended = entered.extended
        self.contexts = dict(enumerate(entered.contexts, 1))
        self.outbox = outbox
        self.chunks: ChunkReplies | None = None
        if entered.extended:
            self.chunks = ExtendedReplies(outbox)
        elif entered.structured:
            self.chunks = ChunkReplies(outbox)
        self.replies: Replies = self.chunks or Replies(outbox)
        self.wake = wake
        self.flush = flush
        self.is_paused = is_paused
        self.turn = turn
        self.in_flight = 0
        self.blocked = False  # a request waits until some of what is in flight has ended
        self.unsettled = False  # the volume has taken writes since it was settled last
        self.stalled: deque[Stream] = deque()
        self.disconnecting = False  # the client said NBD_CMD_DISC
        self.ending: str | None = None
        self.over = False
        self.fast = True
        self.when_drained: Step | None = None
        self.requests = self.read_bytes = self.write_bytes = 0

    # --- What is in flight ------------------------------------------------------------------------

    def admits(self, pieces: int) -> bool:
        """Whether so many more may be at the volume; if not, the caller waits. One request alone is
        always admitted.
        """
        self.blocked = self.in_flight > 0 and self.in_flight + pieces > limits.PIECES_MAX
        return not self.blocked

    def began(self, pieces: int = 1) -> None:
        """The volume has them now."""
        self.in_flight += pieces

    def ended(self, pieces: int = 1) -> None:
        """It has them no more."""
        self.in_flight -= pieces
        if not self.in_flight and self.when_drained is not None:
            drained, self.when_drained = self.when_drained, None
            drained()
        self.wake()

    def settle(self) -> None:
        """Let the volume carry out the writes that it has taken."""
        if self.unsettled:
            self.unsettled = False
            self.volume.settle()

    def abandon(self, drained: Step) -> None:
        """The connection is over: reply nothing more, and call ``drained`` once the volume holds
        nothing of it.
        """
        self.settle()
        self.over, self.fast = True, False
        if self.in_flight:
            self.when_drained = drained
            self.resume()
        else:
            drained()

    def release(self) -> None:
        """Nothing is in flight, and nothing can come: refer back to the connection no more."""
        self.wake = self.flush = _nothing
        self.is_paused = _never

    # --- Replies ----------------------------------------------------------------------------------

    def succeed(self, request: Request) -> None:
        """Answer a request that has no payload."""
        if not self.over:
            self.replies.success(request.cookie, request.offset)

    def fail(self, request: Request, error: Exception, at: int | None = None) -> None:
        """Answer with the value of an error. A volume that went or shrank ends the session
        ("Terminating the transmission phase").
        """
        value, message = error_of(error), str(error)
        if self.volume.size_bytes < self.size_bytes and value != wire.ESHUTDOWN:
            value, message = wire.ESHUTDOWN, f"{self.export.name} has shrunk"
        if value == wire.ESHUTDOWN and self.ending is None:
            self.end(message)
        if not self.over:
            self.replies.failure(request, value, message, at)

    def end(self, reason: str) -> None:
        """Answer new requests with NBD_ESHUTDOWN. What is in flight goes on."""
        self.ending, self.fast = reason, False

    def may_send(self, stream: Stream) -> bool:
        """True while the client drains; else ``stream`` is pumped when it does."""
        if self.outbox.pending_bytes >= limits.OUTPUT_BYTES_HIGH:
            self.flush()
        if self.is_paused() and not self.over:
            self.stalled.append(stream)
            return False
        return True

    def resume(self) -> None:
        """Go on with the streams that waited."""
        for _ in range(len(self.stalled)):
            self.stalled.popleft().pump()

    # --- What may be done -------------------------------------------------------------------------

    def check(self, request: Request, writing: bool, length: int) -> None:
        """Raise RequestRefused for what may not be done, or not on that range ("Error values",
        "Size constraints").
        """
        if self.ending is not None:
            raise RequestRefused(wire.ESHUTDOWN, self.ending)
        self.check_access(writing)
        offset = request.offset
        if (offset | length) & (limits.MINIMUM_BLOCK_BYTES - 1):
            raise RequestRefused(
                wire.EINVAL,
                f"{command_name(request.command)} of {length} bytes at {offset}: blocks of"
                f" {limits.MINIMUM_BLOCK_BYTES} bytes are the smallest",
            )
        if offset + length > self.size_bytes:
            beyond = {wire.CMD_WRITE, wire.CMD_WRITE_ZEROES}
            raise RequestRefused(
                wire.ENOSPC if request.command in beyond else wire.EINVAL,
                f"{command_name(request.command)} of {length} bytes at {offset}, beyond the"
                f" {self.size_bytes} bytes of {self.export.name}",
            )
        if offset + length > self.volume.size_bytes:
            raise RequestRefused(wire.ESHUTDOWN, f"{self.export.name} has shrunk")

    def check_access(self, writing: bool) -> None:
        """Raise RequestRefused while the export refuses reads, or writes."""
        export = self.export
        if writing and export.read_only:
            raise RequestRefused(wire.EPERM, f"{export.name} is read-only")
        number = export.write_errno if writing else export.read_errno
        if number:
            what = "written" if writing else "read"
            raise RequestRefused(
                error_value(number), f"{export.name} may not be {what} by this client now"
            )
