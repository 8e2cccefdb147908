"""The control socket: listens on a Unix socket (mode 0660), one asyncio protocol a connection, one
task a call.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, cast

from daemon.process import unix_sockets
from daemon.process.descriptors import CONTROL_MAX
from daemon.process.logs import get_log
from protocol.control.definition import AnyMethod
from protocol.control.errors import INTERNAL, ControlError
from protocol.control.server_connection import Call, ServerConnection, State

BACKLOG: Final = 64

CallMethod = Callable[[AnyMethod], Awaitable[Any]]


class ControlPathBusy(Exception):
    """The control path cannot be listened on; the message says why and what to do."""


class ControlListener:
    """All control connections of the daemon."""

    def __init__(self, path: str, call: CallMethod, connections_max: int = CONTROL_MAX) -> None:
        self.path = path
        self.call = call
        self.connections_max = connections_max
        self.connections: set[ControlConnection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._bound: tuple[int, int] | None = None

    async def start(self) -> None:
        """Listen. Raises ControlPathBusy."""
        try:
            bound = unix_sockets.bind(self.path, "control path", "--control")
        except unix_sockets.UnixPathBusy as error:
            raise ControlPathBusy(str(error)) from error
        self._bound = unix_sockets.identity(self.path)
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: ControlConnection(self), sock=bound, backlog=min(BACKLOG, self.connections_max)
        )

    def notify(self, event: str, params: Any) -> None:
        """Send a notification to those that subscribed to it."""
        for connection in self.connections:
            connection.notify(event, params)

    def stop_accepting(self) -> None:
        """Close the listener and remove the socket, unless somebody put another in its place."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        assert self._bound is not None
        unix_sockets.remove(self.path, self._bound)

    async def stop(self, timeout_seconds: float) -> None:
        """Let calls in flight end, at most ``timeout_seconds``; then cancel what is left and close
        all connections.
        """
        self.stop_accepting()
        if self.tasks:
            _, left = await asyncio.wait(self.tasks, timeout=timeout_seconds)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        for connection in list(self.connections):
            connection.close()


class ControlConnection(asyncio.Protocol):
    """One connection. Answers go out whole and in the order in which they were made, whatever is
    awaited between their parts.
    """

    def __init__(self, listener: ControlListener) -> None:
        self.protocol = ServerConnection()
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._slow_reader = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        transport = cast("asyncio.Transport", transport)  # uvloop's is one by shape, not by class
        if len(self._listener.connections) >= self._listener.connections_max:
            get_log().warning(
                "control.refused", reason=f"{self._listener.connections_max} connections are open"
            )
            transport.abort()
            return
        self._transport = transport
        self._listener.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client went. Its calls end by themselves: what was begun on the pool is not torn in
        the middle.
        """
        self._listener.connections.discard(self)
        self._transport = None

    def data_received(self, data: bytes) -> None:
        """Bytes came: start a task for each call."""
        for call in self.protocol.receive(data):
            task = asyncio.get_running_loop().create_task(self._carry_out(call))
            self._listener.tasks.add(task)
            task.add_done_callback(self._listener.tasks.discard)
        self._write(self.protocol.take_output())
        if self.protocol.state is State.CLOSED:
            get_log().warning("control.malformed", client=self.protocol.client)
            self.close()

    def pause_writing(self) -> None:
        """The client does not read its answers: take no more of its requests, and drop
        notifications.
        """
        self._slow_reader = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._slow_reader = False
        if self._transport is not None:
            self._transport.resume_reading()

    def notify(self, event: str, params: Any) -> None:
        """Send a notification if this client subscribed; progress that a slow reader misses is
        replaced by the next.
        """
        if not self._slow_reader:
            self._write(self.protocol.notification(event, params) or b"")

    def close(self) -> None:
        """Close when everything written has gone out."""
        if self._transport is not None:
            self._transport.close()

    async def _carry_out(self, call: Call) -> None:
        try:
            result = await self._listener.call(call.method)
        except ControlError as error:
            parts = self.protocol.refuse(call.request_id, error)
        except Exception as error:  # noqa: BLE001 -- a bug in one call is answered and logged; the daemon goes on serving disks
            get_log().error("control.internal_error", method=call.method.METHOD, exc_info=error)
            failure = ControlError(
                INTERNAL,
                f"{call.method.METHOD} failed inside the daemon: {error!r}",
                "see the daemon's log",
            )
            parts = self.protocol.refuse(call.request_id, failure)
        else:
            parts = self.protocol.answer(call.request_id, result)
        # All parts at once, so that no other answer comes between; not joined, as copying a long
        # list would stall the event loop.
        encoded = await _gather(parts)
        if self._transport is not None:
            self._transport.writelines(encoded)

    def _write(self, data: bytes) -> None:
        if data and self._transport is not None:
            self._transport.write(data)


async def _gather(parts: Iterator[bytes]) -> list[bytes]:
    """Encode a response part by part, letting the event loop run between (design invariant 8)."""
    encoded = []
    for part in parts:
        encoded.append(part)
        await asyncio.sleep(0)
    return encoded
