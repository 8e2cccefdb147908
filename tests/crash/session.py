"""A pool under a workload on a recording device, with its model beside it, driven one operation at
a time.
"""

import asyncio
from typing import Any

from storage.backdoor.handler import in_background
from storage.device import Device
from storage.device.owner import Owner
from storage.errors import Conflict
from storage.layout import SPLIT_RUNNING
from storage.pool import Pool
from storage.vdisks.volume import Volume
from tests.crash.determinism import SteadyPace, end_all_tasks
from tests.crash.oracle import SECTOR_BYTES, SECTORS_PER_BLOCK, Disk, Model

CACHE_BYTES = 4 << 20
# Noted in the pool while it is open, so that the writes that do so are under the power losses too.
OWNER = Owner(1, b"a boot of a host", 1, 1, 1, "host")


class Client:
    """A volume's commands as coroutines."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def write(self, name: str, lba: int, content: bytes, fua: bool = False) -> None:
        future, done = waiter()
        volume = self.pool.volume(name)
        volume.write(lba * SECTOR_BYTES, content, fua, done)
        volume.settle()
        await future

    async def unmap(self, name: str, lba: int, count: int) -> None:
        future, done = waiter()
        self.pool.volume(name).unmap(lba * SECTOR_BYTES, count * SECTOR_BYTES, done)
        await future

    async def write_zeros(self, name: str, lba: int, count: int, fua: bool = False) -> None:
        future, done = waiter()
        self.pool.volume(name).write_zeros(lba * SECTOR_BYTES, count * SECTOR_BYTES, fua, done)
        await future

    async def flush(self, name: str) -> None:
        future, done = waiter()
        self.pool.volume(name).flush(done)
        await future


def waiter() -> "tuple[asyncio.Future[None], Any]":
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    return future, done


async def read_block(volume: Volume, fbn: int) -> bytes:
    """One block, by whichever way has it."""
    found = volume.try_read(fbn << 12, 4096)
    if found is None:
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def done(content: Any, error: Exception | None) -> None:
            if error is None:
                future.set_result(bytes(content))
            else:
                future.set_exception(error)

        volume.read(fbn << 12, 4096, done)
        return await future
    return bytes(found)


async def open_steady(device: Device, on_event: Any = None) -> Pool:
    """Open a pool whose background does nothing by itself: ``step`` carries out one message."""
    pool = await Pool.open_on(device, CACHE_BYTES, on_event, OWNER)
    task = pool.rooms.handler._task
    assert task is not None
    task.cancel()
    await asyncio.wait([task])
    pool.rooms.handler._pace = SteadyPace()  # type: ignore[assignment]
    return pool


async def abandon(pool: Pool) -> None:
    """The process is gone: nothing of the pool runs on, and nothing more reaches the device."""
    pool.rooms.device.close()
    await end_all_tasks()


async def step(pool: Pool) -> bool:
    """Carry out the next message of the background, in its name. False: there is none."""
    handler = pool.rooms.handler
    if not handler._queue:
        return False
    in_background.set(True)
    try:
        await handler._carry_out(handler._queue[0])
    finally:
        # Not by a token: a coroutine that is thrown away is ended in another context.
        in_background.set(False)
    return True


class Session:
    """Operations on pool and model together: each tells the model what may be found from when on,
    and what must.
    """

    def __init__(self, pool: Pool, model: Model, split_mode: str = "copy") -> None:
        self.pool = pool
        self.model = model
        self.client = Client(pool)
        self.split_mode = split_mode
        # Set by a workload that saw a split end.
        self.splits_ended = False

    async def write(self, name: str, lba: int, count: int, fua: bool = False) -> None:
        content = self.model.next_data(name, lba, count)
        self.model.disks[name].write(lba, content)
        await self.client.write(name, lba, content, fua)
        if fua:
            self.model.disks[name].durable_range(lba, count)

    async def write_atomic(self, name: str, fbn: int, blocks: int, fua: bool = False) -> None:
        """Whole blocks, at most ATOMIC_WRITE_BYTES_MAX of them: after any crash all of it is there,
        or nothing.
        """
        lba, count = fbn * SECTORS_PER_BLOCK, blocks * SECTORS_PER_BLOCK
        content = self.model.next_data(name, lba, count)
        self.model.disks[name].write_atomic(lba, content)
        await self.client.write(name, lba, content, fua)
        if fua:
            self.model.disks[name].durable_range(lba, count)

    async def unmap(self, name: str, lba: int, count: int) -> None:
        self.model.disks[name].write(lba, bytes(count * SECTOR_BYTES))
        await self.client.unmap(name, lba, count)

    async def flush(self, name: str) -> None:
        await self.client.flush(name)
        self.model.disks[name].durable()

    async def consistency_point(self) -> None:
        await self.pool.consistency_point()
        self.model.all_durable()

    async def snapshot_create(self, vdisk: str, snapshot: str) -> None:
        after = self.model.begin()
        after[f"{vdisk}@{snapshot}"] = after[vdisk].copy()
        await self.pool.snapshot_create([(vdisk, snapshot)])
        self.model.acknowledged()

    async def snapshot_delete(self, vdisk: str, snapshot: str) -> None:
        """Delete a snapshot; with clones on it, be refused."""
        after = self.model.begin()
        del after[f"{vdisk}@{snapshot}"]
        try:
            await self.pool.snapshot_delete(vdisk, snapshot)
        except Conflict:
            self.model.refused()
            return
        self.model.acknowledged()

    async def clone_create(self, vdisk: str, snapshot: str, name: str) -> None:
        after = self.model.begin()
        after[name] = after[f"{vdisk}@{snapshot}"].copy()
        await self.pool.clone_create(vdisk, snapshot, name)
        self.model.acknowledged()

    async def resize(self, name: str, size_blocks: int) -> None:
        if size_blocks == self.model.disks[name].size_blocks:
            # Nothing to do is no reason for a consistency point, so it makes nothing durable.
            await self.pool.vdisk_resize(name, size_blocks * 4096)
            return
        after = self.model.begin()
        disk = self.model.disks[name]
        after[name] = after[name].resized(size_blocks)
        # The tail goes before the size does: until then it may be zeros already.
        for lba in [lba for lba in disk.sectors if lba >= size_blocks * SECTORS_PER_BLOCK]:
            disk.write(lba, bytes(SECTOR_BYTES))
        await self.pool.vdisk_resize(name, size_blocks * 4096)
        self.model.acknowledged()

    async def delete(self, name: str) -> None:
        after = self.model.begin()
        del after[name]
        await self.pool.vdisk_delete(name)
        self.model.acknowledged()

    async def create(self, name: str, size_blocks: int) -> None:
        after = self.model.begin()
        after[name] = Disk(size_blocks)
        await self.pool.vdisk_create(name, size_blocks * 4096)
        self.model.acknowledged()

    async def step(self) -> bool:
        """Carry out the next message of the background, if there is one."""
        return await step(self.pool)

    async def split_start(self, name: str) -> None:
        await self.pool.split_start(name, self.split_mode)
        self.model.all_durable()

    def splitting(self, name: str) -> bool:
        return self.pool._catalogue.vdisk(name).split.state == SPLIT_RUNNING
