"""Trimming: what was trimmed reads as zeros for good, at every level of the tree, and the count of
used blocks stays exact.
"""

import asyncio
from collections.abc import Awaitable

import pytest

from storage.layout import BLOCK_BYTES, SECTOR_BYTES, VDISK_BYTES_MAX
from tests.storage.devices import READ, DelayDevice
from tests.storage.pools import LEAF_BYTES, backed_clone, data, new_pool, opened, within

# A level-2 block covers this much.
LEVEL_2_BYTES = 256 * LEAF_BYTES


@pytest.mark.parametrize("snapshot", [False, True], ids=["alone", "shared with a snapshot"])
@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 1), (5, 20), (0, 256), (100, 256), (256, 256), (100, 600), (0, 1024), (0, 1 << 18)],
    ids=str,
)
async def test_a_trim_zeroes_its_range_and_nothing_else(
    first: int, count: int, snapshot: bool
) -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEVEL_2_BYTES)
        content = bytearray(data(1, 800))
        await running.write("a", 0, bytes(content))
        if snapshot:
            await running.pool.snapshot_create([("a", "s")])
        await running.zero("a", first * BLOCK_BYTES, count * BLOCK_BYTES)
        end = min(800, first + count)
        before = bytes(content)
        content[first * BLOCK_BYTES : end * BLOCK_BYTES] = bytes((end - first) * BLOCK_BYTES)
        assert await running.read("a", 0, len(content)) == content
        assert running.image("a").used_blocks == 800 - (end - first)
        if snapshot:
            assert await running.read("a@s", 0, len(before)) == before
        memory = running.memory
    async with opened(memory.copy()) as running:
        assert await running.read("a", 0, len(content)) == content


async def test_trimming_everything_gives_everything_back() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 1 << 50)
        await running.checkpoint()
        before = running.pool.show()["used_bytes"]
        for offset in (0, 1 << 30, 1 << 40, (1 << 50) - BLOCK_BYTES):
            await running.write("a", offset, data(1))
        await running.zero("a", 0, 1 << 50)
        await running.checkpoint()
        assert running.image("a").used_blocks == 0
        assert running.pool.show()["used_bytes"] - before <= BLOCK_BYTES  # the root may stay


async def test_partial_blocks_at_the_ends_are_zeroed() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        for start, end in ((1, 7), (3, 8), (0, 5), (1, 9), (7, 17), (9, 31), (8, 16)):
            content = bytearray(data(start * 100 + end, 5))
            await running.write("a", 0, bytes(content))
            await running.zero("a", start * SECTOR_BYTES, (end - start) * SECTOR_BYTES)
            content[start * SECTOR_BYTES : end * SECTOR_BYTES] = bytes((end - start) * SECTOR_BYTES)
            assert await running.read("a", 0, len(content)) == content


@pytest.mark.parametrize(
    ("first", "count"), [(0, 1), (10, 300), (0, 512), (256, 256), (0, 700)], ids=str
)
async def test_invariant_4_a_trim_never_brings_the_backing_store_back(
    first: int, count: int
) -> None:
    async with new_pool() as running:
        content = bytearray(await backed_clone(running, 700))
        await running.zero("clone", first * BLOCK_BYTES, count * BLOCK_BYTES)
        content[first * BLOCK_BYTES : (first + count) * BLOCK_BYTES] = bytes(count * BLOCK_BYTES)
        assert await running.read("clone", 0, len(content)) == content
        await running.flush("clone")
        crashed = running.memory.copy()
        await running.checkpoint()
        assert await running.read("clone", 0, len(content)) == content
        memory = running.memory
    for found in (memory.copy(), crashed):
        async with opened(found) as running:
            assert await running.read("clone", 0, len(content)) == content
            await running.pool.split_start("clone", "copy")
            await running.split_ended("clone")
            assert await running.read("clone", 0, len(content)) == content


async def test_trimming_the_largest_clone_is_a_few_fields() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("base", VDISK_BYTES_MAX)
        await running.write("base", VDISK_BYTES_MAX // 2, data(1))
        await running.pool.snapshot_create([("base", "s")])
        await running.pool.clone_create("base", "s", "clone")
        await running.zero("clone", BLOCK_BYTES, VDISK_BYTES_MAX - BLOCK_BYTES)
        assert await running.read("clone", VDISK_BYTES_MAX // 2, BLOCK_BYTES) == bytes(BLOCK_BYTES)
        assert len(running.pool._state.epoch.unlogged.entries) < 2000
        assert running.pool.show()["cached_nodes"] < 64


async def test_trims_writes_and_consistency_points_under_way_together() -> None:
    async with new_pool(deferred=True, miss_rate=0.5, seed=5) as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.write("a", 0, data(1, 1024))
        commands: list[Awaitable[None]] = []
        for index in range(8):
            first = index * 128
            commands.append(running.begin_zero("a", first * BLOCK_BYTES, 64 * BLOCK_BYTES))
            commands.append(
                running.begin_write("a", (first + 64) * BLOCK_BYTES, data(index + 2, 32))
            )
            commands.append(running.pool.consistency_point())
        await within(asyncio.gather(*commands))
        old = data(1, 1024)
        for index in range(8):
            first = index * 128
            expected = (
                bytes(64 * BLOCK_BYTES)
                + data(index + 2, 32)
                + old[(first + 96) * BLOCK_BYTES : (first + 128) * BLOCK_BYTES]
            )
            assert await running.read("a", first * BLOCK_BYTES, 128 * BLOCK_BYTES) == expected
        assert running.image("a").used_blocks == 8 * 64


async def test_a_snapshot_taken_in_the_middle_of_a_trim_is_consistent_with_its_counts() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.write("a", 0, data(1, 1024))
        await running.checkpoint()
        memory = running.memory.copy()
    device = DelayDevice(memory)
    async with opened(memory, device) as running:
        await running.read("a", 0, BLOCK_BYTES)
        device.hold(READ)
        trim = running.begin_zero("a", 128 * BLOCK_BYTES, 600 * BLOCK_BYTES)
        await running.until(lambda: device.held(READ) > 0)
        snapshot = asyncio.create_task(running.pool.snapshot_create([("a", "s")]))
        await asyncio.sleep(0.01)
        device.release(READ)
        await within(trim)
        await within(snapshot)
        assert await running.read("a", 128 * BLOCK_BYTES, 600 * BLOCK_BYTES) == bytes(
            600 * BLOCK_BYTES
        )
        snap = await running.read("a@s", 0, 1024 * BLOCK_BYTES)
        assert snap[: 128 * BLOCK_BYTES] == data(1, 1024)[: 128 * BLOCK_BYTES]
