"""Pools in sparse files on real file systems that are full: ext4, xfs and tmpfs, to the last block.

What a file system does about delayed allocation, punched holes and blocks that are allocated but
not written is its own; the deterministic tests (tests/crash/test_full_host.py) know only the rule.
The file systems are checked after each test.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from storage.device import Device, open_device
from storage.errors import DeviceFull, StorageError
from storage.pool import Pool
from storage.vdisks.volume import Volume
from tests.storage.mounts import KINDS, Host, host

pytestmark = pytest.mark.needs("file systems")
# Larger than its host.
POOL_BYTES = 1 << 30
MIB = 1 << 20
SECONDS_MAX = 60


@pytest.fixture(params=KINDS)
def full_host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    with host(request.param, tmp_path) as made:
        Pool.create(made.pool_path, POOL_BYTES)
        yield made


class Served:
    """A pool with 20 MiB in a snapshot alone, and as much in a vdisk."""

    def __init__(self, pool: Pool, events: list[str]) -> None:
        self.pool = pool
        self.events = events
        self.content: dict[int, bytes] = {}

    async def fill(self) -> None:
        await self.pool.vdisk_create("a", POOL_BYTES)
        await self.write(range(20))
        await self.pool.snapshot_create([("a", "s")])
        await self.write(range(20))
        await self.pool.consistency_point()
        await self.pool.rooms.allocator.stock.top_up()

    async def write(self, offsets: range, fua: bool = False) -> None:
        for offset in offsets:
            data = os.urandom(MIB)
            await written(self.pool.volume("a"), offset * MIB, data, fua)
            self.content[offset] = data

    async def refused(self) -> int:
        """Write until the host has no more; returns how many writes of 4 KiB it took."""
        volume = self.pool.volume("a")
        for number in range(100_000):
            try:
                await written(volume, 100 * MIB + number * 4096, b"x" * 4096, fua=False)
            except DeviceFull:
                return number
        raise AssertionError("the host is never full")

    async def verify(self, pool: Pool) -> None:
        for offset, data in self.content.items():
            assert await read(pool.volume("a"), offset * MIB, MIB) == data, offset


@asynccontextmanager
async def opened(path: str) -> AsyncIterator[Served]:
    events: list[str] = []
    pool = await Pool.open(path, on_event=lambda name, **fields: events.append(name))
    try:
        yield Served(pool, events)
    finally:
        await asyncio.wait_for(pool.close(), SECONDS_MAX)


async def written(volume: Volume, offset: int, data: bytes, fua: bool) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    volume.write(
        offset,
        data,
        fua,
        lambda error: future.set_result(None) if error is None else future.set_exception(error),
    )
    volume.settle()
    await future


async def read(volume: Volume, offset: int, length: int) -> bytes:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def done(data: Any, error: Exception | None) -> None:
        future.set_result(bytes(data)) if error is None else future.set_exception(error)

    volume.read(offset, length, done)
    return await future


async def until_room(pool: Pool) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while pool.show()["host_full"]:
            await asyncio.sleep(0.01)


async def test_deletes_make_room_on_a_full_host(full_host: Host) -> None:
    async with opened(full_host.pool_path) as served:
        pool = served.pool
        await served.fill()
        full_host.fill()
        await served.refused()
        shown = pool.show()
        assert shown["host_full"] and shown["available_limited_by"] == "host"
        assert shown["available_bytes"] == full_host.available_bytes < MIB
        async with asyncio.timeout(SECONDS_MAX):
            await pool.consistency_point()
            await pool.snapshot_create([("a", "t")])
            await pool.snapshot_delete("a", "s")
            await until_room(pool)
        assert full_host.free_bytes > 10 * MIB, "holes were punched"
        await served.write(range(20, 24), fua=True)
        assert not pool.show()["read_only"]
        await served.verify(pool)
    assert [
        served.events.count(event)
        for event in ("pool.host_full", "pool.host_room", "pool.read_only")
    ] == [1, 1, 0]


async def test_writes_go_on_when_there_is_room(full_host: Host) -> None:
    async with opened(full_host.pool_path) as served:
        await served.fill()
        full_host.fill()
        await served.refused()
        full_host.make_room()
        await served.write(range(30, 34), fua=True)  # at once: nothing is in the way
        await until_room(served.pool)
        await served.verify(served.pool)


async def test_a_full_host_at_the_start(full_host: Host) -> None:
    async with opened(full_host.pool_path) as served:
        await served.fill()
        full_host.fill()
        await served.refused()
    assert served.events[-1] == "pool.closed" and "pool.closed_on_full_host" not in served.events
    full_host.fill()
    async with opened(full_host.pool_path) as again:
        await served.verify(again.pool)
        async with asyncio.timeout(SECONDS_MAX):
            await again.pool.snapshot_delete("a", "s")
            await until_room(again.pool)
        await served.verify(again.pool)
        assert not again.pool.show()["read_only"]


async def test_a_sync_never_meets_a_full_host(full_host: Host) -> None:
    """What was written has its room from the moment of the write (delayed allocation), or of
    ``reserve``. So ENOSPC comes from neither.
    """
    device = open_device(full_host.pool_path)
    try:
        await device.reserve(512 * MIB, 8 * MIB)
        full_host.fill()
        accepted = await write_until_refused(device, 256 * MIB)
        full_host.fill()
        for number in range(0, 2048, 3):  # pieces, so that extents have to be split
            offset = 512 * MIB + number * 4096
            accepted[offset] = data = os.urandom(4096)
            assert device.try_writev((data,), offset, 4096)
        await device.sync()
        buffer = bytearray(4096)
        for offset, data in accepted.items():
            await device.readv((buffer,), offset)
            assert buffer == data
    finally:
        device.close()


async def write_until_refused(device: Device, offset: int) -> dict[int, bytes]:
    """What was taken, by offset."""
    accepted: dict[int, bytes] = {}
    for at in range(offset, offset + 400 * MIB, 4096):
        data = os.urandom(4096)
        try:
            if not device.try_writev((data,), at, 4096):
                await device.writev((data,), at)
        except DeviceFull:
            return accepted
        accepted[at] = data
    raise AssertionError("the host is never full")


async def test_what_is_reserved_is_found_and_its_content_stays(full_host: Host) -> None:
    device = open_device(full_host.pool_path)
    try:
        data = os.urandom(8192)
        assert device.try_writev((data,), 600 * MIB, 8192)
        await device.reserve(600 * MIB - 4096, MIB)
        found: list[tuple[int, int]] = []
        await device.backed(599 * MIB, 3 * MIB, found)
        assert (found[0][0], found[-1][1]) == (600 * MIB - 4096, 601 * MIB - 4096)
        assert sum(end - start for start, end in found) == MIB
        buffer = bytearray(8192)
        await device.readv((buffer,), 600 * MIB)
        assert buffer == data
        await device.discard(600 * MIB, MIB - 4096)
        found.clear()
        await device.backed(599 * MIB, 3 * MIB, found)
        assert sum(end - start for start, end in found) == 4096
    finally:
        device.close()


async def test_a_host_that_is_full_while_a_thousand_things_change(full_host: Host) -> None:
    """Room comes and goes while it is written, snapshots come and go, and the pool is opened again
    in between.
    """
    async with opened(full_host.pool_path) as served:
        await served.fill()
    content = served.content
    for turn in range(4):
        async with opened(full_host.pool_path) as served:
            served.content = content
            full_host.fill()
            await served.refused()
            async with asyncio.timeout(SECONDS_MAX):
                for number in range(20):
                    await served.pool.snapshot_create([("a", f"{turn}-{number}")])
                    await served.pool.snapshot_delete("a", f"{turn}-{number}")
            full_host.make_room()
            await served.write(range(turn, 20, 4))
            await served.verify(served.pool)
            assert not served.pool.show()["read_only"]
    async with opened(full_host.pool_path) as served:
        report = await served.pool.check(verify_data=True)
        assert report["ok"], report["errors"]


async def test_a_refusal_says_what_to_do(full_host: Host) -> None:
    async with opened(full_host.pool_path) as served:
        await served.fill()
        full_host.fill()
        with pytest.raises(StorageError, match="free space"):
            await written(served.pool.volume("a"), 500 * MIB, os.urandom(8 * MIB), fua=False)
