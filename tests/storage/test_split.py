"""The split: nothing that a client reads changes, client writes win, counts are exact, and it
always ends (design section 5).
"""

import asyncio
from functools import partial
from typing import Any

import pytest

from storage.backdoor.handler import BackdoorMessageHandler
from storage.data.read_path import NOTHING, locate
from storage.errors import BlockDamaged, Conflict, NotFound, RequestError, StorageError
from storage.layout import BLOCK_BYTES
from storage.split import job as split_job
from storage.state.pool_state import PoolState
from tests.storage.devices import READ, SYNC, WRITE, MemoryDevice
from tests.storage.pools import (
    LEAF_BYTES,
    Delayed,
    OpenPool,
    backed_clone,
    checked_offline,
    data,
    new_pool,
    opened,
    within,
)

MODES = ("copy", "share")
BOTH_MODES = pytest.mark.parametrize("mode", MODES)


def used_blocks(running: OpenPool) -> int:
    return int(running.pool.show()["used_bytes"]) // BLOCK_BYTES


async def stuck_in_reading(running: OpenPool, delayed: Delayed, name: str = "clone") -> None:
    """Start a copy split that has counted its holes and waits for the data behind the first of
    them.
    """
    await running.holes(name)  # now all pointer blocks are in memory, and only data is read
    delayed.device.hold(READ)
    await running.pool.split_start(name, "copy")
    await running.until(
        lambda: running.pool.split_show(name)["counted"] and delayed.device.held(READ) > 0
    )


async def ended(running: OpenPool, name: str = "clone") -> dict[str, Any]:
    shown = await running.split_ended(name)
    assert (shown["state"], shown["reason"], shown["backing"], shown["holes_remaining"]) == (
        "done",
        None,
        None,
        0,
    ), shown
    return shown


@BOTH_MODES
async def test_invariant_4_a_split_never_changes_what_a_client_reads(mode: str) -> None:
    async with new_pool() as running:
        content = await backed_clone(running, 700)
        await running.write("clone", 10 * BLOCK_BYTES, data(2, 3))
        await running.zero("clone", 300 * BLOCK_BYTES, 100 * BLOCK_BYTES)
        expected = (
            content[: 10 * BLOCK_BYTES] + data(2, 3) + content[13 * BLOCK_BYTES : 300 * BLOCK_BYTES]
        )
        expected += (
            bytes(100 * BLOCK_BYTES) + content[400 * BLOCK_BYTES :] + bytes(100 * BLOCK_BYTES)
        )
        assert await running.read("clone", 0, len(expected)) == expected
        await running.pool.split_start("clone", mode)
        shown = await ended(running)
        assert shown["blocks_copied" if mode == "copy" else "blocks_shared"] == 700 - 3 - 100
        assert await running.read("clone", 0, len(expected)) == expected
        assert (await running.pool.vdisk_show("clone"))["backing"] is None
        assert await running.pool.snapshot_delete("base", "snap")
        await running.pool.vdisk_delete("base")
        await running.reclaimed()
        assert await running.read("clone", 0, len(expected)) == expected


@BOTH_MODES
async def test_a_split_is_shown_as_done_only_when_no_crash_can_bring_it_back(mode: str) -> None:
    """Found by the model test: it was shown as done from the freeze of its last consistency point
    on; and by the store fuzzer: lists showed it so.
    """
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await backed_clone(running, 300)
        await running.checkpoint()
        await running.pool.split_start("clone", mode)
        delayed.device.hold(SYNC)
        await running.until(lambda: running.image("clone").backing is None)
        shown = running.pool.split_show("clone")
        assert (shown["state"], shown["backing"]) == ("running", "base@snap")
        (clone,) = [row for row in await running.pool.vdisk_list() if row["name"] == "clone"]
        assert (clone["split"], clone["backing"]) == ("running", "base@snap")
        (snapshot,) = await running.pool.snapshot_list()
        assert snapshot["clones"] == ["clone"]
        async with opened(await running.crashed()) as after:
            assert after.pool.split_show("clone")["state"] == "running"
            await ended(after)
        delayed.device.release(SYNC)
        await ended(running)
        async with opened(await running.crashed()) as after:
            assert after.pool.split_show("clone")["state"] == "done"


