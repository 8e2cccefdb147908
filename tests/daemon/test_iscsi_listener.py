"""The iSCSI listener with sockets, over volumes in memory."""

import asyncio
import itertools
import os
import socket
from collections.abc import AsyncIterator
from ipaddress import IPv6Address
from pathlib import Path

import pytest
import pytest_asyncio

from daemon.iscsi import listener as iscsi_listener
from daemon.iscsi.initiator import Initiator
from daemon.iscsi.listener import IscsiListener
from daemon.process.addresses import Address
from daemon.targets.directory import Targets
from daemon.targets.names import TARGET_PREFIX
from daemon.tcp import socket_listener
from daemon.tcp.listener import ListenFailed
from tests.daemon.fakes import MemoryPool
from tests.daemon.programs import run, succeed

DISK_BYTES = 4 << 20


@pytest.fixture
def pool() -> MemoryPool:
    return MemoryPool(disk=DISK_BYTES, other=DISK_BYTES)


@pytest_asyncio.fixture
async def listener(pool: MemoryPool) -> AsyncIterator[IscsiListener]:
    found = IscsiListener(Targets(pool, None), connections_max=3)
    await found.listen(Address("127.0.0.1", 0))
    yield found
    await found.stop(0.1)


async def connect(listener: IscsiListener) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = listener.addresses[0]
    return await asyncio.open_connection(address.host, address.port)


async def test_the_real_port_is_told(listener: IscsiListener) -> None:
    (address,) = listener.addresses
    assert address.port > 0
    assert listener.portals() == [f"127.0.0.1:{address.port}"]


async def test_an_address_in_use_or_unknown_is_named(listener: IscsiListener) -> None:
    with pytest.raises(ListenFailed, match=str(listener.addresses[0])):
        await listener.listen(listener.addresses[0])
    with pytest.raises(ListenFailed, match=r"203\.0\.113\.1"):
        await listener.listen(Address("203.0.113.1", 0))


async def test_ipv6(pool: MemoryPool) -> None:
    listener = IscsiListener(Targets(pool, None), connections_max=3)
    await listener.listen(Address("::1", 0))
    assert listener.portals()[0].startswith("[::1]:")
    await listener.stop(0.1)


def link_local_addresses() -> list[str]:
    """Those of this machine, with their interfaces (proc(5): address, index, prefix length, scope,
    flags, name).
    """
    rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    return [f"{IPv6Address(bytes.fromhex(row[0]))}%{row[5]}" for row in rows if row[3] == "20"]


async def test_link_local_addresses_are_listened_on(pool: MemoryPool) -> None:
    """uvloop's getaddrinfo drops the interface, and without it such an address cannot be bound."""
    listener = IscsiListener(Targets(pool, None), connections_max=3)
    lo = socket.if_nametoindex("lo")
    for interface in ("lo", str(lo)):
        resolved = await listener._acceptor._resolved(Address(f"fe80::1%{interface}", 3260))
        assert resolved == [(socket.AF_INET6, ("fe80::1", 3260, 0, lo))]
    for host in [*link_local_addresses(), "::1%lo"]:
        await listener.listen(Address(host, 0))
        address = listener.addresses[-1]
        assert address.unscoped.host == host.partition("%")[0] and address.port
        where = (
            address.unscoped.host,
            address.port,
            0,
            socket.if_nametoindex(host.partition("%")[2]),
        )
        with socket.socket(socket.AF_INET6) as client:
            client.connect(where)  # the kernel answers
    with pytest.raises(ListenFailed, match="no network interface none7"):
        await listener.listen(Address("fe80::1%none7", 0))
    await listener.stop(0.1)


async def test_what_is_advertised_is_told_instead_of_local_addresses(pool: MemoryPool) -> None:
    outside = [Address("203.0.113.5", 3260), Address("2001:db8::5", 3261)]
    listener = IscsiListener(Targets(pool, None), connections_max=3, advertise=outside)
    await listener.listen(Address("127.0.0.1", 0))
    assert listener.portals() == ["203.0.113.5:3260", "[2001:db8::5]:3261"]
    assert listener.node.portals(str(listener.addresses[0])) == listener.portals()
    await listener.stop(1)


