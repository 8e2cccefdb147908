"""The NBD listeners, and one BufferedProtocol a connection around the sans-IO `NbdConnection`.

As for iSCSI, the event loop receives into the connection's own buffer, and what one wake-up
answered leaves in one ``writelines``. Nothing here makes a Task or a Future per request.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Final, cast
from uuid import UUID

from daemon.nbd.exports import PoolExports, Shared
from daemon.process.addresses import Address, Endpoint, UnixAddress
from daemon.process.unix_sockets import UnixPathBusy
from daemon.tcp.listener import ListenFailed
from daemon.tcp.socket_listener import (
    CLOSE_SECONDS,
    WRITE_HIGH_BYTES,
    WRITE_LOW_BYTES,
    ServedSocket,
    SocketListener,
)
from protocol.nbd.connection import NbdConnection
from protocol.nbd.handshake import TlsMode
from protocol.turns import Turns
from protocol.volume import BlockVolume, Buffer

# NBD has no keep-alive of its own: TCP asks a silent client after a minute, and gives it up 30 s
# later.
KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class NbdListener(SocketListener["NbdProtocol", Endpoint]):
    """All NBD listeners and connections of the daemon. Satisfies `daemon.tcp.listener.Listener`."""

    protocol = "nbd"

    def __init__(self, shared: Shared, connections_max: int, full: str | None = None) -> None:
        super().__init__(connections_max, full)
        self._shared = shared
        self.turns = Turns(asyncio.get_running_loop().call_soon)

    def _make(self) -> "NbdProtocol":
        return NbdProtocol(self)

    async def _bind(self, address: Endpoint) -> list[Endpoint]:
        if not isinstance(address, UnixAddress):
            return [*await self._acceptor.listen(address)]
        try:
            self._acceptor.listen_unix(address)
        except UnixPathBusy as error:
            raise ListenFailed(str(error)) from error
        return [address]

    def _shut_down(self, connection: "NbdProtocol", timeout_seconds: float) -> None:
        connection.shut_down("the daemon stops", timeout_seconds)

    def directory(self, trusted: bool, local: str) -> PoolExports:
        """The exports for one client."""
        return PoolExports(self._shared, trusted, local)

    # --- What clients are told --------------------------------------------------------------------

    def space_low(self) -> None:
        """NBD has no word for it."""

    def volume_resized(self, volume: BlockVolume) -> None:
        """End the sessions of a volume that has shrunk; of growth NBD cannot tell."""
        self._shared.sessions.resized(volume)

    def volume_deleted(self, uuid: UUID) -> None:
        """A volume in use cannot be deleted, and nothing is kept for others."""

    # --- Life -------------------------------------------------------------------------------------

    def ended(self, connection: "NbdProtocol", ended: NbdConnection) -> None:
        """A connection has ended."""
        if ended.failure is not None:
            export = "" if ended.session is None else ended.session.export.name
            self._failures.log(ended.failure, peer=ended.peer_address, export=export)
        self.removed(connection)


class NbdProtocol(ServedSocket):
    """One socket. `NbdConnection` decides everything; this moves its bytes, as its
    `protocol.nbd.transport.Transport`.
    """

    def __init__(self, listener: NbdListener) -> None:
        super().__init__()
        self._listener = listener
        self._connection: NbdConnection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        transport = cast("asyncio.Transport", transport)  # uvloop's is one by shape, not by class
        self._transport = transport
        taken = transport.get_extra_info("socket")
        trusted = taken.family == socket.AF_UNIX
        try:
            local = _address(taken.getsockname())
            peer = local if trusted else _address(taken.getpeername())
        except OSError:
            transport.abort()  # the client has gone again
            return
        self.host = str(peer) if isinstance(peer, UnixAddress) else peer.host
        if self._listener.admission.refusal(self.host) is not None:
            transport.abort()  # others, taken in the same turn, were faster
            return
        if not trusted:
            taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for level, option, value in KEEPALIVE:
                taken.setsockopt(level, option, value)
        transport.set_write_buffer_limits(WRITE_HIGH_BYTES, WRITE_LOW_BYTES)
        directory = self._listener.directory(trusted, str(local))
        connection = NbdConnection(directory, TlsMode.NONE, self, str(peer))
        self._connection = connection
        self._listener.added(self)
        # As for iSCSI: the event loop calls the connection itself from now on.
        self.get_buffer = connection.get_buffer  # type: ignore[method-assign]
        self.buffer_updated = connection.buffer_updated  # type: ignore[method-assign]
        transport.set_protocol(self)
        connection.start()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended, by either side."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.connection_lost()
            self._listener.ended(self, connection)
            del self.get_buffer, self.buffer_updated  # a ring of references, as for iSCSI

    def pause_writing(self) -> None:
        """The client does not drain."""
        if self._connection is not None:
            self._connection.pause_writing()

    def resume_writing(self) -> None:
        """The client drains again."""
        if self._connection is not None:
            self._connection.resume_writing()

    @property
    def logging_in(self) -> bool:
        """The connection lives, and has not chosen an export."""
        return self._connection is not None and self._connection.session is None

    def tick(self, now_seconds: float) -> None:
        """Time passes."""
        if self._connection is not None:
            self._connection.tick(now_seconds)
        super().tick(now_seconds)

    def shut_down(self, reason: str, timeout_seconds: float) -> None:
        """Answer with the protocol's shutdown, and end at the latest after ``timeout_seconds``."""
        self._abort_in(timeout_seconds)
        if self._connection is not None:
            self._connection.shutdown(reason)

    # --- What the connection asks -----------------------------------------------------------------

    def send(self, buffers: list[Buffer]) -> None:
        """Write, in order."""
        self._transport.writelines(buffers)

    def wake(self) -> None:
        """Flush in a turn of its own."""
        assert self._connection is not None
        self._loop.call_soon(self._connection.flush_output)

    def turn(self, step: Callable[[], None]) -> None:
        """Take turns with the long steps of all connections."""
        self._listener.turns.take(step)

    def set_reading(self, wanted: bool) -> None:
        """Read, or leave what comes in the kernel."""
        if self._transport.is_closing():
            return
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def start_tls(self) -> None:
        """Without TLS the handshake refuses NBD_OPT_STARTTLS."""
        raise AssertionError("TLS is off")

    def close(self) -> None:
        """Close when everything is written, or at the latest after CLOSE_SECONDS."""
        self._abort_at_seconds = min(
            self._abort_at_seconds or float("inf"), self._loop.time() + CLOSE_SECONDS
        )
        self._transport.close()


def _address(where: object) -> Endpoint:
    """Of a socket's name."""
    return Address(*where[:2]) if isinstance(where, tuple) else UnixAddress(str(where))
