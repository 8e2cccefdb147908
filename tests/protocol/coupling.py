"""An initiator and a target coupled in memory: what one sends the other gets, in chunks of any
size, without sockets or time.
"""

from collections import deque

from protocol.iscsi.connection import TargetConnection
from protocol.iscsi.errors import IscsiError
from protocol.iscsi.initiator.connection import InitiatorConnection
from protocol.iscsi.initiator.login import InitiatorSettings
from protocol.volume import Buffer
from tests.protocol.directory import INITIATOR, TARGET, RecordedNode, recorded
from tests.protocol.memory_volume import MemoryVolume


def feed(
    receiver: TargetConnection | InitiatorConnection, data: bytes, chunk: int = 1 << 30
) -> None:
    """Give ``data`` to a connection as a socket would, at most ``chunk`` bytes at a time."""
    view = memoryview(data)
    while view:
        buffer = receiver.get_buffer(-1)
        size = min(len(buffer), len(view), chunk)
        assert size, "an empty receive buffer"
        buffer[:size] = view[:size]
        receiver.buffer_updated(size)
        view = view[size:]


class Peer:
    """A target connection with its output as bytes. ``paused`` connections keep what they have."""

    def __init__(self, node: RecordedNode) -> None:
        self.sent = bytearray()
        self.flushes = 0
        self.closed = False
        self.wakes = 0
        self.connection = TargetConnection(
            node, self._send, self._wake, self._close, "127.0.0.1:3260", "127.0.0.1:50000"
        )

    def _send(self, buffers: list[Buffer]) -> None:
        assert not self.closed, "sent after close"
        self.flushes += 1
        self.sent += b"".join(buffers)

    def _wake(self) -> None:
        self.wakes += 1

    def _close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True

    def take(self) -> bytes:
        """What was sent since the last call."""
        sent = bytes(self.sent)
        self.sent.clear()
        return sent


class Coupling:
    """One initiator logged in to one target. ``chunk`` is how many bytes travel at a time."""

    def __init__(
        self, node: RecordedNode, settings: InitiatorSettings, chunk: int = 1 << 30
    ) -> None:
        self.node = node
        self.chunk = chunk
        self.to_target: deque[bytes] = deque()
        self.peer = Peer(node)
        self.target = self.peer.connection
        self.login_result: list[IscsiError | None] = []
        self.initiator_closed = False
        self.initiator = InitiatorConnection(
            settings, self._send, self._wake, self._close, self.login_result.append
        )
        self._needs_flush = False

    def _send(self, buffers: list[Buffer]) -> None:
        self.to_target.append(b"".join(buffers))

    def _wake(self) -> None:
        self._needs_flush = True

    def _close(self) -> None:
        self.initiator_closed = True

    def run(self) -> None:
        """Carry bytes both ways until nothing moves."""
        while True:
            if self._needs_flush:
                self._needs_flush = False
                self.initiator.flush_output()
            if self.peer.wakes:
                self.peer.wakes = 0
                self.target.flush_output()
            if self.to_target and not self.peer.closed:
                feed(self.target, self.to_target.popleft(), self.chunk)
            elif self.peer.sent:
                feed(self.initiator, self.peer.take(), self.chunk)
            elif not (self._needs_flush or self.peer.wakes):
                return

    def login(self) -> "Coupling":
        """Log in; fails the test where that fails."""
        self.initiator.start()
        self.run()
        assert self.login_result == [None], self.login_result
        return self

    def command(
        self, cdb: bytes, *, lun: int = 0, read_bytes: int = 0, data: Buffer = b""
    ) -> bytes:
        """One command to its end: the data read. Raises its error."""
        results: list[tuple[Buffer | None, IscsiError | None]] = []
        self.initiator.submit(
            lun,
            cdb,
            lambda got, error: results.append((got, error)),
            read_bytes=read_bytes,
            data=data,
        )
        self.run()
        assert len(results) == 1, f"{len(results)} results"
        got, error = results[0]
        if error is not None:
            raise error
        assert got is not None
        return bytes(got)


def settings(**changes: object) -> InitiatorSettings:
    """Settings of the test initiator for the test target."""
    return InitiatorSettings(**{"initiator_name": INITIATOR, "target_name": TARGET, **changes})  # type: ignore[arg-type]


def coupled(
    volume: MemoryVolume, chunk: int = 1 << 30, clear_attention: bool = True, **changes: object
) -> Coupling:
    """An initiator logged in to a target with ``volume`` as LUN 0, its power-on attention taken."""
    node = recorded({0: volume})
    pair = Coupling(node, settings(**changes), chunk).login()
    if clear_attention:
        for mapped in node.unit_for(volume).nexuses:
            mapped.take_attention()
    return pair