async def test_a_marked_backing_store_is_listed_until_the_end_of_the_split_is_durable() -> None:
    """Found by the store fuzzer: a clone was listed with a backing store that was not."""
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await backed_clone(running, 300)
        await running.pool.snapshot_delete("base", "snap", after_split=True)
        await running.pool.split_start("clone", "share")
        delayed.device.hold(SYNC)
        await running.until(lambda: running.image("clone").backing is None)
        (clone,) = [row for row in await running.pool.vdisk_list() if row["name"] == "clone"]
        assert [row["name"] for row in await running.pool.snapshot_list()] == [clone["backing"]]
        delayed.device.release(SYNC)
        await ended(running)
        await running.checkpoint()
        assert await running.pool.snapshot_list() == []


@BOTH_MODES
async def test_space_used_after_a_split_is_what_was_expected_to_the_block(mode: str) -> None:
    async with new_pool() as running:
        await backed_clone(running, 512)
        await running.checkpoint()
        before = used_blocks(running)
        await running.pool.split_start("clone", mode)
        await ended(running)
        await running.checkpoint()
        # copy: the data, two level-1 blocks and a root. share: the two level-1 blocks are the
        # backing store's, and even its root. Beside them the share map may get its first block and
        # root.
        most = {"copy": 512 + 3, "share": 0}[mode]
        assert most <= used_blocks(running) - before <= most + 2
        shown = await running.pool.vdisk_show("clone")
        assert shown["used_bytes"] == 512 * BLOCK_BYTES
        assert shown["exclusive_bytes"] == (512 * BLOCK_BYTES if mode == "copy" else 0)


async def test_share_mode_shares_a_whole_subtree_as_one_pointer_block() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("base", 1 << 40)
        for index in (0, 1, 77, 255, 256, 300):
            await running.write("base", index * LEAF_BYTES, data(index, 2))
        await running.pool.snapshot_create([("base", "snap")])
        await running.pool.clone_create("base", "snap", "clone")
        await running.write("clone", 300 * LEAF_BYTES, data(9))
        await running.checkpoint()
        before = used_blocks(running)
        await running.pool.split_start("clone", "share")
        shown = await ended(running)
        assert shown["blocks_shared"] == 11
        await running.checkpoint()
        assert (
            used_blocks(running) - before <= 2
        )  # the share map's first block and root, and no pointer block
        for index in (0, 1, 77, 255, 256):
            assert await running.read("clone", index * LEAF_BYTES, 2 * BLOCK_BYTES) == data(
                index, 2
            )
        assert (
            await running.read("clone", 300 * LEAF_BYTES, 2 * BLOCK_BYTES)
            == data(9) + data(300, 2)[BLOCK_BYTES:]
        )
        await running.write("clone", 77 * LEAF_BYTES, data(10))
        assert await running.read("base@snap", 77 * LEAF_BYTES, BLOCK_BYTES) == data(77)


async def test_a_client_write_that_comes_first_wins_and_the_copy_is_dropped() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        content = await backed_clone(running, 300)
        await stuck_in_reading(running, delayed)
        delayed.device.hold(WRITE)
        write = running.begin_write("clone", 5 * BLOCK_BYTES, data(2))
        await running.until(lambda: delayed.device.held(WRITE) == 1)
        delayed.device.release(READ)
        await running.until(
            lambda: delayed.device.held(WRITE) > 1
        )  # the copies, behind the client's write
        zero = running.begin_zero("clone", 7 * BLOCK_BYTES, BLOCK_BYTES)
        await running.until(lambda: locate(running.image("clone"), 7) == NOTHING)
        delayed.device.release(WRITE)
        await within(write)
        await within(zero)
        shown = await ended(running)
        assert shown["blocks_copied"] == 298
        expected = (
            content[: 5 * BLOCK_BYTES]
            + data(2)
            + content[6 * BLOCK_BYTES : 7 * BLOCK_BYTES]
            + bytes(BLOCK_BYTES)
        )
        assert await running.read("clone", 0, 8 * BLOCK_BYTES) == expected
        allocator = running.pool.rooms.allocator
        await running.checkpoint()
        await running.checkpoint()
        size = running.pool.show()["size_bytes"] // BLOCK_BYTES
        assert allocator.free_now == size - used_blocks(
            running
        )  # the dropped copies are free again


