"""Taking connections off the listening sockets: one a turn, at a pace, whatever happens to them
meanwhile.
"""

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from daemon.process.addresses import Address
from daemon.tcp import acceptor as acceptor_module
from daemon.tcp.acceptor import Acceptor
from daemon.tcp.admission import Admission


class Endpoint(asyncio.BufferedProtocol):
    """Counts itself and closes."""

    def __init__(self, made: list["Endpoint"]) -> None:
        self._made = made
        self.transport: asyncio.BaseTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._made.append(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(bytearray(64))

    def buffer_updated(self, nbytes: int) -> None:
        pass


@pytest.fixture
def made() -> list[Endpoint]:
    return []


@pytest.fixture
def admission() -> Admission:
    return Admission("iscsi", 1000)


@pytest_asyncio.fixture
async def acceptor(admission: Admission, made: list[Endpoint]) -> AsyncIterator[Acceptor]:
    found = Acceptor(admission, lambda: Endpoint(made))
    yield found
    found.close()
    await found.opened()
    for endpoint in made:
        endpoint.transport.close()
    await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def connected(address: Address, count: int) -> list[socket.socket]:
    """Clients whose connections the kernel has made; nobody need have taken them."""
    return [socket.create_connection(address) for _ in range(count)]


def end(clients: list[socket.socket]) -> None:
    for client in clients:
        client.close()


async def test_one_connection_is_taken_in_each_turn(
    acceptor: Acceptor, made: list[Endpoint], admission: Admission
) -> None:
    (address,) = await acceptor.listen(Address("127.0.0.1", 0))
    clients = connected(address, 10)
    before, seen = admission._credit, []
    while len(made) < 10:
        await asyncio.sleep(0)
        seen.append(before - admission._credit)
    assert max(after - earlier for earlier, after in zip([0.0, *seen], seen, strict=False)) <= 1.0
    end(clients)


async def test_a_flood_waits_in_the_backlog(
    acceptor: Acceptor, made: list[Endpoint], admission: Admission
) -> None:
    addresses = await acceptor.listen(Address("127.0.0.1", 0)) + await acceptor.listen(
        Address("127.0.0.1", 0)
    )
    admission._pace = 1e-3  # a connection in a quarter of an hour
    admission._credit = 3.0
    admission._seen_seconds = asyncio.get_running_loop().time()
    clients = [client for address in addresses for client in connected(address, 5)]
    await until(lambda: len(made) == 3)
    assert acceptor._resume is not None
    (late,) = await acceptor.listen(Address("127.0.0.1", 0))
    clients += connected(late, 1)
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert len(made) == 3
    admission._credit = 100.0
    acceptor._resume.cancel()
    acceptor._go_on()
    await until(lambda: len(made) == 11)
    end(clients)


async def test_the_pace_goes_on_by_itself(
    acceptor: Acceptor, made: list[Endpoint], admission: Admission
) -> None:
    (address,) = await acceptor.listen(Address("127.0.0.1", 0))
    admission._credit, admission._seen_seconds = 0.0, asyncio.get_running_loop().time()
    clients = connected(address, 3)
    await until(lambda: len(made) == 3)
    end(clients)


@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_who_went_away_in_the_backlog_costs_little(
    acceptor: Acceptor, made: list[Endpoint], admission: Admission, how: str
) -> None:
    (address,) = await acceptor.listen(Address("127.0.0.1", 0))
    gone = connected(address, 20)
    for client in gone:
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    clients = connected(address, 1)
    clients[0].sendall(b"first bytes")
    admission._pace, admission._credit, admission._seen_seconds = (
        1e-3,
        3.5,
        asyncio.get_running_loop().time(),
    )
    await until(lambda: len(made) == 1)
    assert admission._credit == pytest.approx(0.5, abs=0.01)
    end(clients)


async def test_who_is_refused_is_closed(
    made: list[Endpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    acceptor = Acceptor(Admission("iscsi", 0), lambda: Endpoint(made))
    (address,) = await acceptor.listen(Address("127.0.0.1", 0))
    reader, writer = await asyncio.open_connection(*address)
    assert await reader.read() == b"" and not made
    writer.close()
    acceptor.close()
    assert "iscsi.connections_max 0" in capsys.readouterr().out


async def test_without_file_descriptors_it_tries_again_later(
    acceptor: Acceptor,
    made: list[Endpoint],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(acceptor_module, "EXHAUSTED_SECONDS", 0.001)
    (address,) = await acceptor.listen(Address("127.0.0.1", 0))
    accept, failures = (
        socket.socket.accept,
        [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ECONNABORTED, "gone")],
    )

    def scarce(listening: socket.socket) -> object:
        if failures:
            raise failures.pop(0)
        return accept(listening)

    monkeypatch.setattr(socket.socket, "accept", scarce)
    clients = connected(address, 1)
    await until(lambda: len(made) == 1)
    assert not failures and capsys.readouterr().out.count("iscsi.accept_failed") == 1
    end(clients)


@pytest.mark.logs("connection_made")
async def test_a_connection_whose_making_fails_is_waited_for_by_nobody(
    acceptor: Acceptor, made: list[Endpoint]
) -> None:
    def failing(self: Endpoint, transport: asyncio.BaseTransport) -> None:
        made.append(self)
        self.transport = transport
        raise OSError(errno.ENOTCONN, "gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Endpoint, "connection_made", failing)
        (address,) = await acceptor.listen(Address("127.0.0.1", 0))
        clients = connected(address, 1)
        await until(lambda: len(made) == 1)
        await acceptor.opened()
    end(clients)


async def test_a_name_that_stands_for_a_taken_address_is_listened_on_nowhere(
    acceptor: Acceptor,
) -> None:
    (address,) = await acceptor.listen(Address("127.0.0.1", 0))
    with pytest.raises(OSError, match="in use"):
        await acceptor.listen(address)
    assert len(acceptor._listening) == 1


async def test_closing_while_it_waits(admission: Admission, made: list[Endpoint]) -> None:
    acceptor = Acceptor(admission, lambda: Endpoint(made))
    (address,) = await acceptor.listen(Address("127.0.0.1", 0))
    admission._pace, admission._credit, admission._seen_seconds = (
        1e-3,
        0.0,
        asyncio.get_running_loop().time(),
    )
    clients = connected(address, 1)
    await until(lambda: acceptor._resume is not None)
    acceptor.close()
    end(clients)
    with pytest.raises(ConnectionRefusedError):
        connected(address, 1)
    assert not made
