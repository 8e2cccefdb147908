"""Buffer trees: a block that the last consistency point can reach is never changed, and memory
stays bounded.
"""

import asyncio

import pytest

from storage.layout import BLOCK_BYTES, HOLE, ZERO_POINTER
from storage.tree.node import (
    CACHE_NODES_MIN,
    CLEAN,
    HOLES,
    NODE_BYTES,
    ZEROS,
    Node,
    NodeCache,
    filled_buffer,
)
from tests.storage.devices import READ, DelayDevice
from tests.storage.pools import LEAF_BYTES, data, new_pool, opened, within


async def test_a_node_moves_once_an_epoch_and_its_old_place_is_left_as_it_was() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.write("a", 0, data(1, 600))
        await running.checkpoint()
        tree = running.image("a").tree
        old = {
            (node.level, node.index): (node.vbn, bytes(node.buf))
            for level in (1, 2)
            for node in tree.nodes[level].values()
        }
        for seed in range(5):
            await running.write("a", seed * BLOCK_BYTES, data(seed + 2))
        moved = {
            place for place, (vbn, _) in old.items() if tree.nodes[place[0]][place[1]].vbn != vbn
        }
        assert moved == {(1, 0), (2, 0)}
        assert (
            len(
                [
                    vbn
                    for vbn in running.pool._state.epoch.ledger.freed
                    if vbn in {vbn for vbn, _ in old.values()}
                ]
            )
            == 2
        )
        for vbn, content in old.values():
            found = bytearray(BLOCK_BYTES)
            running.memory._read([found], vbn * BLOCK_BYTES)
            assert found == content


async def test_looking_up_beyond_a_tree_and_under_holes_and_zero_pointers() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 1 << 40)
        tree = running.image("a").tree
        assert tree.peek(0) is HOLES and tree.peek(1 << 50) is HOLES
        await running.write("a", 0, data(1))
        assert tree.peek(1) is HOLES and tree.peek(1 << 19) is HOLES and tree.peek(1 << 50) is HOLES
        await running.pool.snapshot_create([("a", "s")])
        await running.pool.clone_create("a", "s", "c")
        await running.zero("c", 0, 1 << 40)
        clone = running.image("c").tree
        assert clone.peek(0) is ZEROS and clone.peek(12345) is ZEROS
        await running.write(
            "c", 5 * LEAF_BYTES, data(2)
        )  # a pointer block made where a zero pointer was says zeros, not holes
        node = clone.peek(5)
        assert (
            node is not None
            and int(node.vbns()[0]) > ZERO_POINTER
            and set(node.vbns()[1:].tolist()) == {ZERO_POINTER}
        )
        assert HOLES.buf == filled_buffer(HOLE) and ZEROS.buf == filled_buffer(ZERO_POINTER)


async def test_one_load_serves_all_who_wait_for_it() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.write("a", 0, data(1, 600))
        await running.checkpoint()
        memory = running.memory.copy()
    device = DelayDevice(memory)
    async with opened(memory, device) as running:
        device.hold(READ)
        tree = running.image("a").tree
        loads = [asyncio.create_task(tree.load(index)) for index in (0, 1, 2, 0, 1, 2)]
        await asyncio.sleep(0.01)
        assert device.held(READ) == 1  # the root, for all of them
        loads.pop().cancel()
        device.release(READ)
        nodes = await within(asyncio.gather(*loads))
        assert (
            nodes[0] is nodes[3]
            and nodes[1] is nodes[4]
            and [node.index for node in nodes] == [0, 1, 2, 0, 1]
        )


async def test_a_tree_that_grows_while_a_block_is_loaded_finds_it_all_the_same() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1, 10))
        await running.checkpoint()
        memory = running.memory.copy()
    device = DelayDevice(memory)
    async with opened(memory, device) as running:
        await running.pool.vdisk_create(
            "b", LEAF_BYTES
        )  # now the maps are in memory, and only the tree has to be read
        device.hold(READ)
        read = running.begin_read("a", 0, 10 * BLOCK_BYTES)
        await running.until(lambda: device.held(READ) > 0)
        await within(running.pool.vdisk_resize("a", 1 << 50))
        device.release(READ)
        assert await within(read) == data(1, 10)
        assert running.image("a").tree.levels == 5
        await running.write("a", (1 << 50) - BLOCK_BYTES, data(2))
        assert await running.read("a", 0, 10 * BLOCK_BYTES) == data(1, 10)


