"""Our asyncio initiator against the listener, over volumes in memory."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from daemon.iscsi.initiator import INITIATOR_NAME, Initiator, random_isid
from daemon.iscsi.listener import IscsiListener
from daemon.process.addresses import Address
from daemon.process.config import Chap
from daemon.targets.directory import Targets
from daemon.targets.names import TARGET_PREFIX
from protocol.iscsi.chap import ChapSecrets
from protocol.iscsi.errors import IscsiError
from protocol.iscsi.initiator.login import InitiatorSettings
from protocol.iscsi.initiator.task import CommandFailed, ConnectionEnded
from tests.daemon.fakes import MemoryPool

DISK_BYTES = 16 << 20
TARGET = f"{TARGET_PREFIX}disk"


@pytest.fixture
def pool() -> MemoryPool:
    return MemoryPool(disk=DISK_BYTES)


@pytest_asyncio.fixture
async def listener(pool: MemoryPool) -> AsyncIterator[IscsiListener]:
    found = IscsiListener(Targets(pool, None), connections_max=8)
    await found.listen(Address("127.0.0.1", 0))
    yield found
    await found.stop(1)


async def connect(
    listener: IscsiListener, target: str = TARGET, settings: InitiatorSettings | None = None
) -> Initiator:
    address = listener.addresses[0]
    return await Initiator.connect(address.host, address.port, target, settings)


@pytest.mark.parametrize("length", [512, 4096, 65536, 65536 + 512, 3 << 20])
async def test_what_is_written_is_read(
    listener: IscsiListener, pool: MemoryPool, length: int
) -> None:
    data = os.urandom(length)
    async with await connect(listener) as disk:
        assert await disk.capacity_bytes() == DISK_BYTES
        await disk.write(512, data)
        assert await disk.read(512, length) == data
        await disk.flush()
    assert pool.volumes["disk"].data[512 : 512 + length] == data
    assert pool.volumes["disk"].flushes == 1


async def test_zeros_without_data(listener: IscsiListener) -> None:
    async with await connect(listener) as disk:
        await disk.write(0, b"x" * 65536)
        await disk.unmap(0, 8192)
        await disk.write_zeros(8192, 8192)
        assert await disk.read(0, 65536) == bytes(16384) + b"x" * (65536 - 16384)


async def test_more_commands_than_the_window(listener: IscsiListener, pool: MemoryPool) -> None:
    async with await connect(listener) as disk:
        pieces = [os.urandom(4096) for _ in range(1000)]
        await asyncio.gather(
            *(disk.write(number * 4096, piece) for number, piece in enumerate(pieces))
        )
        assert (
            await asyncio.gather(*(disk.read(number * 4096, 4096) for number in range(1000)))
            == pieces
        )


async def test_an_error_of_the_disk_is_its_sense(listener: IscsiListener, pool: MemoryPool) -> None:
    async with await connect(listener) as disk:
        pool.volumes["disk"].fail_writes = errno.ENOSPC
        with pytest.raises(CommandFailed) as caught:
            await disk.write(0, bytes(4096))
        # SPACE ALLOCATION FAILED WRITE PROTECT
        assert (caught.value.key, caught.value.asc, caught.value.ascq) == (0x7, 0x27, 0x07)
        assert await disk.read(0, 4096) == bytes(4096)


async def test_a_target_that_does_not_exist(listener: IscsiListener) -> None:
    with pytest.raises(IscsiError, match="no such target"):
        await connect(listener, f"{TARGET_PREFIX}none")


async def test_two_sessions_of_one_initiator(listener: IscsiListener, pool: MemoryPool) -> None:
    async with await connect(listener) as one, await connect(listener) as two:
        await one.write(0, b"1" * 4096)
        assert await two.read(0, 4096) == b"1" * 4096
        assert len(pool.volumes["disk"].labels) == 2
    while pool.volumes["disk"].labels:
        await asyncio.sleep(0)


async def test_chap_both_ways(pool: MemoryPool) -> None:
    listener = IscsiListener(Targets(pool, Chap("u", "u" * 12, "t", "t" * 12)), connections_max=8)
    await listener.listen(Address("127.0.0.1", 0))
    with pytest.raises(IscsiError, match="authentication failed"):
        await connect(listener)
    wrong = ChapSecrets("u", b"w" * 12, "t", b"t" * 12)
    with pytest.raises(IscsiError, match="authentication failed"):
        await connect(listener, settings=InitiatorSettings(INITIATOR_NAME, TARGET, wrong))
    right = ChapSecrets("u", b"u" * 12, "t", b"t" * 12)
    async with await connect(
        listener, settings=InitiatorSettings(INITIATOR_NAME, TARGET, right, isid=random_isid())
    ) as disk:
        assert await disk.capacity_bytes() == DISK_BYTES
    await listener.stop(1)


async def test_a_target_that_goes_ends_what_is_in_flight(
    listener: IscsiListener, pool: MemoryPool
) -> None:
    disk = await connect(listener)
    pool.volumes["disk"].hold_reads = True
    reading = asyncio.create_task(disk.read(0, 4096))
    while not pool.volumes["disk"].held:
        await asyncio.sleep(0)
    stopping = asyncio.create_task(listener.stop(0.01))
    with pytest.raises(ConnectionEnded):
        await reading
    pool.volumes["disk"].release()
    await stopping
    await disk.close()
    assert pool.volumes["disk"].labels == []


async def test_stopping_lets_what_is_in_flight_end(
    listener: IscsiListener, pool: MemoryPool
) -> None:
    disk = await connect(listener)
    pool.volumes["disk"].hold_writes = True
    writing = asyncio.create_task(disk.write(0, b"x" * 4096))
    while not pool.volumes["disk"].held:
        await asyncio.sleep(0)
    stopping = asyncio.create_task(listener.stop(10))
    await asyncio.sleep(0)
    pool.volumes["disk"].release()
    await writing
    await disk.close()
    await stopping
