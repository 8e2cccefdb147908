"""What the listeners of all protocols share: admission, the time that passes for connections, and
how a stop waits for their end.
"""

import asyncio
from abc import ABC, abstractmethod
from typing import ClassVar, Final, Generic, TypeVar

from daemon.process.addresses import Endpoint
from daemon.process.logs import Repeats, get_log
from daemon.tcp.acceptor import Acceptor
from daemon.tcp.admission import Admission
from daemon.tcp.listener import ListenFailed

# Time comes to the connections in ticks: all their timeouts are whole seconds.
TICK_SECONDS: Final = 1.0
# Above this much unsent the connection is told to stop taking requests: several of the largest
# replies, so that a fast client never waits for us, and a client that does not drain costs no more
# than this.
WRITE_HIGH_BYTES: Final = 4 << 20
WRITE_LOW_BYTES: Final = 1 << 20
# What was sent at the end of a connection has this long to go out; a peer that is dead or does not
# read never takes it.
CLOSE_SECONDS: Final = 5.0


class ServedSocket(asyncio.BufferedProtocol, ABC):
    """One connection of a client: the sans-IO connection of its protocol decides everything, a
    subclass moves its bytes.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._abort_at_seconds: float | None = None
        self.host = ""

    def get_buffer(self, sizehint: int) -> memoryview:
        """Only before ``connection_made``, or for a connection that is not served:
        nothing is read.
        """
        return memoryview(bytearray(max(sizehint, 1)))

    def buffer_updated(self, nbytes: int) -> None:
        """See ``get_buffer``."""

    @property
    @abstractmethod
    def logging_in(self) -> bool:
        """The client has not shown yet who it is, or what it wants."""

    def tick(self, now_seconds: float) -> None:
        """Time passes."""
        if self._abort_at_seconds is not None and now_seconds >= self._abort_at_seconds:
            self.abort()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def _abort_in(self, seconds: float) -> None:
        if self._abort_at_seconds is None:
            self._abort_at_seconds = self._loop.time() + seconds


Served = TypeVar("Served", bound=ServedSocket)
Where = TypeVar("Where", bound=Endpoint)


class SocketListener(ABC, Generic[Served, Where]):
    """All listening sockets and connections of one protocol, which a subclass names. ``full``: why
    there can be no more than ``connections_max`` connections, where that is not the configuration's
    wish.
    """

    protocol: ClassVar[str]

    def __init__(self, connections_max: int, full: str | None) -> None:
        self.admission = Admission(self.protocol, connections_max, full)
        self.connections: set[Served] = set()
        self.addresses: list[Where] = []
        self._acceptor = Acceptor(self.admission, self._make)
        self._ticker: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._failures = Repeats(f"{self.protocol}.failed")

    @abstractmethod
    def _make(self) -> Served:
        """The protocol object of a connection that was just taken."""

    @abstractmethod
    def _shut_down(self, connection: Served, timeout_seconds: float) -> None:
        """Ask a client to end, at the latest after ``timeout_seconds``: the daemon stops."""

    @abstractmethod
    async def _bind(self, address: Where) -> list[Where]:
        """Listen there; what it really is. Raises OSError, ListenFailed."""

    async def listen(self, address: Where) -> None:
        """Listen on every address that ``address`` stands for. Raises ListenFailed."""
        try:
            self.addresses += await self._bind(address)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ListenFailed(
                f"cannot listen on {self.protocol}.listen {address}: {reason}; choose another"
                " address, or stop what uses it"
            ) from error
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)

    def stop_accepting(self) -> None:
        """Close the listeners; connections go on."""
        self._acceptor.close()

    async def stop(self, timeout_seconds: float) -> None:
        """Ask all clients to end, give what is in flight ``timeout_seconds``, then close."""
        self.stop_accepting()
        await self._acceptor.opened()
        for connection in list(self.connections):
            self._shut_down(connection, timeout_seconds)
        try:
            await asyncio.wait_for(self._wait_empty(), timeout_seconds)
        except TimeoutError:
            get_log().info(f"{self.protocol}.closing", connections=len(self.connections))
        for connection in list(self.connections):
            connection.abort()
        await self._wait_empty()
        if self._ticker is not None:
            self._ticker.cancel()

    def added(self, connection: Served) -> None:
        """A connection is served from now on."""
        self.connections.add(connection)
        self.admission.added(connection, connection.host)

    def removed(self, connection: Served) -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        self.admission.removed(connection, connection.host)
        if not self.connections:
            self._empty.set()

    async def _wait_empty(self) -> None:
        while self.connections:
            self._empty.clear()
            await self._empty.wait()

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._ticker = loop.call_later(TICK_SECONDS, self._tick)
        now_seconds = loop.time()
        for connection in list(self.connections):
            connection.tick(now_seconds)
        self.admission.tick()
        self._failures.tick()