async def test_holes_remaining_is_exact_after_every_client_operation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(split_job, "RECOUNT_SECONDS", 0.0)
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await backed_clone(running, 700)
        await stuck_in_reading(running, delayed)

        async def exact() -> int:
            shown = running.pool.split_show("clone")
            assert shown["counted"]
            assert shown["holes_remaining"] == await running.holes("clone")
            return int(shown["holes_remaining"])

        assert await exact() == 700
        await running.write("clone", 3 * BLOCK_BYTES, data(2, 2))  # fills two holes
        assert await exact() == 698
        await running.write("clone", 3 * BLOCK_BYTES, data(3, 3))  # one more
        assert await exact() == 697
        await running.write(
            "clone", 20 * BLOCK_BYTES, bytes(BLOCK_BYTES)
        )  # zeros hide what is behind
        assert await exact() == 696
        await running.write("clone", 900 * BLOCK_BYTES, data(4, 5))  # nothing behind
        assert await exact() == 696
        await running.zero("clone", 3 * BLOCK_BYTES, 2 * BLOCK_BYTES)  # no hole among them
        assert await exact() == 696
        await running.pool.snapshot_create([("clone", "s")])
        assert await exact() == 696
        await running.zero(
            "clone", 400 * BLOCK_BYTES, 50 * BLOCK_BYTES
        )  # how many holes is not known at once
        assert not running.pool.split_show("clone")["counted"]
        await running.pool.split_pause("clone")
        delayed.device.release(READ)
        await running.pool.split_resume("clone")
        shown = await ended(running)
        assert shown["blocks_copied"] == 696 - 50


async def test_a_count_under_way_is_not_taken_for_exact_after_a_crash() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await running.pool.vdisk_create("base", 1 << 40)
        for index in range(0, 1500, 3):
            await running.write("base", index * LEAF_BYTES, data(index))
        await running.pool.snapshot_create([("base", "snap")])
        await running.pool.clone_create("base", "snap", "clone")
        await running.pool.split_start("clone", "copy")
        await running.until(lambda: running.pool.split_show("clone")["holes_remaining"] > 0)
        assert running.pool.split_show("clone")["phase"] == "counting"
        delayed.device.hold(READ)
        await running.checkpoint()
        memory = running.memory.copy()
        delayed.device.release(READ)
        await ended(running)
    checked_offline(memory)
    async with opened(memory) as running:
        assert (await ended(running))["blocks_copied"] == 500


