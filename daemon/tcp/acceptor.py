"""Takes connections off the listening sockets, one in each turn of the event loop, and no faster
than `Admission` allows.

A server of the event loop's own would take all that wait in one turn, each with a transport:
sessions that are open would wait for as long. What is not taken yet waits in the kernel's backlog,
and costs nothing.
"""

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Final

from daemon.process import unix_sockets
from daemon.process.addresses import Address, UnixAddress
from daemon.process.logs import get_log
from daemon.tcp.admission import Admission

# The last of so many waits for 6 s at the slowest pace: an initiator gives a login 15 s.
BACKLOG: Final = 256
# Where this process or the machine has no more file descriptors: until some are closed.
EXHAUSTED_SECONDS: Final = 1.0
_EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


class Acceptor:
    """Invariant: every socket of ``_listening`` is watched by the event loop, unless ``_resume`` is
    set: then none is.
    """

    def __init__(
        self, admission: Admission, protocol: Callable[[], asyncio.BufferedProtocol]
    ) -> None:
        self._admission = admission
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._listening: list[socket.socket] = []
        self._paths: dict[str, tuple[int, int]] = {}
        self._resume: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[object]] = set()

    async def listen(self, address: Address) -> list[Address]:
        """Listen on every address that the host name stands for; those, with their real ports.
        Raises OSError, and listens on none then.
        """
        bound: list[socket.socket] = []
        try:
            for family, where in await self._resolved(address):
                bound.append(_bound(family, where))
        except OSError:
            for listening in bound:
                listening.close()
            raise
        self._add(bound)
        return [_address(listening) for listening in bound]

    def listen_unix(self, address: UnixAddress) -> None:
        """Listen on a Unix socket, as the control socket's permissions are. Raises UnixPathBusy,
        OSError.
        """
        listening = unix_sockets.bind(address.path, f"{self._admission.protocol}.listen", "--nbd")
        self._paths[address.path] = unix_sockets.identity(address.path)
        listening.listen(BACKLOG)
        listening.setblocking(False)
        self._add([listening])

    def _add(self, bound: list[socket.socket]) -> None:
        self._listening += bound
        if self._resume is None:
            self._watch(bound)

    async def _resolved(self, address: Address) -> list[tuple[int, object]]:
        """Families and socket addresses. Raises OSError."""
        host, _, interface = address.host.partition("%")
        if interface:  # uvloop's getaddrinfo loses it
            return [(socket.AF_INET6, (host, address.port, 0, _index(interface)))]
        found = await self._loop.getaddrinfo(
            host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return list(dict.fromkeys((family, where) for family, _, _, _, where in found))

    def close(self) -> None:
        """Take no more."""
        if self._resume is None:
            self._unwatch()
        else:
            self._resume.cancel()
            self._resume = None
        for listening in self._listening:
            listening.close()
        self._listening.clear()
        for path, bound in self._paths.items():
            unix_sockets.remove(path, bound)
        self._paths.clear()

    async def opened(self) -> None:
        """Wait until everything that was taken is a connection, or has ended."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _watch(self, sockets: list[socket.socket]) -> None:
        for listening in sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def _unwatch(self) -> None:
        for listening in self._listening:
            self._loop.remove_reader(listening)

    def _pause(self, seconds: float) -> None:
        self._unwatch()
        self._resume = self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._resume = None
        self._watch(self._listening)

    def _accept(self, listening: socket.socket) -> None:
        wait_seconds = self._admission.wait_seconds(self._loop.time())
        if wait_seconds:
            self._pause(wait_seconds)
            return
        try:
            taken, where = listening.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                get_log().error(f"{self._admission.protocol}.accept_failed", reason=error.strerror)
                self._pause(EXHAUSTED_SECONDS)
            return  # or the client went away before its turn
        # Clients of a Unix socket have no address of their own: they share its path's.
        host, peer = (
            (where[0], str(Address(*where[:2])))
            if isinstance(where, tuple)
            else (listening.getsockname(), listening.getsockname())
        )
        if _gone(taken):
            # A client that connects only to go away keeps others waiting little longer.
            self._admission.spend(taken=False)
            taken.close()
            return
        reason = self._admission.refusal(host)
        self._admission.spend(taken=reason is None)
        if reason is not None:
            self._admission.refused(peer, reason)
            taken.close()
            return
        opening = self._loop.create_task(self._open(taken))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    async def _open(self, taken: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, taken)
        except OSError:
            taken.close()  # the client went away


def _index(interface: str) -> int:
    """By name or number. Raises OSError."""
    try:
        return int(interface) if interface.isdecimal() else socket.if_nametoindex(interface)
    except OSError:
        raise OSError(errno.ENODEV, f"there is no network interface {interface}") from None


def _address(listening: socket.socket) -> Address:
    """Where it listens: getsockname tells the interface of a link-local address by its number,
    apart from the host.
    """
    host, port, *more = listening.getsockname()
    return Address(f"{host}%{socket.if_indextoname(more[1])}" if more and more[1] else host, port)


def _gone(taken: socket.socket) -> bool:
    """Whether the client has closed or reset the connection before its turn came."""
    taken.setblocking(False)
    try:
        return taken.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False  # it is there, and has not said anything yet
    except OSError:
        return True


def _bound(family: int, where: object) -> socket.socket:
    """A listening socket. Raises OSError."""
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(where)  # type: ignore[arg-type]  # as getaddrinfo gave it
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening
