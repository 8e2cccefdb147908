"""Long writes: installed by slices, they leave the same vdisk, counts and free space as writes
block by block.
"""

import random

import pytest

from storage.data.long_write import LONG_BYTES_MIN, PIECE_BYTES
from storage.layout import BLOCK_BYTES
from tests.storage.pools import LEAF_BYTES, new_pool

DISK_BYTES = 4 * LEAF_BYTES


def noise(seed: int, length_bytes: int) -> bytes:
    return random.Random(seed).randbytes(length_bytes)


@pytest.mark.parametrize(
    "length", [LONG_BYTES_MIN, PIECE_BYTES, PIECE_BYTES + BLOCK_BYTES, LEAF_BYTES]
)
@pytest.mark.parametrize("offset", [0, BLOCK_BYTES, LEAF_BYTES - BLOCK_BYTES])
async def test_a_long_write_over_old_blocks_snapshots_and_holes(offset: int, length: int) -> None:
    async with new_pool() as running:
        pool = running.pool
        await pool.vdisk_create("a", DISK_BYTES)
        model = bytearray(DISK_BYTES)

        async def write(at: int, data: bytes) -> None:
            await running.write("a", at, data)
            model[at : at + len(data)] = data

        await write(offset + 3 * BLOCK_BYTES, noise(1, 2 * BLOCK_BYTES))  # old blocks of its own
        await pool.snapshot_create([("a", "s")])
        before = bytes(model)
        await write(
            offset + 4 * BLOCK_BYTES, noise(2, BLOCK_BYTES)
        )  # one that the snapshot does not share
        await write(offset, noise(3, length))
        await write(offset, noise(4, length))
        assert await running.read("a", 0, DISK_BYTES) == model
        assert await running.read("a@s", 0, DISK_BYTES) == before
        found = await pool.check()
        assert found["ok"], found["errors"]
        shown = await pool.vdisk_show("a")
        assert shown["used_bytes"] == length


async def test_zero_blocks_within_become_zero_pointers() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", DISK_BYTES)
        data = noise(1, 3 * BLOCK_BYTES) + bytes(2 * BLOCK_BYTES) + noise(2, LONG_BYTES_MIN)
        await running.write("a", 0, data)
        assert await running.read("a", 0, len(data)) == data
        assert (await running.pool.vdisk_show("a"))["used_bytes"] == len(data) - 2 * BLOCK_BYTES


async def test_a_running_split_hears_of_every_hole_that_a_long_write_fills() -> None:
    async with new_pool() as running:
        pool = running.pool
        await pool.vdisk_create("a", DISK_BYTES)
        await running.write("a", 0, noise(1, DISK_BYTES))
        await pool.snapshot_create([("a", "s")])
        await pool.clone_create("a", "s", "c")
        await pool.split_start("c", "copy", rate_max_bytes=BLOCK_BYTES)
        await running.until(lambda: pool.split_show("c")["counted"])
        await pool.split_pause("c")
        filled = DISK_BYTES // 2 + BLOCK_BYTES
        await running.write("c", filled, noise(2, LEAF_BYTES))
        shown = pool.split_show("c")
        assert shown["counted"]
        assert shown["holes_remaining"] == await running.holes("c") > 0
        await pool.split_cancel("c")
        await pool.split_start("c", "copy")
        assert (await running.split_ended("c"))["state"] == "done"
        expected = bytearray(noise(1, DISK_BYTES))
        expected[filled : filled + LEAF_BYTES] = noise(2, LEAF_BYTES)
        assert await running.read("c", 0, DISK_BYTES) == expected
        found = await pool.check()
        assert found["ok"], found["errors"]