@BOTH_MODES
async def test_a_split_goes_on_where_it_was_after_a_crash(mode: str) -> None:
    async with new_pool() as running:
        content = await backed_clone(running, 1200, 16 * LEAF_BYTES)
        await running.pool.split_start("clone", mode)
        images = []
        while running.pool.split_show("clone")["state"] == "running":
            await running.checkpoint()
            images.append(running.memory.copy())
        await ended(running)
    for memory in images[:: max(1, len(images) // 3)]:
        checked_offline(memory)
        async with opened(memory) as running:
            await ended(running)
            assert await running.read("clone", 0, len(content)) == content


async def test_pause_holds_over_a_restart_and_resume_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        split_job, "BLOCKS_IDLE", 1
    )  # the message under way must not end the split, however idle the pool seems
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        content = await backed_clone(running, 600)
        await stuck_in_reading(running, delayed)
        assert (await running.pool.split_pause("clone"))["state"] == "paused"
        delayed.device.release(READ)
        memory = running.memory
    async with opened(memory.copy()) as running:
        shown = running.pool.split_show("clone")
        assert shown["state"] == "paused" and running.pool.split_list() == [shown]
        assert shown["holes_remaining"] == await running.holes("clone") > 0
        with pytest.raises(
            Conflict, match="is paused and cannot pause: possible now: cancel, resume"
        ):
            await running.pool.split_pause("clone")
        await running.pool.split_resume("clone")
        await ended(running)
        assert await running.read("clone", 0, len(content)) == content


async def test_cancel_keeps_the_clone_a_clone_and_start_begins_anew() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        content = await backed_clone(running, 600)
        await stuck_in_reading(running, delayed)
        # The next start comes before the cancel is durable: it must not lose its job to it.
        _, again = await within(
            asyncio.gather(
                running.pool.split_cancel("clone"), running.pool.split_start("clone", "share")
            )
        )
        assert again["mode"] == "share"
        delayed.device.release(READ)
        assert (await ended(running))["mode"] == "share"
        assert await running.read("clone", 0, len(content)) == content
        assert running.pool.split_list() == []


async def test_a_clone_can_be_renamed_resized_snapshot_and_deleted_during_its_split() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        content = await backed_clone(running, 600)
        await stuck_in_reading(running, delayed)
        await running.pool.vdisk_rename("clone", "renamed")
        await running.pool.snapshot_create([("renamed", "s")])
        await running.pool.vdisk_resize("renamed", 400 * BLOCK_BYTES)
        await running.pool.vdisk_resize("renamed", 1 << 40)
        delayed.device.release(READ)
        await ended(running, "renamed")
        assert await running.read("renamed", 0, 600 * BLOCK_BYTES) == content[
            : 400 * BLOCK_BYTES
        ] + bytes(200 * BLOCK_BYTES)
        assert await running.read("renamed@s", 0, 600 * BLOCK_BYTES) == content
        await running.pool.snapshot_delete("renamed", "s")
        await running.pool.clone_create("base", "snap", "clone")
        await stuck_in_reading(running, delayed)
        await running.pool.vdisk_delete("clone")
        assert running.pool.split_list() == []
        delayed.device.release(READ)
        await running.reclaimed()
        with pytest.raises(NotFound):
            running.pool.split_show("clone")


@BOTH_MODES
async def test_chains_of_clones_are_split_block_by_block_through_all_their_backing_stores(
    mode: str,
) -> None:
    async with new_pool() as running:
        content = await backed_clone(running, 600, name="middle")
        await running.write("middle", 100 * BLOCK_BYTES, data(2, 50))
        await running.zero("middle", 200 * BLOCK_BYTES, 50 * BLOCK_BYTES)
        await running.pool.snapshot_create([("middle", "m")])
        await running.pool.clone_create("middle", "m", "top")
        await running.write("top", 120 * BLOCK_BYTES, data(3))
        layers = bytearray(content)
        for first, layer in ((100, data(2, 50)), (200, bytes(50 * BLOCK_BYTES)), (120, data(3))):
            layers[first * BLOCK_BYTES : first * BLOCK_BYTES + len(layer)] = layer
        expected = bytes(layers)
        assert await running.read("top", 0, len(expected)) == expected
        await running.pool.split_start("top", mode)
        assert (await ended(running, "top"))["holes_total"] == 600 - 50 - 1
        assert await running.read("top", 0, len(expected)) == expected
        await running.pool.snapshot_delete("middle", "m")
        await running.pool.vdisk_delete("middle")
        await running.pool.snapshot_delete("base", "snap")
        await running.pool.vdisk_delete("base")
        await running.reclaimed()
        assert await running.read("top", 0, len(expected)) == expected


@BOTH_MODES
@pytest.mark.parametrize("blocks", [1, 255, 300, 512, 70000], ids=str)
async def test_clones_that_were_shrunk_or_grown_are_split_as_far_as_they_see(
    mode: str, blocks: int
) -> None:
    async with new_pool() as running:
        content = await backed_clone(running, 700)
        await running.pool.vdisk_resize("clone", blocks * BLOCK_BYTES)
        await running.pool.split_start("clone", mode)
        assert (await ended(running))["holes_total"] == min(blocks, 700)
        seen = min(blocks, 800) * BLOCK_BYTES
        assert await running.read("clone", 0, seen) == (content + bytes(100 * BLOCK_BYTES))[:seen]


async def test_the_snapshot_goes_when_it_is_marked_for_that() -> None:
    async with new_pool() as running:
        content = await backed_clone(running, 600)
        await running.pool.snapshot_delete("base", "snap", after_split=True)
        await running.pool.vdisk_list()
        await running.pool.split_start("clone", "copy")
        await ended(running)
        assert await running.pool.snapshot_list() == []
        await running.pool.vdisk_delete("base")
        await running.reclaimed()
        assert await running.read("clone", 0, len(content)) == content


async def test_a_damaged_block_behind_the_clone_fails_the_split_and_says_where() -> None:
    async with new_pool() as running:
        await backed_clone(running, 300)
        await running.write("clone", 0, data(2, 5))
        location = locate(running.image("base@snap"), 17)
        assert location is not None
        running.memory.try_writev([b"\xff" * BLOCK_BYTES], location[0] * BLOCK_BYTES, BLOCK_BYTES)
        await running.pool.split_start("clone", "copy")
        shown = await running.split_ended("clone")
        assert (
            shown["state"] == "failed"
            and f"byte {17 * BLOCK_BYTES} " in shown["reason"]
            and "damaged" in shown["reason"]
        )
        assert "split.failed" in running.event_names()
        assert await running.read("clone", 0, BLOCK_BYTES) == data(2)
        await running.write(
            "clone", 17 * BLOCK_BYTES, data(3)
        )  # over the damage; now nothing is in the way
        await running.write("base", 17 * BLOCK_BYTES, data(4))
        await running.pool.split_start("clone", "copy")
        await ended(running)
        await running.pool.snapshot_delete("base", "snap")
        await running.reclaimed()


async def test_a_client_write_is_not_stopped_half_way_by_a_damaged_pointer_block_behind_the_clone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The count of holes looks behind the clone in the middle of the installation."""
    monkeypatch.setattr(split_job, "BLOCKS_IDLE", 1)
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await backed_clone(running, 700)
        await stuck_in_reading(running, delayed)
        await running.pool.split_pause("clone")
        delayed.device.release(READ)
        await running.until(lambda: not running.pool.rooms.handler._queue)
        tree = running.image("base@snap").tree
        leaf = tree.nodes[1].pop(2)
        running.memory.try_writev([b"\xff" * BLOCK_BYTES], leaf.vbn * BLOCK_BYTES, BLOCK_BYTES)
        await running.write("clone", 520 * BLOCK_BYTES, data(5, 4))
        assert await running.read("clone", 520 * BLOCK_BYTES, 4 * BLOCK_BYTES) == data(5, 4)
        assert not running.pool.split_show("clone")["counted"]
        with pytest.raises(BlockDamaged):
            await running.read("clone", 600 * BLOCK_BYTES, BLOCK_BYTES)
        running.memory.try_writev([bytes(leaf.buf)], leaf.vbn * BLOCK_BYTES, BLOCK_BYTES)
        await running.checkpoint()


async def test_a_message_that_fails_after_its_split_was_paused_ends_nothing_else() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        content = await backed_clone(running, 300)
        location = locate(running.image("base@snap"), 17)
        assert location is not None
        good = bytearray(BLOCK_BYTES)
        running.memory.try_readv([good], location[0] * BLOCK_BYTES)
        running.memory.try_writev([b"\xff" * BLOCK_BYTES], location[0] * BLOCK_BYTES, BLOCK_BYTES)
        await stuck_in_reading(running, delayed)
        await running.pool.split_pause("clone")
        delayed.device.release(READ)
        await running.until(lambda: "block.damaged" in running.event_names())
        assert running.pool.split_show("clone")["state"] == "paused"
        running.memory.try_writev([good], location[0] * BLOCK_BYTES, BLOCK_BYTES)
        await running.pool.split_resume("clone")
        await ended(running)
        assert await running.read("clone", 0, len(content)) == content


def copied_some(running: OpenPool, name: str) -> bool:
    return bool(running.pool.split_show(name)["blocks_copied"])


async def test_buffers_do_not_grow_with_the_number_of_splits() -> None:
    """Found by review: every split that had copied once kept eight of its own, also when its clone
    was deleted.
    """
    async with new_pool(256 << 20) as running:
        await running.pool.vdisk_create("base", 4 * LEAF_BYTES)
        await running.write("base", 0, data(1, 1024))
        await running.pool.snapshot_create([("base", "snap")])
        for number in range(6):
            name = f"c{number}"
            await running.pool.clone_create("base", "snap", name)
            await running.pool.split_start(name, "copy")
            await running.until(partial(copied_some, running, name))
        splits = running.pool._splits
        assert len(splits._buffers._free) <= split_job.BLOCKS_IDLE
        for number in range(6):
            await running.pool.vdisk_delete(f"c{number}")
        await running.until(lambda: not splits._buffers._free)
        assert not splits._jobs


async def test_estimate_says_what_a_copy_would_move() -> None:
    async with new_pool() as running:
        await backed_clone(running, 700)
        await running.write("clone", 0, data(2, 30))
        estimate = await running.pool.split_estimate("clone")
        assert (estimate["blocks_to_copy"], estimate["bytes_to_copy"]) == (670, 670 * BLOCK_BYTES)
        with pytest.raises(Conflict, match="it is not a clone"):
            await running.pool.split_estimate("base")
        with pytest.raises(RequestError, match="no mode 'move': use copy or share"):
            await running.pool.split_start("clone", "move")
        with pytest.raises(RequestError, match="minimum rate 2 is above the maximum rate 1"):
            await running.pool.split_start("clone", "copy", 2, 1)
        with pytest.raises(NotFound, match="has no split"):
            running.pool.split_show("base")


class Counted:
    """A work that only counts its messages; each says that it moved a block."""

    rate_min_bytes = 0

    def __init__(self, rate_max_bytes: int) -> None:
        self.rate_max_bytes = rate_max_bytes
        self.carried_out = 0
        self.failures: list[StorageError] = []

    async def message(self, idle: bool) -> int | None:
        self.carried_out += 1
        if self.carried_out == 10 and not self.rate_max_bytes:
            raise KeyError("a mistake of ours")
        return BLOCK_BYTES

    async def failed(self, error: StorageError) -> None:
        self.failures.append(error)


async def test_a_ceiling_keeps_its_own_work_waiting_and_a_mistake_ends_only_its_own_work() -> None:
    handler = BackdoorMessageHandler(PoolState(MemoryDevice(1 << 20), 0, 1 << 20))
    handler.start()
    slow, free, late = (
        Counted(1),
        Counted(0),
        Counted(0),
    )  # one byte a second: the next message of ``slow`` is an hour away
    handler.post(slow)
    handler.post(free)
    while not free.failures:
        await asyncio.sleep(0)
    assert slow.carried_out == 1
    assert "KeyError" in str(free.failures[0])
    handler.post(late)
    while not late.failures:
        await asyncio.sleep(0)
    assert (slow.carried_out, free.carried_out) == (1, 10)
    assert handler.holds(Counted)
    await handler.stop()
    assert not handler.holds(Counted)
