"""The write allocator: contiguous where it can, never twice, never what is in use, never early; and
nothing is lost.
"""

import itertools

import numpy as np
import pytest

from storage.allocation.active_map import count_bits
from storage.allocation.map_changes import packed
from storage.allocation.reserve import map_blocks, tree_blocks
from storage.allocation.write_allocator import WriteAllocator
from storage.epoch.epoch import Epoch
from storage.errors import PoolFull
from storage.layout import LOG_FIRST_VBN, REGION_BLOCKS, log_blocks
from storage.pool import Pool
from storage.tree.attempt import when_possible
from storage.tree.node import Hold
from tests.storage.devices import MemoryDevice
from tests.storage.pools import data, new_pool, within

SMALL_BLOCKS = 2048
TWO_REGIONS = 2 * REGION_BLOCKS


async def fresh(blocks: int) -> Pool:
    """A pool that was formatted and is not running: nothing but the test allocates."""
    memory = MemoryDevice(blocks * 4096)
    await Pool.format(memory)
    pool = await Pool.open_on(memory)
    await pool.rooms.points.stop()
    await pool.rooms.handler.stop()
    return pool


def vbns(extents: list[tuple[int, int]] | None) -> list[int]:
    assert extents is not None
    return [vbn for first, length in extents for vbn in range(first, first + length)]


async def take_all(allocator: WriteAllocator, count: int) -> list[int]:
    """Take ``count`` blocks at a time until the allocator says that the pool is full."""
    taken: list[int] = []
    while True:
        try:
            taken += vbns(await take(allocator, count))
        except PoolFull:
            return taken


async def take(
    allocator: WriteAllocator, count: int, borrowed: bool = False
) -> list[tuple[int, int]]:
    """``WriteAllocator.take``, waiting where it must."""
    return await when_possible(allocator._state, lambda: allocator.take(count, borrowed))


async def take_nodes(allocator: WriteAllocator, epoch: Epoch, grows: bool) -> int:
    """Take nodes one at a time until the allocator says that the pool is full; returns how many."""
    for count in itertools.count():
        try:
            await when_possible(
                allocator._state,
                lambda: (
                    allocator.nodes_at_hand(1, allocator.floor(epoch, grows), entry=False) or None
                ),
            )
        except PoolFull:
            return count
        allocator.take_node(epoch.ledger)
    raise AssertionError


async def test_a_batch_is_one_run() -> None:
    pool = await fresh(SMALL_BLOCKS)
    allocator = pool.rooms.allocator
    first = allocator.take(20)
    second = allocator.take(5)
    assert first is not None and second is not None
    assert (len(first), len(second)) == (1, 1)
    assert second[0][0] == first[0][0] + 20


@pytest.mark.parametrize(
    ("blocks", "count"),
    [(SMALL_BLOCKS, 1), (SMALL_BLOCKS, 7), (TWO_REGIONS, 100), (TWO_REGIONS, 5000)],
    ids=str,
)
async def test_every_free_block_but_the_reserve_is_handed_out_and_none_twice(
    blocks: int, count: int
) -> None:
    pool = await fresh(blocks)
    allocator = pool.rooms.allocator
    used = pool.show()["used_bytes"] // 4096
    taken = await take_all(allocator, count)
    assert len(set(taken)) == len(taken)
    assert allocator.reserve_blocks <= allocator.free_now < allocator.reserve_blocks + count
    assert len(taken) == blocks - used - allocator.free_now
    assert min(taken) >= LOG_FIRST_VBN + log_blocks(blocks) and max(taken) < blocks
    for vbn in taken:
        region, offset = divmod(vbn, REGION_BLOCKS)
        bits = pool.rooms.active_map.peek_bits(region)
        assert bits is not None and not bits[offset >> 3] >> (offset & 7) & 1


async def test_what_is_given_back_is_handed_out_again() -> None:
    pool = await fresh(SMALL_BLOCKS)
    allocator = pool.rooms.allocator
    free = allocator.free_now
    one, two = allocator.take(10), allocator.take(10)
    assert one is not None and two is not None
    allocator.give_back(one)
    allocator.give_back(two)
    assert allocator.free_now == free
    taken = await take_all(allocator, 1)
    assert set(vbns(one) + vbns(two)) <= set(taken) and len(set(taken)) == len(taken)


