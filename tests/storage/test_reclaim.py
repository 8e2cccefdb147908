"""Reclaim: the blocks of deleted images come free, only those that they alone held, also over
restarts and crashes.
"""

import random
from contextlib import suppress

import pytest

from storage.errors import PoolFull
from storage.layout import BLOCK_BYTES, SHARES_PER_BLOCK
from tests.storage.devices import Fault, FaultyDevice
from tests.storage.pools import LEAF_BYTES, checked_offline, data, new_pool, opened


async def test_everything_comes_free() -> None:
    async with new_pool() as running:
        await running.checkpoint()
        before = running.pool.show()["used_bytes"]
        for round_ in range(3):
            await running.pool.vdisk_create("a", 1 << 45)
            for offset in (0, 1 << 30, 1 << 42):
                await running.write("a", offset, data(round_, 300))
            await running.pool.snapshot_create([("a", "s")])
            await running.write("a", 0, data(7, 100))
            await running.zero("a", 1 << 30, 1 << 30)
            await running.pool.clone_create("a", "s", "c")
            await running.write("c", BLOCK_BYTES, data(8, 3))
            await running.pool.vdisk_delete("c")
            await running.pool.snapshot_delete("a", "s")
            await running.pool.vdisk_delete("a")
            await running.reclaimed()
        await running.checkpoint()
        # What may remain beside the state before: the blocks of the share map and its root, and the
        # root of the table.
        shares = -(-running.pool.show()["size_bytes"] // BLOCK_BYTES // SHARES_PER_BLOCK)
        assert running.pool.show()["used_bytes"] - before <= (shares + 2) * BLOCK_BYTES


async def test_what_others_hold_stays() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 8 * LEAF_BYTES)
        versions: dict[str, bytes] = {}
        content = bytearray(8 * LEAF_BYTES)
        shuffled = random.Random(4)
        for number in range(8):
            first = shuffled.randrange(0, 1500)
            written = data(number + 1, 400)
            await running.write("a", first * BLOCK_BYTES, written)
            content[first * BLOCK_BYTES : (first + 400) * BLOCK_BYTES] = written
            await running.pool.snapshot_create([("a", f"s{number}")])
            versions[f"a@s{number}"] = bytes(content)
        order = sorted(versions)
        shuffled.shuffle(order)
        for name in order:
            await running.pool.snapshot_delete("a", name.removeprefix("a@"))
            del versions[name]
            await running.reclaimed()
            for other, expected in versions.items():
                assert await running.read(other, 0, len(expected)) == expected
            await running.check()
        assert await running.read("a", 0, len(content)) == content


async def test_reclaim_goes_on_after_a_restart_and_after_a_crash() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 1 << 40)
        for index in range(600):
            await running.write("a", index * 7 * LEAF_BYTES, data(index))
        await running.pool.vdisk_delete("a")
        await running.checkpoint()
        crashed = running.memory.copy()
        memory = running.memory
    checked_offline(crashed)
    for found in (crashed, memory.copy()):
        async with opened(found) as running:
            await running.reclaimed()
            assert running.pool.show()["used_bytes"] < (600 + 600) * BLOCK_BYTES
            await running.pool.vdisk_create("a", 1 << 40)
            assert await running.read("a", 0, BLOCK_BYTES) == bytes(BLOCK_BYTES)


async def test_the_number_of_a_reclaimed_image_is_used_again() -> None:
    async with new_pool() as running:
        numbers = set()
        for _ in range(5):
            await running.pool.vdisk_create("a", LEAF_BYTES)
            numbers.add(running.image("a").number)
            await running.pool.vdisk_delete("a")
            await running.reclaimed()
        assert numbers == {1}


@pytest.mark.parametrize("level", [1, 2])
async def test_damage_in_a_deleted_image_is_reported_and_stops_nothing_else(level: int) -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.write("a", 0, data(1, 600))
        await running.pool.vdisk_create("b", LEAF_BYTES)
        await running.write("b", 0, data(2, 10))
        await running.checkpoint()
        node = running.image("a").tree.nodes[level][0]
        memory = running.memory
        vbn = node.vbn
    memory = memory.copy()
    good = bytearray(BLOCK_BYTES)
    memory.try_readv([good], vbn * BLOCK_BYTES)
    memory.try_writev([b"\xff" * BLOCK_BYTES], vbn * BLOCK_BYTES, BLOCK_BYTES)
    async with opened(memory) as running:
        await running.pool.vdisk_delete("a")
        await running.pool.vdisk_delete("b")
        await running.until(
            lambda: (
                "reclaim.failed" in running.event_names()
                and running.pool.show()["deleted_images"] == 1
            )
        )
        assert running.pool.show()["deleted_images"] == 1  # it stays until the pool is opened again
        memory.try_writev([good], vbn * BLOCK_BYTES, BLOCK_BYTES)
    async with opened(memory.copy()) as running:
        await running.reclaimed()


async def test_writers_to_a_full_pool_do_not_wait_for_a_reclaim_that_has_failed() -> None:
    async with new_pool(8 << 20, decorate=FaultyDevice) as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.pool.vdisk_create("b", 1 << 30)
        await running.write("a", 0, data(1, 600))
        with suppress(PoolFull):
            for index in range(2000):
                await running.write("b", index * BLOCK_BYTES, data(index))
        await running.checkpoint()
        tree = running.image("a").tree
        tree.nodes[1].clear()
        device = running.device
        device.faults.append(Fault("read", nth=device.calls["read"] + 1, forever=True))
        await running.pool.vdisk_delete("a")
        await running.until(lambda: "reclaim.failed" in running.event_names())
        with pytest.raises(PoolFull):
            await running.write("b", 1 << 29, data(1, 64))
        device.faults.clear()
