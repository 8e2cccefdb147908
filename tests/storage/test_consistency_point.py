"""Consistency points: all or nothing, whatever happens meanwhile, and everybody who waits for one
is answered.
"""

import asyncio
import gc
from collections.abc import Sequence
from random import Random

import pytest

from storage.consistency.node_writer import NodeWriter
from storage.device import Buffer
from storage.errors import BlockDamaged, DeviceFailed, PoolReadOnly, StorageError
from storage.layout import BLOCK_BYTES
from storage.pool import Pool
from storage.state.epoch import Epoch
from storage.state.pool_state import PoolState
from storage.state.slices import Slicer
from tests.storage.crash_device import CrashDevice, Loss
from tests.storage.devices import SYNC, WRITE, DelayDevice, Fault, FaultyDevice, MemoryDevice
from tests.storage.pools import (
    LEAF_BYTES,
    Delayed,
    checked_offline,
    data,
    new_pool,
    open_on,
    opened,
    within,
)


async def test_changes_after_the_freeze_belong_to_the_next_consistency_point() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        before = data(1, 600)
        await running.write("a", 0, before)
        delayed.device.hold(SYNC)
        point = asyncio.create_task(running.pool.consistency_point())
        await running.until(lambda: delayed.device.held(SYNC) == 1)
        await running.write(
            "a", 100 * BLOCK_BYTES, data(2, 300)
        )  # the same pointer blocks, already written by it
        await running.zero("a", 500 * BLOCK_BYTES, 50 * BLOCK_BYTES)
        delayed.device.release(SYNC)
        await within(point)
        frozen = running.memory.copy()
        after = await running.read("a", 0, len(before))
    checked_offline(frozen)
    async with opened(frozen) as running:
        found = await running.read("a", 0, len(before))
        for at in range(
            0, len(before), BLOCK_BYTES
        ):  # what came after the freeze was not flushed: it may be there, or not
            assert found[at : at + BLOCK_BYTES] in (
                before[at : at + BLOCK_BYTES],
                after[at : at + BLOCK_BYTES],
            )


async def test_frozen_pointer_blocks_that_change_are_written_as_they_were() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        before = data(1, 600)
        await running.write("a", 0, before)
        point = running.pool.consistency_point()
        task = asyncio.create_task(point)
        await running.until(lambda: running.pool._state.frozen is not None or task.done())
        for index in range(3):
            await running.write("a", index * LEAF_BYTES, data(index + 5))
        await within(task)
        frozen = running.memory.copy()
        await running.checkpoint()
        later = running.memory.copy()
    async with opened(later) as running:
        assert (
            await running.read("a", LEAF_BYTES, 2 * BLOCK_BYTES)
            == data(6) + before[257 * BLOCK_BYTES : 258 * BLOCK_BYTES]
        )
    checked_offline(frozen)


async def test_invariant_5_used_bits_and_share_counts_are_right_after_every_consistency_point() -> (
    None
):
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        for round_ in range(5):
            await running.write("a", round_ * 100 * BLOCK_BYTES, data(round_, 250))
            await running.pool.snapshot_create([("a", f"s{round_}")])
            await running.zero("a", round_ * 50 * BLOCK_BYTES, 70 * BLOCK_BYTES)
            if round_ > 1:
                await running.pool.snapshot_delete("a", f"s{round_ - 2}")
            await running.checkpoint()
            checked_offline(running.memory.copy())


async def test_a_mistake_in_one_change_is_that_ones_alone() -> None:
    async with new_pool() as running:

        def mistaken() -> None:
            raise KeyError("a mistake of ours")

        points = running.pool._points
        results = await within(
            asyncio.gather(
                points.request(mistaken),
                running.pool.vdisk_create("a", 1 << 20),
                return_exceptions=True,
            )
        )
        assert isinstance(results[0], KeyError) and isinstance(results[1], dict)
        await running.checkpoint()
        assert not running.pool.show()["read_only"]


async def test_a_request_that_nobody_waits_for_any_more_changes_nothing() -> None:
    async with new_pool() as running:
        creation = asyncio.create_task(running.pool.vdisk_create("a", 1 << 20))
        await asyncio.sleep(0)
        creation.cancel()
        await asyncio.gather(creation, return_exceptions=True)
        await running.checkpoint()
        assert running.pool.names() == []


@pytest.mark.parametrize("operation", [WRITE, SYNC])
async def test_a_consistency_point_that_fails_makes_the_pool_read_only_and_reads_go_on(
    operation: str,
) -> None:
    async with new_pool(decorate=FaultyDevice) as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1))
        await running.checkpoint()
        durable = running.memory.copy()
        await running.write("a", 0, data(2))
        device = running.device
        device.faults.append(Fault(operation, nth=device.calls[operation] + 1))
        with pytest.raises(StorageError, match="planted fault"):
            await running.checkpoint()
        shown = running.pool.show()
        assert shown["read_only"] and "a consistency point failed" in shown["read_only_reason"]
        assert "pool.read_only" in running.event_names()
        with pytest.raises(PoolReadOnly):
            await running.write("a", 0, data(3))
        with pytest.raises(PoolReadOnly):
            await running.flush("a")
        assert await running.read("a", 0, BLOCK_BYTES) == data(2)
    async with opened(durable) as running:
        assert await running.read("a", 0, BLOCK_BYTES) == data(1)


