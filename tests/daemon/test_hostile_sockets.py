"""Clients that no library would be, over real sockets: gone before they are there, slow to drain,
strangers that stay.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from typing import Self

import pytest
import pytest_asyncio

from daemon.iscsi.initiator import Initiator
from daemon.iscsi.listener import IscsiListener
from daemon.process.addresses import Address
from daemon.process.logs import REASONS_MAX, Repeats
from daemon.targets.directory import Targets
from daemon.targets.names import TARGET_PREFIX
from daemon.tcp import acceptor as acceptor_module
from daemon.tcp.admission import LOGINS_PER_ADDRESS_MAX
from protocol.iscsi import pdu
from protocol.iscsi.pdu import FINAL, HEADER_BYTES, READ, SIMPLE, WRITE, pack
from protocol.scsi import opcodes
from tests.daemon.fakes import MemoryPool
from tests.protocol.test_login import request

DISK = f"{TARGET_PREFIX}disk"
NAMES = [("InitiatorName", "iqn.2026-01.io.example:raw")]
LARGE = [
    ("MaxRecvDataSegmentLength", "262144"),
    ("FirstBurstLength", "262144"),
    ("InitialR2T", "No"),
    ("ImmediateData", "Yes"),
]
NORMAL = [*NAMES, ("TargetName", DISK), *LARGE]
DISCOVERY = [*NAMES, ("SessionType", "Discovery")]
LOGIN_CMD_SN = 5  # as `request` says


class RawClient:
    """A socket, and PDUs as they are."""

    def __init__(self, listener: IscsiListener, receive_bytes: int | None = None) -> None:
        self._at = listener.addresses[0]
        self._socket = socket.socket()
        self._socket.setblocking(False)
        if receive_bytes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._received = b""

    async def __aenter__(self) -> Self:
        await asyncio.get_running_loop().sock_connect(self._socket, tuple(self._at))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def receive(self) -> tuple[int, int, int]:
        """Opcode, flags and status of the next PDU; EOFError where the connection was closed."""
        header = await self._take(HEADER_BYTES)
        length = int.from_bytes(header[5:8], "big")
        await self._take(length + -length % 4)
        return header[0], header[1], header[3] if header[0] != pdu.LOGIN_RESPONSE else header[36]

    async def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            more = await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16)
            if not more:
                raise EOFError
            self._received += more
        taken, self._received = self._received[:size], self._received[size:]
        return taken

    async def login(self, pairs: list[tuple[str, str]], isid: int = 1) -> int:
        """The status of the login."""
        await self.send(request(pairs, lun=isid << 16))
        opcode, _, status = await self.receive()
        assert opcode == pdu.LOGIN_RESPONSE
        return status


@pytest.fixture
def pool() -> MemoryPool:
    return MemoryPool(disk=4 << 20)


@pytest_asyncio.fixture
async def listener(pool: MemoryPool) -> AsyncIterator[IscsiListener]:
    found = IscsiListener(Targets(pool, None), connections_max=1000)
    await found.listen(Address("127.0.0.1", 0))
    yield found
    await found.stop(0.1)


async def serves(listener: IscsiListener) -> None:
    """A client is served as ever."""
    host, port = listener.addresses[0]
    async with await Initiator.connect(host, port, DISK) as initiator:
        assert len(await initiator.read(0, 512)) == 512


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_clients_that_reset_at_once_leave_nothing_behind(
    listener: IscsiListener, caplog: pytest.LogCaptureFixture
) -> None:
    await serves(listener)
    before = descriptors()
    for _ in range(acceptor_module.BACKLOG // 16):
        gone = socket.create_connection(listener.addresses[0])
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.close()
    await serves(listener)  # which came after them
    assert descriptors() == before and not caplog.records


def mixed_commands(count: int) -> bytes:
    """Reads of 1 MiB, and then writes of 256 KiB with their data."""
    out = []
    for number in range(2 * count):
        reading = number < count
        sectors, flags = (2048, READ) if reading else (512, WRITE)
        expected, data = sectors * 512, b"" if reading else bytes(sectors * 512)
        cdb = struct.pack(
            ">BBIBHB6x", opcodes.READ_10 if reading else opcodes.WRITE_10, 0, 0, 0, sectors, 0
        )
        words = (expected, LOGIN_CMD_SN + 1 + number, 0, *struct.unpack(">4I", cdb))
        out.append(
            pack(
                pdu.SCSI_COMMAND,
                FINAL | SIMPLE | flags,
                100 + number,
                length=len(data),
                words=words,
            )
            + data
        )
    return b"".join(out)


async def test_a_client_with_mixed_commands_that_drains_slowly_gets_all_its_answers(
    listener: IscsiListener,
) -> None:
    async with RawClient(listener, receive_bytes=1 << 16) as client:
        assert await client.login(NORMAL) == 0
        await client.send(
            pack(pdu.SCSI_COMMAND, FINAL | SIMPLE, 1, words=(0, LOGIN_CMD_SN, 0, 0, 0, 0, 0))
        )
        assert (await client.receive())[0] == pdu.SCSI_RESPONSE  # the power-on attention
        sending = asyncio.create_task(client.send(mixed_commands(40)))
        await asyncio.sleep(0.05)  # meanwhile it reads nothing
        ended = 0
        while ended < 80:
            opcode, flags, status = await client.receive()
            ended += opcode == pdu.SCSI_RESPONSE or bool(flags & pdu.STATUS_PRESENT)
            assert status == 0
            await asyncio.sleep(0)
        await sending


async def test_discovery_sessions_of_a_stranger_leave_room_for_others(
    listener: IscsiListener,
) -> None:
    async with contextlib.AsyncExitStack() as strangers:
        for number in range(LOGINS_PER_ADDRESS_MAX):
            stranger = await strangers.enter_async_context(RawClient(listener))
            assert await stranger.login(DISCOVERY, isid=number + 1) == 0
        async with RawClient(listener) as one_more:
            with pytest.raises((EOFError, ConnectionResetError)):
                await one_more.login(DISCOVERY)
    while listener.connections:
        await asyncio.sleep(0)
    await serves(listener)


async def test_a_login_that_fails_and_a_session_that_is_dropped_are_logged(
    listener: IscsiListener, capsys: pytest.CaptureFixture[str]
) -> None:
    async with RawClient(listener) as client:
        assert await client.login([*NAMES, ("TargetName", f"{TARGET_PREFIX}none")]) != 0
        with pytest.raises(EOFError):
            await client.receive()
    line = next(line for line in capsys.readouterr().out.splitlines() if "iscsi.failed" in line)
    assert NAMES[0][1] in line and "127.0.0.1:" in line
    async with RawClient(listener) as client:
        assert await client.login(NORMAL) == 0
        await client.send(pack(pdu.LOGIN_REQUEST | pdu.IMMEDIATE, FINAL, 1))
        with pytest.raises(EOFError):
            await client.receive()
    assert "a login request in the full feature phase" in capsys.readouterr().out
    await serves(listener)
    assert "iscsi.failed" not in capsys.readouterr().out  # what ends in order


def test_reasons_that_a_stranger_makes_up_do_not_fill_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    repeats = Repeats("iscsi.failed")
    for number in range(1000):
        repeats.log(f"CmdSN {number}", peer="10.0.0.1:1")
    assert len(capsys.readouterr().out.splitlines()) == REASONS_MAX + 1
    repeats.tick()
    (line,) = capsys.readouterr().out.splitlines()
    assert str(1000 - REASONS_MAX - 1) in line