async def test_connections_above_the_limit_are_closed(listener: IscsiListener) -> None:
    held = [await connect(listener) for _ in range(3)]
    while len(listener.connections) < 3:
        await asyncio.sleep(0)
    reader, writer = await connect(listener)
    assert await reader.read() == b""
    writer.close()
    held[0][1].close()
    while len(listener.connections) == 3:
        await asyncio.sleep(0)
    held[0] = await connect(listener)
    while len(listener.connections) < 3:
        await asyncio.sleep(0)
    for _, open_writer in held:
        open_writer.close()
        await open_writer.wait_closed()


async def test_bytes_that_are_no_pdu_close_that_connection_alone(listener: IscsiListener) -> None:
    _, good = await connect(listener)
    reader, bad = await connect(listener)
    bad.write(os.urandom(4096))
    assert await reader.read() == b""
    assert len(listener.connections) == 1
    for writer in (good, bad):
        writer.close()
        await writer.wait_closed()


async def test_stopping_closes_connections_that_never_logged_in(pool: MemoryPool) -> None:
    listener = IscsiListener(Targets(pool, None), connections_max=3)
    await listener.listen(Address("127.0.0.1", 0))
    reader, writer = await connect(listener)
    while not listener.connections:
        await asyncio.sleep(0)
    await listener.stop(10)
    assert await reader.read() == b""
    with pytest.raises(ConnectionRefusedError):
        await connect(listener)
    writer.close()


async def test_ended_connections_are_collected_when_nobody_is_served(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket_listener, "TICK_SECONDS", 0.001)
    collected = asyncio.Event()
    listener = IscsiListener(Targets(pool, None), 3, collect=collected.set)
    await listener.listen(Address("127.0.0.1", 0))
    host, port = listener.addresses[0]
    async with await Initiator.connect(host, port, f"{TARGET_PREFIX}disk") as busy:
        (await Initiator.connect(host, port, f"{TARGET_PREFIX}other")).abort()
        while not collected.is_set():
            if len(listener.connections) == 1:
                await asyncio.sleep(0.01)  # several ticks of silence
            else:
                await busy.read(0, 4096)
        collected.clear()
        await busy.read(0, 4096)
        await asyncio.sleep(0.01)
        assert not collected.is_set()  # once is enough
    await listener.stop(1)


async def test_many_ended_connections_are_collected_at_any_rate(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket_listener, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(iscsi_listener, "ENDED_MAX", 2)
    monkeypatch.setattr(
        iscsi_listener.IscsiProtocol, "commands", property(lambda self: next(counter))
    )
    counter = itertools.count()
    collected = asyncio.Event()
    listener = IscsiListener(Targets(pool, None), 3, collect=collected.set)
    await listener.listen(Address("127.0.0.1", 0))
    host, port = listener.addresses[0]
    async with await Initiator.connect(host, port, f"{TARGET_PREFIX}disk"):
        (await Initiator.connect(host, port, f"{TARGET_PREFIX}other")).abort()
        await asyncio.sleep(0.02)
        assert not collected.is_set()
        (await Initiator.connect(host, port, f"{TARGET_PREFIX}other")).abort()
        await collected.wait()
    await listener.stop(1)


@pytest.mark.client("iscsi-ls")
async def test_discovery_by_a_real_client(listener: IscsiListener) -> None:
    output = await succeed("iscsi-ls", f"iscsi://{listener.portals()[0]}")
    assert "iqn.2026-01.io.cleaved:disk" in output
    assert "iqn.2026-01.io.cleaved:other" in output


@pytest.mark.client("qemu-img")
async def test_data_by_a_real_client(
    listener: IscsiListener, pool: MemoryPool, tmp_path: Path
) -> None:
    data = os.urandom(DISK_BYTES)
    (tmp_path / "source").write_bytes(data)
    url = f"iscsi://{listener.portals()[0]}/iqn.2026-01.io.cleaved:disk/0"
    await succeed(
        "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(tmp_path / "source"), url
    )
    assert pool.volumes["disk"].data == data
    await succeed("qemu-img", "convert", "-f", "raw", "-O", "raw", url, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == data
    assert pool.volumes["disk"].labels == []
    assert (await run("qemu-img", "info", url.replace("disk", "none"))).status != 0