async def test_a_freed_block_waits_for_the_readers_from_before() -> None:
    """Or a slow read would return what was written there since: another vdisk's data
    (invariant 7).
    """
    async with new_pool() as running:
        state = running.pool._state
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1, 100))
        await running.checkpoint()
        epoch = state.begin_read()
        await running.write("a", 0, data(2, 100))
        await running.checkpoint()
        held = state.allocator.held_blocks
        assert held >= 100
        await running.checkpoint()
        assert state.allocator.held_blocks >= 100
        state.end_read(epoch)
        await running.checkpoint()
        await running.checkpoint()
        assert state.allocator.held_blocks < 100


def test_an_epoch_with_nothing_in_it_is_unchanged() -> None:
    epoch = Epoch(7)
    assert (epoch.changed, epoch.freed_estimate) == (False, 0)
    epoch.count_pointer(100, 1)
    epoch.count_pointer(100, -1)
    assert epoch.pointer_delta == {}
    epoch.dropped.append(5)
    assert (epoch.changed, epoch.freed_estimate) == (True, 1)


@pytest.mark.parametrize("loss", [Loss.ALL, Loss.NOTHING, Loss.SOME_PAGES, Loss.SOME_SECTORS])
async def test_invariant_3_a_pool_mounts_after_a_crash_at_any_sync_and_recovery_can_crash_too(
    loss: Loss,
) -> None:
    device = CrashDevice(8 << 20)
    await Pool.format(device)
    delay = DelayDevice(device)
    running = await open_on(device, delay)
    await running.pool.vdisk_create("a", LEAF_BYTES)
    await running.write("a", 0, data(1, 20), fua=True)
    found: list[CrashDevice] = []
    for round_ in range(6):
        delay.hold(SYNC)
        await running.write("a", round_ * BLOCK_BYTES, data(round_ + 2))
        flush = running.begin_flush("a")
        point = asyncio.create_task(running.pool.consistency_point())
        await running.until(lambda: delay.held(SYNC) > 1)
        found.append(crashed_copy(device, loss, round_))
        delay.release(SYNC)
        await within(flush)
        await within(point)
    await running.close()
    for round_, crashed in enumerate(found):
        for seed in range(2):
            recovering = crashed_copy(crashed, loss, seed)
            reopened = await open_on(recovering)
            content = await reopened.read("a", 0, 20 * BLOCK_BYTES)
            blocks = [content[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES)]
            assert blocks[:round_] == [
                data(number + 2) for number in range(round_)
            ]  # invariant 1: what was flushed
            assert blocks[round_] in (
                data(round_ + 2),
                data(1, 20)[round_ * BLOCK_BYTES : (round_ + 1) * BLOCK_BYTES],
            )
            again = crashed_copy(recovering, loss, seed)  # recovery itself loses power
            await reopened.close()
            once_more = await open_on(again)
            assert (
                await once_more.read("a", 0, round_ * BLOCK_BYTES)
                == content[: round_ * BLOCK_BYTES]
            )
            await once_more.close()


def crashed_copy(device: CrashDevice, loss: Loss, seed: int) -> CrashDevice:
    """What a loss of power would leave now; the device itself goes on."""
    twin = CrashDevice(device.size_bytes)
    twin._pages = {index: bytearray(page) for index, page in device._pages.items()}
    twin._versions = {index: list(versions) for index, versions in device._versions.items()}
    return twin.lose_power(loss, Random(seed))


async def test_damage_of_either_superblock_costs_nothing() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1))
        memory = running.memory
    for vbn in (0, 1):
        damaged = memory.copy()
        damaged.try_writev([b"\xff" * BLOCK_BYTES], vbn * BLOCK_BYTES, BLOCK_BYTES)
        running = await open_on(damaged)
        assert await running.read("a", 0, BLOCK_BYTES) == data(1)
        await running.close()


async def test_a_damaged_pointer_block_is_reported_and_the_rest_keeps_serving() -> None:
    async with new_pool() as running:
        for name in ("a", "b"):
            await running.pool.vdisk_create(name, LEAF_BYTES)
            await running.write(name, 0, data(1))
        await running.checkpoint()
        root = running.image("a").tree.root_vbn
        memory = running.memory
    memory = memory.copy()
    memory.try_writev([b"\xff" * BLOCK_BYTES], root * BLOCK_BYTES, BLOCK_BYTES)
    running = await open_on(memory)
    for command in (
        lambda: running.read("a", 0, BLOCK_BYTES),
        lambda: running.write("a", 0, data(2)),
        lambda: running.zero("a", 0, BLOCK_BYTES),
    ):
        with pytest.raises(
            BlockDamaged, match=r"vdisk a: the level-1 pointer block 0 .* is damaged"
        ):
            await within(command())
    assert await running.read("b", 0, BLOCK_BYTES) == data(1)
    await running.write("b", 0, data(2), fua=True)
    await running.close()


class FailsLaterAndAtOnce(MemoryDevice):
    """The first write goes by the threads and fails there, the second fails at once."""

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        if offset_bytes < 200 * BLOCK_BYTES:
            return False
        raise DeviceFailed("memory: at once")

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> "asyncio.Future[None]":
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_exception, DeviceFailed("memory: later"))
        return future


async def test_of_several_writes_that_fail_none_is_left_unheard() -> None:
    """Or asyncio complains of a Future whose exception was never retrieved, and a write goes on
    behind a failed consistency point.
    """
    state = PoolState(FailsLaterAndAtOnce(1 << 20), 0, 1 << 20)
    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))
    for vbns in ([100, 102], [100, 102, 201]):
        with pytest.raises(DeviceFailed):
            await NodeWriter(state, state.epoch, Slicer()).write_blocks(
                [(vbn, bytearray(BLOCK_BYTES)) for vbn in vbns]
            )
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()
    assert not unheard
