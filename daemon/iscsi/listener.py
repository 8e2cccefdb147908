"""iSCSI over TCP: listeners, and one BufferedProtocol a connection around the sans-IO
`TargetConnection`.

Hot path (design section 3): the event loop receives into the connection's own buffer, and what one
wake-up answered leaves in one ``writelines``. Nothing here makes a Task or a Future per command.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Final, cast
from uuid import UUID

from daemon.process import runtime
from daemon.process.addresses import WILDCARDS, Address, is_link_local, is_loopback
from daemon.process.logs import Repeats
from daemon.tcp.socket_listener import (
    CLOSE_SECONDS,
    WRITE_HIGH_BYTES,
    WRITE_LOW_BYTES,
    ServedSocket,
    SocketListener,
)
from protocol.iscsi import limits
from protocol.iscsi.connection import TargetConnection
from protocol.iscsi.node import SessionView, TargetDirectory, TargetNode
from protocol.scsi.kept_state import StateKeeper
from protocol.scsi.limits import PHYSICAL_BLOCK_EXPONENT
from protocol.turns import Turns
from protocol.volume import BlockVolume, Buffer

# Two hosts with one name log in a hundred times a second and more: after the first time the log
# says once in so many ticks how often.
TAKEOVER_TICKS: Final = 60
# Ended connections whose memory may wait for a quiet second: half a megabyte each.
ENDED_MAX: Final = 200


class IscsiListener(SocketListener["IscsiProtocol", Address]):
    """All iSCSI listeners and connections of the daemon. Satisfies `daemon.tcp.listener.Listener`.

    ``advertise``: addresses that initiators are told instead of the local ones; ``collect`` is
    called when sessions have ended and nobody is served.
    """

    protocol = "iscsi"

    def __init__(
        self,
        directory: TargetDirectory,
        connections_max: int,
        keeper: StateKeeper | None = None,
        physical_block_exponent: int = PHYSICAL_BLOCK_EXPONENT,
        advertise: Sequence[Address] = (),
        full: str | None = None,
        collect: Callable[[], None] = runtime.collect_old,
    ) -> None:
        self.node = TargetNode(
            directory,
            portals=self.portals_beside,
            keeper=keeper,
            physical_block_exponent=physical_block_exponent,
            taken_over=self._session_taken_over,
            turns=Turns(asyncio.get_running_loop().call_soon),
        )
        super().__init__(connections_max, full)
        self._advertise = advertise
        self._collect = collect
        self._takeovers = Repeats("session.taken_over", TAKEOVER_TICKS)
        self._ended = 0
        self._commands_seen = -1

    def _make(self) -> "IscsiProtocol":
        return IscsiProtocol(self)

    async def _bind(self, address: Address) -> list[Address]:
        return await self._acceptor.listen(address)

    def _shut_down(self, connection: "IscsiProtocol", timeout_seconds: float) -> None:
        connection.shut_down(timeout_seconds)

    def portals(self) -> list[str]:
        """Addresses as clients should name them: those that are configured to be told; for a
        wildcard, this machine's name.
        """
        listening = [
            Address(socket.gethostname(), at.port) if at.host in WILDCARDS else at
            for at in self.addresses
        ]
        return [str(at) for at in self._advertise or listening]

    def portals_beside(self, portal: str) -> list[str]:
        """What to tell an initiator that came by ``portal``: that one first, then the others that
        it can be expected to reach.

        Wildcards are no addresses; an initiator from outside cannot reach loopback, and one that
        came by no link-local address may be on another link. Where addresses are configured to be
        told, only those are: behind NAT none of the others is of use.
        """
        if self._advertise:
            return [str(at) for at in self._advertise]
        host = portal.rpartition(":")[0].strip("[]")
        local, on_link = is_loopback(host), is_loopback(host) or is_link_local(host)
        others = [
            at.unscoped
            for at in self.addresses
            if at.host not in WILDCARDS
            and (local or not is_loopback(at.host))
            and (on_link or not is_link_local(at.host))
        ]
        return list(dict.fromkeys([portal, *map(str, others)]))

    # --- What initiators are told -----------------------------------------------------------------

    def space_low(self) -> None:
        """Tell every session by a unit attention: the soft threshold is reached."""
        self.node.soft_threshold_reached()

    def volume_resized(self, volume: BlockVolume) -> None:
        """Tell every session of it."""
        self.node.volume_resized(volume)

    def volume_deleted(self, uuid: UUID) -> None:
        """Nobody can use it any more."""
        self.node.volume_deleted(uuid)

    def lun_mapped(self, target_name: str, lun: int, volume: BlockVolume) -> None:
        """Tell every session of the target."""
        self.node.lun_mapped(target_name, lun, volume)

    def lun_unmapped(self, target_name: str, lun: int, volume: BlockVolume) -> None:
        """Tell every session of the target."""
        self.node.lun_unmapped(target_name, lun, volume)

    def end_sessions(self, sessions: list[SessionView]) -> None:
        """Ask their initiators to log out, and close those that have not after
        `limits.LOGOUT_SECONDS`.
        """
        for connection in list(self.connections):
            if connection.session in sessions:
                connection.shut_down(limits.LOGOUT_SECONDS)

    # --- Life -------------------------------------------------------------------------------------

    def ended(self, connection: "IscsiProtocol", ended: TargetConnection) -> None:
        """A connection has ended."""
        if ended.failure is not None:
            self._failures.log(
                ended.failure,
                peer=ended.peer_address,
                initiator=ended.initiator_name,
                target=ended.target_name,
            )
        self._ended += 1
        self.removed(connection)

    def _session_taken_over(self, older: SessionView, newer: SessionView) -> None:
        """A host that comes back ends its old session (RFC 7143 6.3.5). Another one should not."""
        hosts = sorted({session.peer_address.rpartition(":")[0] for session in (older, newer)})
        if len(hosts) > 1:
            self._takeovers.log(
                f"{' and '.join(hosts)} log in by one initiator name and ISID, so that each login"
                " ends the other's session; if they are two hosts, give each an initiator name of"
                " its own (Linux: /etc/iscsi/initiatorname.iscsi)",
                initiator=newer.initiator_name,
                target=newer.target_name,
                address=newer.peer_address,
                ended_address=older.peer_address,
            )

    def _tick(self) -> None:
        super()._tick()
        self._takeovers.tick()
        if self._ended:
            self._collect_ended()

    def _collect_ended(self) -> None:
        """Sessions that have ended are rings of references, with their buffers: collect them once
        nobody is served for a tick.
        """
        commands = sum(connection.commands for connection in self.connections)
        if commands == self._commands_seen or self._ended >= ENDED_MAX:
            self._ended, commands = 0, -1
            self._collect()
        self._commands_seen = commands


class IscsiProtocol(ServedSocket):
    """One TCP connection. `TargetConnection` decides everything; this moves its bytes."""

    def __init__(self, listener: IscsiListener) -> None:
        super().__init__()
        self._listener = listener
        self._connection: TargetConnection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        transport = cast("asyncio.Transport", transport)  # uvloop's is one by shape, not by class
        self._transport = transport
        where = transport.get_extra_info("peername")
        if where is None:
            transport.abort()  # the client has gone again: a check of a load balancer, a scanner
            return
        peer = Address(*where[:2])
        self.host = peer.host
        if self._listener.admission.refusal(peer.host) is not None:
            transport.abort()  # others, taken in the same turn, were faster
            return
        # Replies are small and whole: waiting to join them with later ones would only cost latency.
        # The sizes of the kernel's buffers are left alone: they grow by themselves, and setting
        # them would end that, at a lower limit.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_write_buffer_limits(WRITE_HIGH_BYTES, WRITE_LOW_BYTES)
        portal = transport.get_extra_info("sockname")
        local = str(Address(*portal[:2]).unscoped)
        connection = TargetConnection(
            self._listener.node, self._send, self._wake, self._close, local, str(peer)
        )
        self._connection = connection
        self._listener.added(self)
        # From now on the event loop calls the connection itself, one layer less for each wake-up:
        # it looks both methods up once, when a protocol is set.
        self.get_buffer = connection.get_buffer  # type: ignore[method-assign]
        self.buffer_updated = connection.buffer_updated  # type: ignore[method-assign]
        transport.set_protocol(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended, by either side."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.connection_lost()
            self._listener.ended(self, connection)
            # What refers to each other in a ring would keep its buffers until a garbage collection,
            # and those are rare here.
            del self.get_buffer, self.buffer_updated

    def pause_writing(self) -> None:
        """The client does not drain: take no more commands of it."""
        self._transport.pause_reading()
        if self._connection is not None:
            self._connection.pause_writing()

    def resume_writing(self) -> None:
        """The client drains again."""
        connection = self._connection
        if connection is not None:
            connection.resume_writing()
        # What went on by that may have filled the buffer again: then `pause_writing` was called
        # within, and nothing may be read.
        if not (self._transport.is_closing() or (connection is not None and connection.paused)):
            self._transport.resume_reading()

    @property
    def session(self) -> SessionView | None:
        """What the directory of targets knows it by."""
        return self._connection

    @property
    def logging_in(self) -> bool:
        """The connection lives, and is no normal session: anybody may discover, so a discovery
        session counts as a login does.
        """
        connection = self._connection
        return connection is not None and (connection.discovery or not connection.logged_in)

    def tick(self, now_seconds: float) -> None:
        """Time passes."""
        if self._connection is not None:
            self._connection.tick(now_seconds)
        super().tick(now_seconds)

    @property
    def commands(self) -> int:
        """Commands carried out so far."""
        found = self._connection.describe()["commands"] if self._connection is not None else 0
        assert isinstance(found, int)
        return found

    def shut_down(self, timeout_seconds: float) -> None:
        """Ask the initiator to log out, and close when it has; at the latest after
        ``timeout_seconds``.
        """
        self._abort_in(timeout_seconds)
        if self._connection is not None:
            self._connection.shutdown(int(timeout_seconds))

    def _close(self) -> None:
        self._abort_in(CLOSE_SECONDS)
        self._transport.close()

    def _send(self, output: list[Buffer]) -> None:
        self._transport.writelines(output)

    def _wake(self) -> None:
        assert self._connection is not None
        self._loop.call_soon(self._connection.flush_output)
