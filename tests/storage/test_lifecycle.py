"""Create, resize, rename, delete: vdisks, snapshots and clones, also when several want the same at
once.
"""

import asyncio
import gc
from contextlib import suppress

import pytest

from storage.backdoor.reclaim import Reclaim
from storage.errors import Conflict, NotFound, PoolFull, PoolReadOnly, VolumeClosed
from storage.images.catalogue import Catalogue
from storage.images.image import Image
from storage.images.record import encode
from storage.layout import BLOCK_BYTES, KIND_SNAPSHOT, KIND_VDISK, VDISK_BYTES_MAX, VDISK_BYTES_MIN
from storage.state.pool_state import PoolState
from storage.vdisks.lifecycle import new_record
from tests.storage.devices import READ, SYNC, WRITE, DelayDevice, Fault, FaultyDevice, MemoryDevice
from tests.storage.pools import (
    LEAF_BYTES,
    Delayed,
    backed_clone,
    data,
    new_pool,
    open_on,
    opened,
    within,
)


async def test_what_was_made_is_there_after_a_restart() -> None:
    async with new_pool() as running:
        made = await running.pool.vdisk_create("a", 10 << 20)
        await running.write("a", BLOCK_BYTES, data(1, 3))
        await running.pool.snapshot_create([("a", "s")])
        await running.pool.clone_create("a", "s", "c")
        memory = running.memory
    async with opened(memory.copy()) as running:
        assert running.pool.names() == ["a", "c"]
        shown = await running.pool.vdisk_show("a")
        assert (shown["uuid"], shown["size_bytes"], shown["used_bytes"]) == (
            made["uuid"],
            10 << 20,
            3 * BLOCK_BYTES,
        )
        assert shown["snapshots"] == ["s"]
        assert (await running.pool.vdisk_show("c"))["backing"] == "a@s"
        for name in ("a", "a@s", "c"):
            assert await running.read(name, 0, 4 * BLOCK_BYTES) == bytes(BLOCK_BYTES) + data(1, 3)


@pytest.mark.parametrize("size", [VDISK_BYTES_MIN, VDISK_BYTES_MAX], ids=["smallest", "largest"])
async def test_the_smallest_and_the_largest_vdisk_hold_data_at_both_ends(size: int) -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", size)
        await running.write("a", 0, data(1))
        await running.write("a", size - BLOCK_BYTES, data(2))
        await running.pool.snapshot_create([("a", "s")])
        await running.pool.clone_create("a", "s", "c")
        await running.zero("a", 0, size)
        assert await running.read("a", size - BLOCK_BYTES, BLOCK_BYTES) == bytes(BLOCK_BYTES)
        assert await running.read("c", size - BLOCK_BYTES, BLOCK_BYTES) == data(2)
        await running.zero("c", 0, size)
        assert await running.read("c", size - BLOCK_BYTES, BLOCK_BYTES) == bytes(BLOCK_BYTES)
        assert await running.read("a@s", size - BLOCK_BYTES, BLOCK_BYTES) == data(2)


async def test_invariant_4_a_snapshot_never_changes() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        before = data(1, 600)
        await running.write("a", 0, before)
        await running.pool.snapshot_create([("a", "s")])
        await running.write("a", 0, data(2, 300))
        await running.zero("a", 300 * BLOCK_BYTES, 200 * BLOCK_BYTES)
        await running.pool.vdisk_resize("a", LEAF_BYTES)
        assert await running.read("a@s", 0, len(before)) == before
        await running.checkpoint()
        assert await running.read("a@s", 0, len(before)) == before


async def test_a_group_of_snapshots_is_made_whole_or_not_at_all() -> None:
    async with new_pool() as running:
        for name in ("a", "b"):
            await running.pool.vdisk_create(name, 1 << 20)
        await running.pool.snapshot_create([("b", "taken")])
        with pytest.raises(Conflict, match="b@taken exists already"):
            await running.pool.snapshot_create([("a", "taken"), ("b", "taken")])
        assert [row["name"] for row in await running.pool.snapshot_list()] == ["b@taken"]


async def test_of_two_who_want_the_same_name_one_gets_it() -> None:
    async with new_pool() as running:
        results = await within(
            asyncio.gather(
                *(running.pool.vdisk_create("a", 1 << 20) for _ in range(2)), return_exceptions=True
            )
        )
        assert sorted(type(result).__name__ for result in results) == ["Conflict", "dict"]