@pytest.mark.parametrize("miss_rate", [0.0, 0.3])
async def test_a_cache_far_too_small_for_the_pool_costs_time_and_nothing_else(
    miss_rate: float,
) -> None:
    leaves = CACHE_NODES_MIN + 150
    async with new_pool(
        64 << 20, cache_bytes=1, deferred=miss_rate > 0, miss_rate=miss_rate
    ) as running:
        await running.pool.vdisk_create("a", leaves * LEAF_BYTES)
        for index in range(leaves):
            await running.write("a", index * LEAF_BYTES, data(index))
        await running.checkpoint()
        await running.pool.snapshot_create([("a", "s")])
        for index in range(0, leaves, 3):
            await running.write("a", index * LEAF_BYTES, data(index + 5000))
        await running.checkpoint()
        for index in range(leaves):
            expected = data(index) if index % 3 else data(index + 5000)
            assert await running.read("a", index * LEAF_BYTES, BLOCK_BYTES) == expected
            assert await running.read("a@s", index * LEAF_BYTES, BLOCK_BYTES) == data(index)
            await asyncio.sleep(0)  # what one step loads may be above the limit until the next turn
        assert running.pool.show()["cached_nodes"] <= CACHE_NODES_MIN + 8
        assert running.pool._state.cache.held == 0


async def turns() -> None:
    """As many turns of the event loop as a large eviction takes."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_cache_that_outgrew_its_limit_while_all_was_dirty_comes_back_to_it() -> None:
    cache = NodeCache(0)

    class Tree:
        def __init__(self) -> None:
            self.nodes: list[dict[int, Node]] = [{}, {}]

    tree = Tree()

    def add(index: int, dirty: bool) -> Node:
        node = Node(tree, 1, index, bytearray(BLOCK_BYTES), 100 + index, 1)  # type: ignore[arg-type]
        node.epoch = 1 if dirty else CLEAN
        tree.nodes[1][index] = node
        cache.add(node)
        return node

    dirty = [add(index, dirty=True) for index in range(3 * CACHE_NODES_MIN)]
    await turns()
    assert len(cache) == len(tree.nodes[1]) == 3 * CACHE_NODES_MIN  # what is dirty stays
    with cache.hold() as hold:
        hold.keep(dirty[7])
        for node in dirty:
            node.epoch = CLEAN
        for index in range(2 * CACHE_NODES_MIN):
            add(10000 + index, dirty=False)
        assert (
            len(cache) == len(tree.nodes[1]) == 5 * CACHE_NODES_MIN
        )  # within a step nothing is evicted
        await turns()
        assert len(cache) == len(tree.nodes[1]) <= CACHE_NODES_MIN + 1
        assert tree.nodes[1][7] is dirty[7] and cache.held == 1  # what is held stays
    assert cache.held == dirty[7].holds == 0
    for index in range(CACHE_NODES_MIN):
        add(20000 + index, dirty=True)
    await turns()
    for node in list(tree.nodes[1].values()):
        node.epoch = CLEAN
    cache.trim()  # as a consistency point does when it has made many nodes clean
    await turns()
    assert len(cache) == len(tree.nodes[1]) == CACHE_NODES_MIN
    assert CACHE_NODES_MIN * NODE_BYTES < 2 << 20


async def test_a_block_in_memory_whose_parent_was_evicted_can_still_be_changed() -> None:
    """With a device that has nothing at hand, the event loop went round for ever: the block was
    there, so its parent was never loaded.
    """
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 1 << 20)
        stopped = running.memory.copy(deferred=True, miss_rate=1.0, seed=1)
    async with opened(stopped) as running:
        await running.pool.vdisk_create("b", 1 << 20)
        tree = running.pool.rooms.active_map.tree
        assert tree.nodes[0] and tree.levels == 1
        tree.nodes[1].clear()
        await within(running.pool.vdisk_create("c", 1 << 20))
        assert running.pool.names() == ["a", "b", "c"]
