"""Space: a pool is filled to the last block, refuses properly, and comes back; and filling and
freeing again and again leaks nothing.
"""

import errno
import os
from typing import Any

import pytest

from storage.errors import PoolFull, StorageError
from storage.pool import Pool
from tests.crash.determinism import VirtualLoop, repeatable, run_to_the_end
from tests.crash.oracle import BLOCK_BYTES, SECTORS_PER_BLOCK, data
from tests.crash.recording import PageDevice
from tests.crash.session import CACHE_BYTES, Client, abandon, open_steady, read_block, step
from tests.crash.verify import checked
from tests.storage.devices import FullHostDevice

POOL_BYTES = 8 << 20
DISK_BLOCKS = 4096
# A thousand in the long form.
CYCLES = 1000 if os.environ.get("CLEAVED_LONG") else 25
CHUNK_BLOCKS = 32


async def filled(client: Client, name: str, version: int) -> int:
    """Write until the pool is full; returns how many blocks were taken."""
    for fbn in range(0, DISK_BLOCKS, CHUNK_BLOCKS):
        count = CHUNK_BLOCKS * SECTORS_PER_BLOCK
        try:
            await client.write(
                name, fbn * SECTORS_PER_BLOCK, data(name, fbn * SECTORS_PER_BLOCK, count, version)
            )
        except PoolFull:
            return fbn + await filled_singly(client, name, version, fbn)
    raise AssertionError("the pool takes more than it can hold")


async def filled_singly(client: Client, name: str, version: int, first: int) -> int:
    for step_blocks in range(CHUNK_BLOCKS):
        lba = (first + step_blocks) * SECTORS_PER_BLOCK
        try:
            await client.write(name, lba, data(name, lba, SECTORS_PER_BLOCK, version))
        except PoolFull:
            return step_blocks
    return CHUNK_BLOCKS


async def background(pool: Pool) -> None:
    while await step(pool):
        pass
    await pool.consistency_point()


def in_virtual_time(work: Any) -> Any:
    loop = VirtualLoop()
    try:
        with repeatable():
            return run_to_the_end(loop, work)
    finally:
        loop.close()


async def fill_and_go_on(sparse: bool) -> None:
    pages = PageDevice(POOL_BYTES)
    device = FullHostDevice(pages) if sparse else pages
    await Pool.format(device)
    pool = await open_steady(device)
    client = Client(pool)
    await pool.vdisk_create("a", DISK_BLOCKS * BLOCK_BYTES)
    await client.write("a", 0, data("a", 0, 64 * SECTORS_PER_BLOCK, 1))
    await pool.snapshot_create([("a", "old")])
    taken = await filled(client, "a", 2)
    with pytest.raises(StorageError) as refused:
        await client.write("a", (taken + 1) * SECTORS_PER_BLOCK, data("a", 0, SECTORS_PER_BLOCK, 3))
    assert refused.value.errno == errno.ENOSPC
    # Everything else works: reads, flushes, consistency points, deletion.
    assert await read_block(pool.volume("a"), taken - 1) == data(
        "a", (taken - 1) * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK, 2
    )
    await client.flush("a")
    await pool.consistency_point()
    await pool.snapshot_delete("a", "old")
    await background(pool)
    await client.write(
        "a",
        (taken + 1) * SECTORS_PER_BLOCK,
        data("a", (taken + 1) * SECTORS_PER_BLOCK, 16 * SECTORS_PER_BLOCK, 3),
    )
    await pool.consistency_point()
    checked(pages.pages, POOL_BYTES, "after a full pool went on")
    assert not pool.show()["read_only"]
    await abandon(pool)


@pytest.mark.parametrize("sparse", [False, True], ids=["device", "file"])
def test_a_full_pool_refuses_writes_and_goes_on_when_a_snapshot_is_deleted(sparse: bool) -> None:
    """In a sparse file, nodes come from what the host has set aside: the last blocks go to whom
    they are for all the same.
    """
    in_virtual_time(fill_and_go_on(sparse))


async def fill_and_free(cycles: int) -> None:
    device = PageDevice(POOL_BYTES)
    await Pool.format(device)
    pool = await Pool.open_on(device, CACHE_BYTES)
    await abandon(pool)
    device.closed = False
    pool = await open_steady(device)
    client = Client(pool)
    amounts: set[int] = set()
    used: set[int] = set()
    for cycle in range(cycles):
        await pool.vdisk_create("a", DISK_BLOCKS * BLOCK_BYTES)
        taken = await filled(client, "a", cycle)
        if cycle % 3 == 0:
            await client.unmap("a", 0, DISK_BLOCKS * SECTORS_PER_BLOCK)
        await pool.vdisk_delete("a")
        await background(pool)
        await pool.consistency_point()
        if cycle:  # in the first one the metafiles grow to what they stay at
            amounts.add(taken)
            used.add(pool.show()["used_bytes"])
        checked(device.pages, POOL_BYTES, f"after cycle {cycle}")
    await abandon(pool)
    assert len(used) == 1, f"space goes: {sorted(used)}"
    assert max(amounts) - min(amounts) <= CHUNK_BLOCKS, f"less and less fits in: {sorted(amounts)}"


def test_filling_and_freeing_again_and_again_leaks_nothing() -> None:
    in_virtual_time(fill_and_free(CYCLES))