async def test_two_renames_and_two_deletions_of_one_thing_at_once() -> None:
    """What a change finds in the freeze counts, not what it saw before; and none of them ends the
    consistency points.
    """
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 1 << 20)
        results = await within(
            asyncio.gather(
                running.pool.vdisk_rename("a", "b"),
                running.pool.vdisk_rename("a", "c"),
                return_exceptions=True,
            )
        )
        assert [type(result).__name__ for result in results] == ["dict", "NotFound"]
        await running.pool.snapshot_create([("b", "s")])
        results = await within(
            asyncio.gather(
                running.pool.snapshot_delete("b", "s"),
                running.pool.snapshot_delete("b", "s"),
                return_exceptions=True,
            )
        )
        assert results[0] is True and isinstance(results[1], NotFound)
        await running.reclaimed()
        assert running.pool.names() == ["b"]


async def test_sessions_go_on_after_a_rename_and_snapshots_are_found_under_the_new_name() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 1 << 20)
        await running.pool.snapshot_create([("a", "s")])
        volume, snapshot = running.volume("a"), running.volume("a@s")
        volume.attach("session")
        await running.pool.vdisk_rename("a", "b")
        assert (volume.name, snapshot.name) == ("b", "b@s")
        await running.write("b", 0, data(1))
        assert volume.try_read(0, BLOCK_BYTES) == data(1)
        with pytest.raises(NotFound, match="no vdisk a"):
            running.volume("a")


async def test_counters_stay_when_nobody_holds_the_volume_and_go_with_the_image() -> None:
    """Found by CI: `cleavectl stats` showed zeros as soon as the last session had ended."""
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 1 << 20)
        await running.write("a", 0, data(1))
        await running.read("a", 0, BLOCK_BYTES)
        gc.collect()
        counters = running.volume("a").counters
        assert (counters.writes, counters.written_bytes, counters.reads, counters.read_bytes) == (
            1,
            BLOCK_BYTES,
            1,
            BLOCK_BYTES,
        )
        await running.pool.vdisk_delete("a")
        await running.reclaimed()
        await running.pool.vdisk_create("a", 1 << 20)
        assert running.volume("a").counters.writes == 0


async def test_a_vdisk_in_use_cannot_be_deleted_and_stays_usable() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        volume = running.volume("a")
        delayed.device.hold(WRITE)
        write = running.begin_write("a", 0, data(1))
        await running.until(lambda: delayed.device.held(WRITE) == 1)
        deletion = asyncio.create_task(running.pool.vdisk_delete("a"))
        await asyncio.sleep(0)
        volume.attach("late session")  # after the deletion has looked, before it is done
        delayed.device.release(WRITE)
        await within(write)
        with pytest.raises(Conflict, match="late session"):
            await within(deletion)
        await running.write("a", BLOCK_BYTES, data(2))
        assert await running.read("a", 0, 2 * BLOCK_BYTES) == data(1) + data(2)
        volume.detach("late session")
        await running.pool.vdisk_delete("a")
        with pytest.raises(VolumeClosed):
            volume.try_read(0, BLOCK_BYTES)


async def test_a_new_vdisk_is_not_mistaken_for_a_deleted_one_of_its_number() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 1 << 20)
        left_over = running.volume("a")
        number = left_over.image.number
        await running.pool.vdisk_delete("a")
        await running.reclaimed()
        await running.pool.vdisk_create("b", 1 << 20)
        assert running.image("b").number == number
        await running.write("b", 0, data(1))
        with pytest.raises(VolumeClosed):
            left_over.try_read(0, BLOCK_BYTES)


async def test_a_volume_that_is_asked_for_during_the_deletion_takes_nothing() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        delayed.device.hold(SYNC)
        deletion = asyncio.create_task(running.pool.vdisk_delete("a"))
        await asyncio.sleep(0)
        with pytest.raises(VolumeClosed):
            await running.write("a", 0, data(1))
        delayed.device.release(SYNC)
        await within(deletion)
        await running.reclaimed()


async def test_a_snapshot_is_read_right_while_it_is_being_made() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        await running.write("a", 0, data(1))
        delayed.device.hold(WRITE)
        making = asyncio.create_task(running.pool.snapshot_create([("a", "s")]))
        await running.until(lambda: delayed.device.held(WRITE) > 0)
        assert running.volume("a@s").try_read(0, BLOCK_BYTES) is None
        read = running.begin_read("a@s", 0, BLOCK_BYTES)
        await asyncio.sleep(0)
        delayed.device.release(WRITE)
        await within(making)
        assert await within(read) == data(1)
        assert "block.damaged" not in running.event_names()


