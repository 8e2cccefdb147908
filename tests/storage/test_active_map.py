"""The active map and the region summary: exactly what is reachable, counted, and changed only
within consistency points.
"""

import asyncio

import numpy as np
import pytest

from storage.allocation.active_map import count_bits
from storage.allocation.map_changes import packed
from storage.errors import StorageError
from storage.layout import BLOCK_BYTES, REGION_BLOCKS
from storage.pool import Pool
from tests.storage.devices import DISCARD, DelayDevice, MemoryDevice
from tests.storage.pools import (
    LEAF_BYTES,
    OpenPool,
    checked_offline,
    data,
    new_pool,
    open_on,
    within,
)


def bits_of(running: OpenPool, region: int = 0) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    bits = running.pool.rooms.active_map.peek_bits(region)
    assert bits is not None
    return np.unpackbits(bits, bitorder="little")


def test_packing_bits() -> None:
    offsets = np.array([0, 7, 8, 4095, REGION_BLOCKS - 1])
    bits = packed(offsets)
    assert len(bits) == BLOCK_BYTES and count_bits(bits) == len(offsets)
    assert bits[0] == 0b10000001 and bits[1] == 1 and bits[-1] == 0b10000000


async def test_bits_change_only_in_a_consistency_point_together_with_the_pointers() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.checkpoint()
        before = bits_of(running).copy()
        await running.write("a", 0, data(1, 100))
        assert (bits_of(running) == before).all()
        node = running.image("a").tree.nodes[1][0]
        vbns = [int(vbn) for vbn in node.vbns()[:100]]
        assert not before[vbns].any()
        await running.checkpoint()
        assert bits_of(running)[vbns].all()
        await running.zero("a", 0, 50 * BLOCK_BYTES)
        assert bits_of(running)[vbns].all()
        await running.checkpoint()
        assert not bits_of(running)[vbns[:50]].any() and bits_of(running)[vbns[50:]].all()


async def test_the_summary_and_the_count_agree_with_the_bits_over_several_regions() -> None:
    async with new_pool(2 * REGION_BLOCKS * BLOCK_BYTES + (1 << 20)) as running:
        await running.pool.vdisk_create("a", 1 << 30)
        allocator = running.pool.rooms.allocator
        allocator._claims._cursor = REGION_BLOCKS - 200  # so that writes lie in two regions
        allocator.release_data_window()
        allocator._claims._cursor = REGION_BLOCKS - 200
        allocator._claims._roomy.clear()
        await running.write("a", 0, data(1, 600))
        await running.checkpoint()
        counts = [int(bits_of(running, region).sum()) for region in range(3)]
        assert counts[1] >= 400
        assert [running.pool.rooms.active_map.peek_used(region) for region in range(3)] == counts
        assert running.pool.rooms.active_map.used_blocks == sum(counts)


@pytest.mark.parametrize("what", ["allocated", "freed"])
async def test_a_map_that_contradicts_itself_stops_the_pool_before_it_is_written(what: str) -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1, 10))
        await running.checkpoint()
        before = running.memory.copy()
        epoch = running.pool._state.epoch
        if what == "allocated":
            vbn = int(running.image("a").tree.nodes[1][0].vbns()[0])
            running.pool.rooms.allocator.adopt(vbn)
            epoch.ledger.allocated.append((vbn, 1))
        else:
            epoch.ledger.freed.append(running.pool.show()["size_bytes"] // BLOCK_BYTES - 1)
        with pytest.raises(StorageError, match="run `cleaved check`"):
            await running.checkpoint()
        assert running.pool.show()["read_only"]
        assert await running.read("a", 0, 10 * BLOCK_BYTES) == data(1, 10)
        for vbn in (0, 1):  # the superblocks are those of before
            assert running.memory._pages[vbn] == before._pages[vbn]


async def test_long_runs_that_were_freed_are_given_back_to_the_device() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 16 * LEAF_BYTES)
        await running.write("a", 0, data(1, 2000))
        await running.checkpoint()
        before = running.memory.allocated_bytes
        await running.zero("a", 0, 2000 * BLOCK_BYTES)
        await running.checkpoint()
        await running.until(
            lambda: (
                not (running.pool.rooms.retirement._discarding or running.pool.rooms.retired.epochs)
            )
        )
        assert running.memory.allocated_bytes <= before - 1800 * BLOCK_BYTES


async def test_a_pool_that_closes_waits_for_all_that_is_being_given_back() -> None:
    memory = MemoryDevice(32 << 20)
    await Pool.format(memory)
    device = DelayDevice(memory)
    running = await open_on(memory, device)
    await running.pool.vdisk_create("a", 16 * LEAF_BYTES)
    await running.write("a", 0, data(1, 2000))
    await running.checkpoint()
    device.hold(DISCARD)
    for half in range(2):
        await running.zero("a", half * 1000 * BLOCK_BYTES, 1000 * BLOCK_BYTES)
        await running.checkpoint()
    assert device.held(DISCARD) == 1 and len(running.pool.rooms.retired.epochs) == 2
    closing = asyncio.create_task(running.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    device.release(DISCARD)
    await within(closing)
    assert not running.pool.rooms.retirement._discarding and not running.pool.rooms.retired.epochs
    checked_offline(memory)