async def test_what_grows_what_moves_and_consistency_points_have_each_a_part_of_the_reserve() -> (
    None
):
    pool = await fresh(SMALL_BLOCKS)
    state, allocator = pool._state, pool.rooms.allocator
    await take_all(allocator, 1)
    epoch = state.epoch
    assert (
        await take_nodes(allocator, epoch, grows=True)
        == allocator.reserve_blocks - allocator.client_floor
        >= 32
    )
    with pytest.raises(PoolFull):
        await take(allocator, allocator.client_floor - allocator.borrow_floor + 1, borrowed=True)
    borrowed = await take(allocator, allocator.client_floor - allocator.borrow_floor, borrowed=True)
    assert (
        await take_nodes(allocator, epoch, grows=False)
        == allocator.borrow_floor - allocator.move_floor
        >= 8
    )
    assert allocator.move_floor - allocator.point_floor >= 8  # for the entries of what is deleted
    allocator.give_back(borrowed)
    with pytest.raises(PoolFull):
        await take(allocator, 1)
    epoch.ledger.allocated.extend(
        await take(allocator, allocator.free_now - allocator.borrow_floor, borrowed=True)
    )
    allocator.promise()
    state.frozen, state.epoch = epoch, Epoch(epoch.number + 1)
    assert await take_nodes(allocator, epoch, grows=True) == allocator.borrow_floor
    assert allocator.free_now + allocator.promised_blocks == 0
    taken = vbns(epoch.ledger.allocated)
    assert len(set(taken)) == len(taken)


async def test_a_window_that_holds_the_last_blocks_gives_them_to_who_needs_them() -> None:
    """Data has claimed a window and stops at its floor; nodes find the rest of it."""
    pool = await fresh(SMALL_BLOCKS)
    allocator = pool.rooms.allocator
    assert allocator._fill(allocator._data, 1)
    window = allocator._data.left_blocks
    await take_all(allocator, 1)
    assert window > 1 and allocator._data.left_blocks < window
    assert (
        await take_nodes(allocator, pool._state.epoch, grows=True)
        == allocator.reserve_blocks - allocator.client_floor
    )


async def test_a_run_over_the_border_of_two_regions_is_given_back_whole() -> None:
    pool = await fresh(TWO_REGIONS)
    allocator = pool.rooms.allocator
    taken: list[tuple[int, int]] = []
    while not taken or taken[-1][0] + taken[-1][1] <= REGION_BLOCKS + 16:
        taken += await take(allocator, 16)
    before = [extent for extent in taken if extent[0] >= REGION_BLOCKS - 64]
    claimed = sum(map(count_bits, allocator._claims._claimed.values()))
    allocator.give_back(before)
    assert allocator._data.next < REGION_BLOCKS < allocator._data.end
    left = (
        allocator._data.end
        - allocator._data.next
        + sum(end - first for first, end in allocator._data.runs)
    )
    allocator.release_data_window()
    assert sum(map(count_bits, allocator._claims._claimed.values())) == claimed - left


async def test_what_an_epoch_holds_is_not_handed_out_before_its_release() -> None:
    pool = await fresh(SMALL_BLOCKS)
    allocator = pool.rooms.allocator
    held = packed(np.arange(1000, 1100))
    free = allocator.free_now
    allocator.hold(0, held)
    allocator.free_now -= 100  # as if they had been in use until now
    assert allocator.held_blocks == 100
    taken = await take_all(allocator, 1)
    assert not set(taken) & set(range(1000, 1100))
    allocator.release({0: held})
    assert allocator.held_blocks == 0
    more = await take_all(allocator, 1)
    assert not set(taken) & set(more) and len(more) == 100
    assert len(taken) + len(more) == free - allocator.reserve_blocks


async def test_overwriting_a_little_again_and_again_stays_within_a_part_of_a_large_pool() -> None:
    """A sparse pool file would otherwise grow to its whole size, whatever its vdisks hold."""
    blocks = 4 * REGION_BLOCKS
    async with new_pool(blocks * 4096) as running:
        await running.pool.vdisk_create("a", 64 << 20)
        allocator, highest = running.pool.rooms.allocator, 0
        for turn in range(40):
            for offset in range(0, 16 << 20, 1 << 20):
                await running.write("a", offset, data(turn, 256))
            await running.checkpoint()
            highest = max(highest, allocator._data.next)
        assert highest < blocks / 2  # 640 MiB were written, more than the pool holds