async def test_a_read_that_meets_the_deletion_of_its_snapshot_fails_and_returns_no_zeros() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        await running.write("a", 0, data(1))
        await running.pool.snapshot_create([("a", "s")])
        await running.write("a", 0, data(2))
        delayed.device.hold(READ)
        reads = [running.begin_read("a@s", 0, BLOCK_BYTES) for _ in range(2)]
        await running.until(lambda: delayed.device.held(READ) > 0)
        deletion = asyncio.create_task(running.pool.snapshot_delete("a", "s"))
        await asyncio.sleep(0.01)
        delayed.device.release(READ)
        await within(deletion)
        for read in reads:
            with pytest.raises(VolumeClosed):
                await within(read)


async def test_a_shrunk_vdisk_that_grows_again_has_zeros_there() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 3 * LEAF_BYTES)
        await running.write("a", 0, data(1, 700))
        await running.pool.vdisk_resize("a", 100 * BLOCK_BYTES)
        assert running.volume("a").size_bytes == 100 * BLOCK_BYTES
        await running.pool.vdisk_resize("a", 1 << 40)
        assert await running.read("a", 0, 700 * BLOCK_BYTES) == data(1, 700)[
            : 100 * BLOCK_BYTES
        ] + bytes(600 * BLOCK_BYTES)
        await running.write("a", (1 << 40) - BLOCK_BYTES, data(2))
        assert await running.read("a", (1 << 40) - BLOCK_BYTES, BLOCK_BYTES) == data(2)


async def test_a_shrunk_clone_that_grows_again_does_not_show_its_backing_store_there() -> None:
    async with new_pool() as running:
        content = await backed_clone(running, 600)
        await running.pool.vdisk_resize("clone", 300 * BLOCK_BYTES)
        await running.pool.vdisk_resize("clone", 700 * BLOCK_BYTES)
        expected = content[: 300 * BLOCK_BYTES] + bytes(400 * BLOCK_BYTES)
        assert await running.read("clone", 0, 700 * BLOCK_BYTES) == expected
        await running.pool.split_start("clone", "copy")
        await running.split_ended("clone")
        assert await running.read("clone", 0, 700 * BLOCK_BYTES) == expected


async def test_what_hangs_on_a_thing_keeps_it_from_being_deleted() -> None:
    async with new_pool() as running:
        await backed_clone(running)
        with pytest.raises(Conflict, match="has snapshots: delete base@snap first"):
            await running.pool.vdisk_delete("base")
        with pytest.raises(
            Conflict, match="is the backing store of clone: split or delete those first"
        ):
            await running.pool.snapshot_delete("base", "snap")
        await running.pool.vdisk_delete("clone")
        assert await running.pool.snapshot_delete("base", "snap")
        await running.pool.vdisk_delete("base")
        await running.reclaimed()
        assert running.pool.names() == [] and running.pool.show()["deleted_images"] == 0


async def test_a_snapshot_marked_for_it_goes_with_its_last_clone() -> None:
    async with new_pool() as running:
        await backed_clone(running)
        await running.pool.clone_create("base", "snap", "other")
        assert not await running.pool.snapshot_delete("base", "snap", after_split=True)
        await running.pool.split_start("clone", "share")
        await running.split_ended("clone")
        assert [row["clones"] for row in await running.pool.snapshot_list("base")] == [["other"]]
        await running.pool.vdisk_delete("other")
        assert await running.pool.snapshot_list("base") == []
        await running.reclaimed()


@pytest.mark.parametrize("restart", [False, True])
async def test_a_marked_snapshot_that_is_read_when_its_last_clone_lets_go_is_deleted_afterwards(
    restart: bool,
) -> None:
    async with new_pool() as running:
        await backed_clone(running)
        await running.pool.snapshot_delete("base", "snap", after_split=True)
        volume = running.pool.volume("base@snap")
        volume.attach("a reader")
        await running.pool.split_start("clone", "share")
        await running.split_ended("clone")
        assert len(await running.pool.snapshot_list("base")) == 1
        stopped = running.memory.copy()
        volume.detach("a reader")
        await running.pool.consistency_point()
        assert await running.pool.snapshot_list("base") == []
    if restart:
        async with opened(stopped) as running:
            await running.pool.consistency_point()
            assert await running.pool.snapshot_list("base") == []


