"""After a failed consistency point: what was never acknowledged is not shown, and what stays can be
read.

tests/crash/test_faults.py has the same for every operation and every device call; here is what only
a second party sees.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from storage.errors import NotFound, StorageError
from storage.layout import BLOCK_BYTES
from storage.split.job import SplitJob
from tests.crash.session import step
from tests.storage.devices import SYNC, DelayDevice, Fault, FaultyDevice, MemoryDevice
from tests.storage.pools import OpenPool, backed_clone, data, new_pool, within


class Failure:
    """Lets a call come as far as the freeze of its consistency point, and then makes that fail."""

    def __init__(self, memory: MemoryDevice) -> None:
        self._faulty = FaultyDevice(memory)
        self.device = DelayDevice(self._faulty)
        self.running: OpenPool

    async def freeze(self, call: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        self.device.hold(SYNC)
        task = asyncio.create_task(call)
        await self.running.until(lambda: self.device.held(SYNC) == 1)
        return task

    async def fail(self, call: "asyncio.Task[Any]") -> None:
        self._faulty.faults = [Fault(SYNC, self._faulty.calls[SYNC] + 1, forever=True)]
        self.device.release(SYNC)
        with pytest.raises(StorageError):
            await within(call)
        assert self.running.pool.show()["read_only"]


@asynccontextmanager
async def failing_pool() -> AsyncIterator[tuple[OpenPool, Failure]]:
    made: list[Failure] = []

    def decorate(memory: MemoryDevice) -> DelayDevice:
        made.append(Failure(memory))
        return made[0].device

    async with new_pool(decorate=decorate) as running:
        made[0].running = running
        yield running, made[0]


async def test_a_volume_has_its_old_name_again() -> None:
    async with failing_pool() as (running, failure):
        await running.pool.vdisk_create("a", 1 << 20)
        await running.pool.snapshot_create([("a", "s")])
        vdisk, snapshot = running.pool.volume("a"), running.pool.volume("a@s")
        call = await failure.freeze(running.pool.vdisk_rename("a", "b"))
        assert (vdisk.name, snapshot.name) == ("b", "b@s")
        await failure.fail(call)
        assert (vdisk.name, snapshot.name) == ("a", "a@s")
        assert running.pool.volume("a") is vdisk and running.pool.names() == ["a"]


async def test_what_was_opened_of_a_vdisk_that_was_never_made_is_closed() -> None:
    async with failing_pool() as (running, failure):
        call = await failure.freeze(running.pool.vdisk_create("a", 1 << 20))
        volume = running.pool.volume("a")
        await failure.fail(call)
        with pytest.raises(NotFound):
            running.pool.volume("a")
        with pytest.raises(StorageError, match="no longer there"):
            volume.check_range(0, BLOCK_BYTES)


async def test_a_deleted_snapshot_is_there_again_and_reads_as_it_did() -> None:
    """Its blocks must not have begun to come free, and whoever has its volume can go on."""
    async with failing_pool() as (running, failure):
        await running.pool.vdisk_create("a", 1 << 20)
        await running.write("a", 0, data(1, 5))
        await running.pool.snapshot_create([("a", "s")])
        await running.write("a", 0, data(2, 5))
        await running.checkpoint()
        volume = running.pool.volume("a@s")
        call = await failure.freeze(running.pool.snapshot_delete("a", "s"))
        with pytest.raises(NotFound):
            running.pool.volume("a@s")
        for _ in range(20):
            await asyncio.sleep(0)  # turns in which a reclaim would begin
        await failure.fail(call)
        assert running.pool.volume("a@s") is volume
        assert await running.read("a@s", 0, 5 * BLOCK_BYTES) == data(1, 5)
        assert "snapshot.deleted" not in [name for name, _ in running.events]


async def test_a_trim_after_a_release_that_failed_brings_nothing_back() -> None:
    """The association is shown again, but nothing is read through holes that were made since."""
    async with failing_pool() as (running, failure):
        carried_out = running.pool.rooms.handler._task
        assert carried_out is not None
        carried_out.cancel()  # it is carried on by hand
        await backed_clone(running, 4)
        await running.pool.split_start("clone")
        job = running.image("clone").watcher
        assert isinstance(job, SplitJob)
        while await running.holes("clone"):
            await step(running.pool)
        call = await failure.freeze(running.pool._splits.release(job))
        assert running.image("clone").backing is None
        await running.zero("clone", 0, 4 * BLOCK_BYTES)
        await failure.fail(call)
        shown = running.pool.split_show("clone")
        assert shown["state"] == "failed" and shown["reason"] and shown["backing"] == "base@snap"
        assert await running.read("clone", 0, 4 * BLOCK_BYTES) == bytes(4 * BLOCK_BYTES)


async def test_a_split_that_was_not_started_is_not_there() -> None:
    async with failing_pool() as (running, failure):
        await backed_clone(running, 4)
        await failure.fail(await failure.freeze(running.pool.split_start("clone")))
        with pytest.raises(NotFound, match="has no split"):
            running.pool.split_show("clone")
        assert running.pool.split_list() == []


async def test_a_split_that_was_not_paused_has_stopped_with_the_pool() -> None:
    async with failing_pool() as (running, failure):
        await backed_clone(running, 300)
        await running.pool.split_start("clone", "copy", rate_max_bytes=1)
        await failure.fail(await failure.freeze(running.pool.split_pause("clone")))
        shown = running.pool.split_show("clone")
        assert shown["state"] == "failed" and "goes on" in shown["reason"]
        assert "split.paused" not in [name for name, _ in running.events]


async def test_a_split_whose_starter_went_away_goes_on() -> None:
    """It is in the table: only the answer has nobody to go to."""
    async with new_pool() as running:
        await backed_clone(running, 4)
        starting = asyncio.create_task(running.pool.split_start("clone"))
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait([starting])
        assert (await running.split_ended("clone"))["state"] == "done"


async def test_configuration_that_was_not_stored_is_not_shown() -> None:
    async with failing_pool() as (running, failure):
        await running.pool.configure("section", b"before")
        await failure.fail(await failure.freeze(running.pool.configure("section", b"after")))
        assert running.pool.configuration("section") == b"before"
