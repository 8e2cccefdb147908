"""Sessions over sockets: who is shut out, who is dead, who has to log out, LUNs and portals. Time
comes by calls of ``tick``.
"""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from daemon.control.service import ControlService
from daemon.iscsi.initiator import INITIATOR_NAME, Initiator, random_isid
from daemon.iscsi.listener import TAKEOVER_TICKS, IscsiListener
from daemon.process.addresses import Address
from daemon.targets.directory import Targets
from daemon.targets.names import TARGET_PREFIX
from daemon.tcp import admission as admission_module
from daemon.tcp.socket_listener import CLOSE_SECONDS
from protocol.control import rows
from protocol.iscsi import limits
from protocol.iscsi.errors import IscsiError
from protocol.iscsi.initiator.login import InitiatorSettings
from tests.daemon.fakes import MemoryPool, call, control_service

OTHER = "iqn.2026-01.test:other"
DISK = f"{TARGET_PREFIX}disk"


@pytest.fixture
def pool() -> MemoryPool:
    return MemoryPool(disk=1 << 20, second=1 << 20)


@pytest.fixture
def targets(pool: MemoryPool) -> Targets:
    return Targets(pool, None)


@pytest_asyncio.fixture
async def listener(targets: Targets) -> AsyncIterator[IscsiListener]:
    found = IscsiListener(targets, connections_max=200)
    await found.listen(Address("127.0.0.1", 0))
    yield found
    await found.stop(0.1)


@pytest.fixture
def service(pool: MemoryPool, targets: Targets, listener: IscsiListener) -> ControlService:
    return control_service(pool, targets, listener)


async def connect(
    listener: IscsiListener, name: str = INITIATOR_NAME, target: str = DISK
) -> Initiator:
    host, port = listener.addresses[0]
    return await Initiator.connect(
        host, port, target, InitiatorSettings(name, target, isid=random_isid())
    )


async def until_connections(listener: IscsiListener, count: int) -> None:
    while len(listener.connections) != count:
        await asyncio.sleep(0)


