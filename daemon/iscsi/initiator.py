"""An asyncio iSCSI client: one session with LUN 0 of a target, over the sans-IO
`InitiatorConnection`.

`make demo` and the tests drive the daemon with it. Each call makes a Future, so it is no way to
measure the daemon's limits.
"""

import asyncio
import secrets
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, cast

from protocol.iscsi.errors import IscsiError
from protocol.iscsi.initiator.cdbs import parse_capacity
from protocol.iscsi.initiator.connection import InitiatorConnection
from protocol.iscsi.initiator.login import InitiatorSettings
from protocol.iscsi.initiator.task import CommandDone, CommandFailed
from protocol.volume import Buffer

INITIATOR_NAME: Final = "iqn.2026-01.io.cleaved:initiator"
LUN: Final = 0
# The demo's writes of 1 MiB leave in a few pieces; more unsent than this is queued in the
# connection instead.
WRITE_HIGH_BYTES: Final = 4 << 20
LOGOUT_SECONDS_MAX: Final = 10.0
UNIT_ATTENTION: Final = 0x6  # sense key, SPC-4 table 48
UNIT_ATTENTIONS_MAX: Final = 8  # more in a row than a target queues: something else is wrong


class _Socket(asyncio.BufferedProtocol):
    """Moves the connection's bytes."""

    def __init__(self, settings: InitiatorSettings, logged_in: "asyncio.Future[None]") -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self._logged_in = logged_in
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.connection: InitiatorConnection
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)  # uvloop's is one by shape, not by class
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_write_buffer_limits(WRITE_HIGH_BYTES)
        self._transport = transport
        self.connection = InitiatorConnection(
            self._settings, transport.writelines, self._wake, transport.close, self._login_ended
        )
        self.connection.start()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.connection.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        self.connection.buffer_updated(nbytes)

    def pause_writing(self) -> None:
        self.connection.pause_writing()

    def resume_writing(self) -> None:
        self.connection.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connection.connection_lost()
        if not self.closed.done():
            self.closed.set_result(None)

    def abort(self) -> None:
        self._transport.abort()

    def _wake(self) -> None:
        self._loop.call_soon(self.connection.flush_output)

    def _login_ended(self, error: IscsiError | None) -> None:
        _settle(self._logged_in, error)


class Initiator:
    """A logged-in session. Offsets and lengths are bytes, multiples of 512. Use it as an
    asynchronous context.
    """

    def __init__(self, socket_protocol: _Socket) -> None:
        self._socket = socket_protocol
        self._connection = socket_protocol.connection

    @classmethod
    async def connect(
        cls, host: str, port: int, target_name: str, settings: InitiatorSettings | None = None
    ) -> Self:
        """Log in. Raises OSError, and IscsiError when the target refuses."""
        loop = asyncio.get_running_loop()
        logged_in = loop.create_future()
        settings = settings or InitiatorSettings(INITIATOR_NAME, target_name, isid=random_isid())
        transport, protocol = await loop.create_connection(
            lambda: _Socket(settings, logged_in), host, port
        )
        try:
            await logged_in
        except BaseException:
            transport.close()
            raise
        return cls(protocol)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Log out and close. Again, or after the target went: no effect."""
        if self._socket.closed.done():
            return
        self._connection.logout(lambda _: None)
        await asyncio.wait_for(self._socket.closed, LOGOUT_SECONDS_MAX)

    def abort(self) -> None:
        """Cut the connection, as a failing network does."""
        self._socket.abort()

    async def read(self, offset_bytes: int, length_bytes: int) -> Buffer:
        """Read a range. Raises CommandFailed with the sense, ConnectionEnded."""
        return await self._command(
            lambda done: self._connection.submit_read(LUN, offset_bytes, length_bytes, done)
        )

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        """Write a range; with ``fua`` it is durable on return. Raises CommandFailed,
        ConnectionEnded.
        """
        await self._command(
            lambda done: self._connection.submit_write(LUN, offset_bytes, data, done, fua)
        )

    async def flush(self) -> None:
        """Make durable what was written before. Raises CommandFailed, ConnectionEnded."""
        await self._command(lambda done: self._connection.submit_flush(LUN, done))

    async def unmap(self, offset_bytes: int, length_bytes: int) -> None:
        """Deallocate a range. Raises CommandFailed, ConnectionEnded."""
        await self._command(
            lambda done: self._connection.submit_unmap(LUN, [(offset_bytes, length_bytes)], done)
        )

    async def write_zeros(self, offset_bytes: int, length_bytes: int) -> None:
        """Write zeros without sending any. Raises CommandFailed, ConnectionEnded."""
        await self._command(
            lambda done: self._connection.submit_write_zeros(LUN, offset_bytes, length_bytes, done)
        )

    async def capacity_bytes(self) -> int:
        """Size of the disk. Raises CommandFailed, ConnectionEnded."""
        return parse_capacity(
            bytes(await self._command(lambda done: self._connection.submit_capacity(LUN, done)))
        )

    async def _command(self, submit: Callable[[CommandDone], object]) -> Buffer:
        """Carry out a command; a unit attention was only told by it, so it is sent again (SAM-5
        5.14).
        """
        for _ in range(UNIT_ATTENTIONS_MAX):
            try:
                return await self._once(submit)
            except CommandFailed as error:
                if error.key != UNIT_ATTENTION:
                    raise
        return await self._once(submit)

    async def _once(self, submit: Callable[[CommandDone], object]) -> Buffer:
        ended: asyncio.Future[Buffer] = asyncio.get_running_loop().create_future()

        def done(data: Buffer | None, error: IscsiError | None) -> None:
            _settle(ended, error, data)

        submit(done)
        return await ended


def random_isid() -> int:
    """An ISID of its own for each session (RFC 7143 11.12.5, random type), so that none reinstates
    another.
    """
    return 0x80 << 40 | secrets.randbits(40)


def _settle(
    future: "asyncio.Future[Buffer] | asyncio.Future[None]",
    error: IscsiError | None,
    value: Buffer | None = None,
) -> None:
    if future.done():  # cancelled: nobody waits any more
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)  # type: ignore[arg-type]
