"""The counters of the format have fixed widths: long before one would wrap, what makes it grow is
refused, with words that help.
"""

import asyncio

import numpy as np
import pytest

from storage.errors import Conflict, NotByReference, PoolReadOnly, RequestError
from storage.layout import BLOCK_BYTES, CP_LAST, CP_WARNED_FROM, SHARES_CROWDED, SHARES_MAX
from storage.pool import Pool
from storage.superblock.superblock import decode
from tests.storage.devices import MemoryDevice
from tests.storage.pools import (
    LEAF_BYTES,
    POOL_BYTES,
    OpenPool,
    backed_clone,
    completion,
    data,
    new_pool,
    open_on,
    opened,
    settle,
    within,
)


async def at_point(number: int) -> MemoryDevice:
    """A pool at rest with a written vdisk, whose last consistency point has that number."""
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1))
    memory = running.memory.copy()
    for vbn in (0, 1):
        block = bytearray(BLOCK_BYTES)
        memory._read([block], vbn * BLOCK_BYTES)
        superblock = decode(block)
        assert superblock is not None
        superblock.cp_number = number
        memory._write([superblock.encode()], vbn * BLOCK_BYTES)
    return memory


async def test_half_way_through_the_cp_numbers_the_pool_says_so_once() -> None:
    async with opened(await at_point(CP_WARNED_FROM - 3)) as running:
        assert "pool.cp_number_high" not in running.event_names()
        for index in range(4):
            await running.write("a", 0, data(index + 2))
            await running.checkpoint()
        assert running.event_names().count("pool.cp_number_high") == 1
    async with opened(running.memory.copy()) as running:
        assert [
            fields["cp_number_last"]
            for name, fields in running.events
            if name == "pool.cp_number_high"
        ] == [CP_LAST]
        assert await running.read("a", 0, BLOCK_BYTES) == data(5)


async def test_at_the_last_number_the_pool_turns_read_only_with_everybody_answered() -> None:
    """Found from outside: a consistency point of number 2^32 left the write that asked for it
    without an answer.
    """
    running = await open_on(await at_point(CP_LAST - 3))
    for index in range(2):
        await running.write("a", 0, data(index + 2), fua=True)
        await running.checkpoint()
    write = running.begin_write("a", BLOCK_BYTES, data(9), fua=True)
    points = [
        asyncio.ensure_future(running.pool.consistency_point()),
        asyncio.ensure_future(running.pool.vdisk_create("b", LEAF_BYTES)),
    ]
    outcomes = await within(asyncio.gather(*points, return_exceptions=True))
    assert all(
        isinstance(outcome, PoolReadOnly) and "copy its vdisks into a new pool" in str(outcome)
        for outcome in outcomes
    )
    acknowledged = not isinstance(
        (await within(asyncio.gather(write, return_exceptions=True)))[0], Exception
    )
    with pytest.raises(PoolReadOnly, match="the last that a pool can count"):
        await running.write("a", 0, data(7))
    assert running.event_names().count("pool.read_only") == 1
    await running.close()
    running = await open_on(running.memory.copy())
    assert running.pool.show()["read_only"]
    assert await running.read("a", 0, BLOCK_BYTES) == data(3)
    assert await running.read("a", BLOCK_BYTES, BLOCK_BYTES) == data(9) or not acknowledged
    await running.close()


async def referred_to(running: OpenPool, references: int) -> int:
    """Give the first block of vdisk "base" that many references beyond the first, as far as the
    share map knows. Returns its VBN.
    """
    state, share_map = running.pool._state, running.pool.rooms.share_map
    vbn = int(running.image("base").tree.nodes[1][0].vbns()[0])
    node = await share_map.tree.load(vbn >> 10, 0)
    if node.tree is None:
        state.epoch.ledger.added.append(np.array([vbn], dtype=np.uint64))
        running.image("base").touch()
        await running.checkpoint()
        node = await share_map.tree.load(vbn >> 10, 0)
    memoryview(node.buf).cast("I")[vbn & 1023] = references - 1
    state.epoch.ledger.added.append(np.array([vbn], dtype=np.uint64))
    running.image("base").touch()
    return vbn


def begin_copy(running: OpenPool) -> "asyncio.Future[None]":
    done = completion()
    running.volume("clone").copy_from(
        running.volume("base"), 0, 512 * BLOCK_BYTES, BLOCK_BYTES, lambda error: settle(done, error)
    )
    return done


async def test_what_leads_to_more_references_is_refused_while_a_block_has_very_many() -> None:
    memory = MemoryDevice(POOL_BYTES)
    await Pool.format(memory)
    running = await open_on(
        memory
    )  # and no check at the end, which would find that these references are made up
    await backed_clone(running)
    vbn = await referred_to(running, SHARES_CROWDED)
    await running.checkpoint()
    await within(begin_copy(running))  # one more: now it has too many
    assert ("references.crowded", vbn) in [
        (name, fields.get("vbn")) for name, fields in running.events
    ]
    with pytest.raises(NotByReference, match="more than 2147483648 references"):
        await within(begin_copy(running))
    with pytest.raises(Conflict, match="trim or delete copies"):
        await running.pool.snapshot_create([("base", "more")])
    with pytest.raises(Conflict, match="trim or delete copies"):
        await running.pool.split_start("clone", "share")
    await running.write("clone", 0, data(5))
    await running.zero("clone", 512 * BLOCK_BYTES, BLOCK_BYTES)
    await running.checkpoint()
    await running.pool.snapshot_create([("base", "more")])
    await running.close()


async def test_a_share_count_never_wraps() -> None:
    """Found from outside: 2^32 references became 0, and the block was free while others read it."""
    async with new_pool() as running:
        await backed_clone(running)
        durable = running.memory.copy()
        await referred_to(running, SHARES_MAX + 1)
        with pytest.raises(PoolReadOnly, match="more references than can be counted"):
            await running.checkpoint()
        running.memory._pages = durable.copy()._pages
    async with opened(durable) as running:
        assert await running.read("base", 0, BLOCK_BYTES) == data(1, 300)[:BLOCK_BYTES]


@pytest.mark.parametrize("rates", [(-1, 0), (0, 1 << 64), (1 << 63, 1 << 63)])
async def test_a_rate_that_the_table_cannot_hold_is_refused_and_costs_nothing(
    rates: tuple[int, int],
) -> None:
    """Of the kind: it made the next consistency point fail, and the pool read-only."""
    async with new_pool() as running:
        await backed_clone(running)
        with pytest.raises(RequestError):
            await running.pool.split_start("clone", "copy", *rates)
        await running.write("base", 0, data(2), fua=True)
        await running.checkpoint()