def now(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_who_is_shut_out_is_asked_to_log_out_and_closed_if_it_does_not(
    listener: IscsiListener, service: ControlService
) -> None:
    allowed, shut_out = await connect(listener), await connect(listener, OTHER)
    answer = await call(service, "acl.add", target="disk", initiators=[INITIATOR_NAME])
    assert answer == rows.ChangedAccessList(
        target=DISK, initiators=[INITIATOR_NAME], sessions_ended=1
    )
    with pytest.raises(IscsiError):
        await connect(listener, OTHER)
    for connection in list(listener.connections):
        connection.tick(now(limits.LOGOUT_SECONDS - 1))
    while not shut_out._connection.logout_requested:
        await asyncio.sleep(0)
    await until_connections(listener, 2)
    for connection in list(listener.connections):
        connection.tick(now(limits.LOGOUT_SECONDS + 1))
    await until_connections(listener, 1)
    assert len(await allowed.read(0, 512)) == 512
    await allowed.close()
    await shut_out.close()


async def test_a_dead_peer_is_dropped_though_its_socket_takes_nothing_any_more(
    listener: IscsiListener, pool: MemoryPool
) -> None:
    """It stops to read: what is sent at the end never goes out, and must not hold the connection
    and its vdisk.
    """
    dead = await connect(listener)
    await dead.read(0, 512)
    dead._socket.connection.pause_writing()
    transport = next(iter(listener.connections))._transport
    transport.pause_reading()  # as good as a cable that was cut
    (connection,) = listener.connections
    start = now(0)
    connection.tick(start)
    connection.tick(start + limits.KEEP_ALIVE_SECONDS)
    assert not transport.is_closing()
    transport.write(bytes(64 << 20))  # more than any socket buffer
    connection.tick(start + limits.KEEP_ALIVE_SECONDS + limits.KEEP_ALIVE_ANSWER_SECONDS)
    assert transport.is_closing()
    connection.tick(now(CLOSE_SECONDS + 1))
    await until_connections(listener, 0)
    assert pool.volumes["disk"].labels == []
    await dead.close()


async def test_a_login_that_takes_too_long_is_closed(listener: IscsiListener) -> None:
    host, port = listener.addresses[0]
    reader, writer = await asyncio.open_connection(host, port)
    await until_connections(listener, 1)
    (connection,) = listener.connections
    start = now(0)
    for seconds in (0, limits.LOGIN_SECONDS_MAX):
        connection.tick(start + seconds)
    assert len(listener.connections) == 1
    connection.tick(start + limits.LOGIN_SECONDS_MAX + 1)
    assert await reader.read() == b""
    writer.close()


async def test_a_flood_of_half_open_logins_leaves_room_for_those_who_log_in(
    listener: IscsiListener, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(admission_module, "LOGINS_PER_ADDRESS_MAX", 4)
    host, port = listener.addresses[0]
    sessions = [
        await connect(listener) for _ in range(8)
    ]  # those have logged in, and count no more
    flood = [await asyncio.open_connection(host, port) for _ in range(20)]
    await until_connections(listener, 12)
    for reader, _ in flood[4:]:
        assert await reader.read() == b""
    for _, writer in flood:
        writer.close()
    await until_connections(listener, 8)
    sessions.append(await connect(listener))
    for session in sessions:
        assert len(await session.read(0, 512)) == 512
        await session.close()
    assert capsys.readouterr().out.count("iscsi.refused") == 1


async def test_stopping_asks_for_a_logout_and_waits_for_it(listener: IscsiListener) -> None:
    session = await connect(listener)
    stopping = asyncio.get_running_loop().create_task(listener.stop(10.0))
    while not session._connection.logout_requested:
        await asyncio.sleep(0)
    assert not stopping.done()
    assert len(await session.read(0, 512)) == 512, "commands are still answered"
    await session.close()
    await stopping


async def test_a_lun_that_comes_and_goes_under_an_open_session(
    listener: IscsiListener, service: ControlService, pool: MemoryPool
) -> None:
    await call(service, "target.create", target="t")
    await call(service, "target.map", target="t", vdisk="disk")
    session = await connect(listener, target=f"{TARGET_PREFIX}t")
    await session.write(0, b"\x11" * 512)
    mapped = await call(service, "target.map", target="t", vdisk="second")
    assert (mapped.sessions, [lun.vdisk for lun in mapped.luns]) == (1, ["disk", "second"])
    assert len(pool.volumes["second"].labels) == 2
    await call(service, "target.unmap", target="t", vdisk="disk")
    assert pool.volumes["disk"].labels == []
    assert pool.volumes["disk"].data[:512] == b"\x11" * 512
    with pytest.raises(IscsiError):
        await session.read(0, 512)
    await session.close()


async def test_discovery_tells_the_portals_that_an_initiator_can_reach(
    listener: IscsiListener,
) -> None:
    listener.addresses = [
        Address("127.0.0.1", 1),
        Address("10.0.0.1", 2),
        Address("fd00::1", 3),
        Address("0.0.0.0", 4),
        Address("::", 5),
    ]
    assert listener.portals_beside("127.0.0.1:1") == ["127.0.0.1:1", "10.0.0.1:2", "[fd00::1]:3"]
    assert listener.portals_beside("[::1]:5") == [
        "[::1]:5",
        "127.0.0.1:1",
        "10.0.0.1:2",
        "[fd00::1]:3",
    ]
    assert listener.portals_beside("[fd00::1]:3") == ["[fd00::1]:3", "10.0.0.1:2"]
    assert listener.portals_beside("192.168.0.7:4") == [
        "192.168.0.7:4",
        "10.0.0.1:2",
        "[fd00::1]:3",
    ]
    listener.addresses = [
        Address("10.0.0.1", 2),
        Address("fe80::1%eth0", 3),
        Address("fe80::2%eth1", 4),
    ]
    assert listener.portals_beside("10.0.0.1:2") == [
        "10.0.0.1:2"
    ]  # what is link-local may be of another link
    assert listener.portals_beside("[fe80::1]:3") == ["[fe80::1]:3", "10.0.0.1:2", "[fe80::2]:4"]


async def test_two_portals_are_two_paths_to_one_disk(pool: MemoryPool) -> None:
    listener = IscsiListener(Targets(pool, None), connections_max=10)
    for host in ("127.0.0.1", "::1"):
        await listener.listen(Address(host, 0))
    paths = [
        await Initiator.connect(
            host, port, DISK, InitiatorSettings(INITIATOR_NAME, DISK, isid=isid)
        )
        for isid, (host, port) in enumerate(listener.addresses, 1)
    ]
    await paths[0].write(0, b"\x22" * 512)
    assert bytes(await paths[1].read(0, 512)) == b"\x22" * 512
    assert len(listener.node.units) == 1
    assert len(listener.node.sessions) == 2
    for path in paths:
        await path.close()
    await listener.stop(1.0)


async def test_hosts_that_end_each_others_sessions_are_named_once(
    pool: MemoryPool, capsys: pytest.CaptureFixture[str]
) -> None:
    listener = IscsiListener(Targets(pool, None), connections_max=200)
    for host in ("127.0.0.1", "::1"):
        await listener.listen(Address(host, 0))
    settings = InitiatorSettings(INITIATOR_NAME, DISK, isid=7)
    opened = []
    for _ in range(5):
        for host, port in listener.addresses:
            opened.append(await Initiator.connect(host, port, DISK, settings))
            opened.append(
                await Initiator.connect(host, port, DISK, settings)
            )  # a host that comes back is no news
    logged = capsys.readouterr().out
    (line,) = [line for line in logged.splitlines() if "session.taken_over" in line]
    for words in (
        "127.0.0.1 and [::1]",
        "times=1",
        INITIATOR_NAME,
        DISK,
        "ended_address=127.0.0.1:",
        "address=[::1]:",
        "initiator name of its own",
    ):
        assert words in line
    for _ in range(2 * TAKEOVER_TICKS):
        listener._takeovers.tick()
    (line,) = capsys.readouterr().out.splitlines()
    assert "times=8" in line and "127.0.0.1 and [::1]" in line
    for initiator in opened:
        initiator.abort()
    await listener.stop(0.1)