async def test_a_pool_that_takes_no_changes_makes_none_in_memory_either() -> None:
    async with new_pool(decorate=lambda memory: FaultyDevice(memory)) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        running.device.faults.append(Fault(SYNC, nth=running.device.calls[SYNC] + 1, forever=True))
        with pytest.raises(Exception, match="planted fault"):
            await running.write("a", 0, data(1), fua=True)
        for change in (
            lambda: running.pool.vdisk_create("b", 1 << 20),
            lambda: running.pool.vdisk_rename("a", "b"),
            lambda: running.pool.vdisk_delete("a"),
            lambda: running.pool.snapshot_create([("a", "s")]),
        ):
            with pytest.raises(PoolReadOnly, match="failed to make data durable"):
                await within(change())
        assert running.pool.names() == ["a"]
        assert await running.read("a", 0, BLOCK_BYTES) == data(1)


async def test_commands_that_come_while_the_pool_closes_or_later_are_answered() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        await running.write("a", 0, data(1))
        delayed.device.hold(SYNC)
        closing = asyncio.create_task(running.close())
        await running.until(lambda: delayed.device.held(SYNC) > 0)
        late = asyncio.create_task(running.pool.vdisk_create("b", 1 << 20))
        with pytest.raises(VolumeClosed):
            await running.write("a", 0, data(2))
        with pytest.raises(VolumeClosed):
            await running.flush("a")
        delayed.device.release(SYNC)
        await within(closing)
        # It may just have caught the last consistency point.
        made = (await within(asyncio.gather(late, return_exceptions=True)))[0]
        assert isinstance(made, dict | VolumeClosed)
        with pytest.raises(VolumeClosed, match="closing"):
            await within(running.pool.vdisk_create("c", 1 << 20))
        memory = running.memory
        running.pool._state.fail("closed")  # new_pool asks this one for no more checks
    reopened = await open_on(memory.copy())
    assert reopened.pool.names() == (["a", "b"] if isinstance(made, dict) else ["a"])
    assert await reopened.read("a", 0, BLOCK_BYTES) == data(1)
    await reopened.close()


def test_a_chain_of_clones_may_be_longer_than_the_interpreter_nests_calls() -> None:
    catalogue, depth = Catalogue(PoolState(MemoryDevice(1 << 20), 0, 1 << 20)), 5000
    for number in range(1, depth + 1):
        record = new_record(
            KIND_VDISK if number == depth else KIND_SNAPSHOT, f"v{number}", LEAF_BYTES, 1
        )
        record.backing, record.origin = number - 1, number
        catalogue.read_entry(number, bytes(encode(record)))
    catalogue.numbers_known()
    image: Image | None = catalogue.vdisk(f"v{depth}")
    for number in range(depth, 0, -1):
        assert image is not None and image.number == number and catalogue.image(number) is image
        image = image.backing
    assert image is None


async def test_a_pool_that_closes_ends_what_is_under_way_and_answers_before_the_device_goes() -> (
    None
):
    """Found by the store fuzzer: a shrink, and a live check, went on against a closed device."""
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 64 * LEAF_BYTES)
        for index in range(64):
            await running.write("a", index * LEAF_BYTES, data(index))
        await running.checkpoint()
        memory = await running.crashed()
    device = DelayDevice(memory)
    running = await open_on(memory, device)
    device.hold(READ)
    works = [running.pool.vdisk_resize("a", LEAF_BYTES), running.pool.check()]
    tasks = [asyncio.ensure_future(work) for work in works]
    await running.until(lambda: device.held(READ) >= 2)
    closing = asyncio.create_task(running.pool.close())
    outcomes = await within(asyncio.gather(*tasks, return_exceptions=True))
    assert all(isinstance(outcome, VolumeClosed) for outcome in outcomes), outcomes
    device.release(READ)
    await within(closing)
    with pytest.raises(VolumeClosed):
        await running.pool.vdisk_create("b", LEAF_BYTES)
    running.closed = True


async def test_a_write_that_waits_for_a_reclaim_ends_when_the_pool_closes() -> None:
    """Found by the store fuzzer: a snapshot that was deleted last posted a reclaim that nobody
    carried out, and writes waited for it.
    """
    async with new_pool(8 << 20) as running:
        await running.pool.vdisk_create("a", 1 << 30)
        with suppress(PoolFull):
            for index in range(4000):
                await running.write("a", index * BLOCK_BYTES, data(index))
        handler = running.pool._handler
        await handler.stop()
        running.pool._post_reclaim(running.image("a"))
        assert not handler.holds(Reclaim)
        with pytest.raises(PoolFull):
            await running.write("a", 1 << 29, data(1))
