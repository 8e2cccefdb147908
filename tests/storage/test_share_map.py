"""The share map: references beyond the first, exact at every moment for pointer blocks, and after a
consistency point for data.
"""

from storage.layout import BLOCK_BYTES, LOG_FIRST_VBN
from tests.storage.pools import LEAF_BYTES, OpenPool, data, new_pool


async def count(running: OpenPool, vbn: int) -> int:
    return await running.pool.rooms.share_map.count(vbn)


async def test_counts_follow_snapshots_and_lazy_copies() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.write("a", 0, data(1, 600))
        await running.checkpoint()
        tree = running.image("a").tree
        root, leaves = tree.root_vbn, [node.vbn for node in tree.nodes[1].values()]
        assert [await count(running, vbn) for vbn in (root, *leaves)] == [0, 0, 0, 0]
        await running.pool.snapshot_create([("a", "s")])
        await running.pool.snapshot_create([("a", "t")])
        assert [await count(running, vbn) for vbn in (root, *leaves)] == [2, 0, 0, 0]
        blocks = [int(vbn) for vbn in tree.nodes[1][0].vbns()]
        await running.write("a", 0, data(2))  # copies the root and the first leaf
        assert [await count(running, vbn) for vbn in (root, *leaves)] == [1, 0, 1, 1]
        await running.checkpoint()
        assert [await count(running, vbn) for vbn in (root, *leaves)] == [1, 0, 1, 1]
        assert [await count(running, vbn) for vbn in blocks[:3]] == [0, 1, 1]
        await running.pool.snapshot_delete("a", "s")
        await running.reclaimed()
        assert [await count(running, vbn) for vbn in (root, *leaves)] == [0, 0, 1, 1]
        await running.pool.snapshot_delete("a", "t")
        await running.reclaimed()
        assert [await count(running, vbn) for vbn in leaves[1:]] == [0, 0]
        assert [await count(running, vbn) for vbn in blocks[:3]] == [0, 0, 0]


async def test_one_block_may_have_more_references_than_sixteen_bits_count() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1))
        await running.checkpoint()
        state, root = running.pool._state, running.image("a").tree.root_vbn
        for change in (70000, 1):
            state.epoch.ledger.count_pointer(root, change)
            running.image("a").touch()
            await running.checkpoint()
        assert await count(running, root) == 70001
        state.epoch.ledger.count_pointer(root, -70001)
        running.image("a").touch()
        await running.checkpoint()
        assert await count(running, root) == 0


async def test_a_reference_too_many_let_go_of_stops_the_pool() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1))
        await running.checkpoint()
        vbn = int(running.image("a").tree.nodes[1][0].vbns()[0])
        running.pool._state.epoch.ledger.dropped += [vbn, vbn]
        running.image("a").touch()
        point = running.pool.rooms.requests.request()
        await running.until(point.done)
        assert (
            "holds fewer references to VBN" in str(point.exception())
            or running.pool.show()["read_only"]
        )
        assert f"VBN {vbn} " in running.pool.show()["read_only_reason"]
        assert await running.read("a", 0, BLOCK_BYTES) == data(1)


async def test_the_map_stays_sparse() -> None:
    async with new_pool(256 << 20) as running:
        await running.pool.vdisk_create("a", 1 << 30)
        for index in range(40):
            await running.write("a", index * LEAF_BYTES, data(index, 20))
        await running.checkpoint()
        tree = running.pool.rooms.share_map.tree
        assert tree.root_vbn == 0  # nothing is shared
        await running.pool.snapshot_create([("a", "s")])
        assert await running.pool.rooms.share_map.count(LOG_FIRST_VBN) == 0
        assert sum(1 for node in tree.nodes[0].values() if node.vbn) == 1