async def test_batches_stay_contiguous_where_single_blocks_were_freed() -> None:
    pool = await fresh(TWO_REGIONS)
    allocator = pool.rooms.allocator
    allocator.adopt(0, REGION_BLOCKS)
    allocator._claims._cursor = REGION_BLOCKS
    freed = packed(
        np.concatenate(
            (np.arange(20000, 30000, 2), np.arange(31000, 31015), np.arange(32000, 32016))
        )
    )
    allocator.settle(0, freed)
    allocator.hold(0, freed)
    allocator.release({0: freed})
    assert allocator.take(16) == [(32000, 16)]
    following = vbns(allocator.take(16))
    assert (
        following == list(range(following[0], following[0] + 16)) and following[0] >= REGION_BLOCKS
    )


async def test_a_window_with_less_than_is_wanted_waits_for_the_next_map_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found by review: with a few blocks left and the next region's map not in memory, a write went
    round for ever without a turn.
    """
    pool = await fresh(TWO_REGIONS)
    allocator, active_map = pool.rooms.allocator, pool.rooms.active_map
    present, absent = active_map.peek_used, {1}
    monkeypatch.setattr(
        type(active_map),
        "peek_used",
        lambda self, region: None if region in absent else present(region),
    )

    async def load(self: object, region: int, hold: Hold) -> None:
        absent.discard(region)

    monkeypatch.setattr(type(active_map), "load", load)
    allocator._claims._cursor = REGION_BLOCKS - 30  # thirty blocks to the end of the first region
    assert allocator.take(48) is None
    assert len(vbns(await within(take(allocator, 48)))) == 48


async def test_the_last_free_blocks_may_lie_in_the_other_window() -> None:
    """Found by review: a pool of some 100 MiB that got full hung instead of saying so."""
    pool = await fresh(TWO_REGIONS)
    allocator = pool.rooms.allocator
    assert allocator.nodes_at_hand(1, 0, entry=False)  # its window now holds a thousand blocks
    taken = await take_all(allocator, 64)
    assert allocator.reserve_blocks <= allocator.free_now < allocator.reserve_blocks + 64
    assert len(set(taken)) == len(taken)


async def test_room_for_new_images_is_asked_for() -> None:
    pool = await fresh(SMALL_BLOCKS)
    allocator = pool.rooms.allocator
    allocator.check_room(100)
    with pytest.raises(PoolFull, match="delete snapshots or vdisks"):
        allocator.check_room(SMALL_BLOCKS)


@pytest.mark.parametrize("size_blocks", [2048, 1 << 18, 1 << 24, 1 << 28, 1 << 32])
def test_the_reserve_covers_all_maps_and_is_a_small_part_of_the_pool(size_blocks: int) -> None:
    shares, regions = -(-size_blocks // 1024), -(-size_blocks // REGION_BLOCKS)
    assert shares + regions < map_blocks(size_blocks) < 1.01 * (shares + regions) + 16
    assert map_blocks(size_blocks) < size_blocks * 0.02


def test_blocks_of_a_tree() -> None:
    assert [tree_blocks(size) for size in (1, 256, 257, 65536, 65537)] == [
        2,
        257,
        257 + 2 + 1,
        65536 + 256 + 1,
        65537 + 257 + 2 + 1,
    ]


async def test_a_pool_that_is_nearly_full_is_filled_without_a_pause_for_ever() -> None:
    """Free blocks in many small holes: each write gathers several, and nobody goes round in
    circles.
    """
    async with new_pool(8 << 20) as running:
        await running.pool.vdisk_create("a", 1 << 30)
        written = 0
        try:
            while True:
                await running.write("a", written * 4096, bytes([written % 250 + 1]) * 4096)
                written += 1
        except PoolFull:
            pass
        for fbn in range(0, written, 3):
            await running.zero("a", fbn * 4096, 4096)
        await running.checkpoint()
        await running.checkpoint()
        free = running.pool.show()["available_bytes"] // 4096
        assert free > 300
        await running.write("a", 1 << 29, b"x" * 4096 * (free - 20))
        found = await running.read("a", 1 << 29, 4096 * (free - 20))
        assert found == b"x" * 4096 * (free - 20)
