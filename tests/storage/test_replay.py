"""Replay: what the intent log holds beyond the last consistency point is there again, whatever
happened in between.
"""

import asyncio
from contextlib import suppress

import pytest

from storage.consistency.replay import runs
from storage.errors import BlockDamaged, PoolFull, PoolReadOnly
from storage.layout import BLOCK_BYTES, LOG_FIRST_VBN
from storage.log.ring import READ_BLOCKS
from tests.storage.devices import SYNC, DelayDevice, MemoryDevice
from tests.storage.pools import (
    LEAF_BYTES,
    OpenPool,
    backed_clone,
    checked_offline,
    data,
    new_pool,
    open_on,
    opened,
    within,
)


async def test_a_flush_survives_when_all_earlier_records_belong_to_the_last_consistency_point() -> (
    None
):
    """Records of an epoch that is durable are skipped; the log must go on where replay will look
    for it.
    """
    holder: list[DelayDevice] = []

    def delayed(memory):
        holder.append(DelayDevice(memory))
        return holder[0]

    async with new_pool(decorate=delayed) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        await running.write("a", 0, data(1))
        device = holder[0]
        device.hold(SYNC)
        point = asyncio.create_task(running.pool.consistency_point())
        await running.until(lambda: device.held(SYNC) == 1)
        flush = running.begin_flush(
            "a"
        )  # logs a change of the frozen epoch, behind the mark of its consistency point
        await running.until(lambda: device.held(SYNC) == 2)
        device.release(SYNC)
        await within(point)
        await within(flush)
        first_crash = running.memory.copy()
    async with opened(first_crash) as running:
        await running.write("a", BLOCK_BYTES, data(2), fua=True)
        second_crash = first_crash.copy()
    async with opened(second_crash) as running:
        assert await running.read("a", 0, 2 * BLOCK_BYTES) == data(1) + data(2)


async def test_replay_repeats_writes_zeros_and_trims_in_their_order_and_can_be_repeated() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.pool.vdisk_create("b", 4 * LEAF_BYTES)
        await running.write("a", 0, data(1, 300))
        await running.zero("a", 10 * BLOCK_BYTES, 280 * BLOCK_BYTES)
        await running.write("b", 0, data(2, 3))
        await running.write("a", 20 * BLOCK_BYTES, data(3, 4))
        await running.write("a", 21 * BLOCK_BYTES, bytes(BLOCK_BYTES))
        await running.write("a", 512, b"\x11" * 1024)
        await running.flush("b")  # one log for all
        crashed = running.memory.copy()
        expected = [await running.read(name, 0, 400 * BLOCK_BYTES) for name in ("a", "b")]
        used = [running.image(name).used_blocks for name in ("a", "b")]
    for _ in range(2):
        checked_offline(crashed)
        again = crashed.copy()
        async with opened(again) as running:
            replayed = [
                fields["records_replayed"]
                for name, fields in running.events
                if name == "pool.opened"
            ]
            assert len(replayed) == 1 and replayed[0] >= 1
            assert [
                await running.read(name, 0, 400 * BLOCK_BYTES) for name in ("a", "b")
            ] == expected
            assert [running.image(name).used_blocks for name in ("a", "b")] == used


async def test_what_was_not_flushed_may_be_lost_and_nothing_else_is() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.write("a", 0, data(1, 2), fua=True)
        await running.write("a", BLOCK_BYTES, data(2, 2))
        crashed = running.memory.copy()
    async with opened(crashed) as running:
        found = await running.read("a", 0, 3 * BLOCK_BYTES)
        assert found in (data(1, 2) + bytes(BLOCK_BYTES), data(1, 2)[:BLOCK_BYTES] + data(2, 2))


async def log_of_three(running: OpenPool) -> MemoryDevice:
    """A pool whose log has three records of one write each."""
    await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
    for seed in range(3):
        await running.write("a", seed * BLOCK_BYTES, data(seed + 1), fua=True)
    return running.memory.copy()


def log_block(running: OpenPool, back: int) -> int:
    """Address of the block of the log that lies ``back`` blocks before its head."""
    return (
        LOG_FIRST_VBN
        + (running.pool.rooms.log.head_block - back) % running.pool.rooms.superblock.log_blocks
    )


async def log_of_three_as_power_left_it(running: OpenPool) -> MemoryDevice:
    """The same, and the last flush had not been answered: the mark that follows it never reached
    the medium.
    """
    crashed = await log_of_three(running)
    crashed.try_writev([bytes(BLOCK_BYTES)], log_block(running, 1) * BLOCK_BYTES, BLOCK_BYTES)
    return crashed


async def test_a_torn_last_record_ends_the_log_and_costs_only_what_was_never_acknowledged() -> None:
    async with new_pool() as running:
        crashed = await log_of_three_as_power_left_it(running)
        last = log_block(running, 2)
    crashed.try_writev([b"\xff" * 512], last * BLOCK_BYTES + 512 * 7, 512)
    async with opened(crashed) as running:
        assert await running.read("a", 0, 3 * BLOCK_BYTES) == data(1) + data(2) + bytes(BLOCK_BYTES)
        await running.write("a", 2 * BLOCK_BYTES, data(9), fua=True)
        again = crashed.copy()
    async with opened(again) as running:
        assert await running.read("a", 0, 3 * BLOCK_BYTES) == data(1) + data(2) + data(9)


async def test_a_last_record_whose_data_is_torn_is_no_more_than_torn() -> None:
    async with new_pool() as running:
        crashed = await log_of_three_as_power_left_it(running)
        vbn = int(running.image("a").tree.nodes[1][0].vbns()[2])
    crashed.try_writev([b"\xff" * 512], vbn * BLOCK_BYTES, 512)
    async with opened(crashed) as running:
        assert (
            "log.torn_tail" in running.event_names()
            and "block.damaged" not in running.event_names()
        )
        assert await running.read("a", 0, 3 * BLOCK_BYTES) == data(1) + data(2) + bytes(BLOCK_BYTES)


async def test_damaged_data_of_an_acknowledged_write_is_an_error_and_never_the_old_data() -> None:
    async with new_pool() as running:
        crashed = await log_of_three(running)
        vbn = int(running.image("a").tree.nodes[1][0].vbns()[1])
    crashed.try_writev([b"\xff" * 512], vbn * BLOCK_BYTES, 512)
    running = await open_on(crashed)
    assert ("block.damaged", True) in [
        (name, fields.get("durable")) for name, fields in running.events
    ]
    with pytest.raises(BlockDamaged):
        await running.read("a", BLOCK_BYTES, BLOCK_BYTES)
    assert await running.read("a", 0, BLOCK_BYTES) == data(1)
    assert await running.read("a", 2 * BLOCK_BYTES, BLOCK_BYTES) == data(3)
    await running.close()


async def test_a_damaged_record_in_the_middle_opens_read_only_and_says_so() -> None:
    async with new_pool() as running:
        crashed = await log_of_three(running)
        middle = log_block(running, 3)
    crashed.try_writev([b"\xff" * 512], middle * BLOCK_BYTES, 512)
    running = await open_on(crashed)
    shown = running.pool.show()
    assert (
        shown["read_only"]
        and "is damaged: acknowledged writes may be lost, which of them, nobody can say"
        in shown["read_only_reason"]
    )
    assert await running.read("a", 0, BLOCK_BYTES) == data(1)
    assert await running.read("a", 2 * BLOCK_BYTES, BLOCK_BYTES) == data(3)
    with pytest.raises(PoolReadOnly):
        await running.write("a", 0, data(9))
    await running.close()


async def test_records_round_the_end_of_the_ring_are_replayed() -> None:
    async with new_pool(8 << 20) as running:
        await running.pool.vdisk_create("a", 64 * LEAF_BYTES)
        for round_ in range(5):
            for index in range(30):
                await running.write(
                    "a", (round_ * 30 + index) * BLOCK_BYTES, data(round_ * 30 + index), fua=True
                )
            if round_ < 4:
                await running.checkpoint()
        assert running.pool.rooms.log.next_sequence > running.pool.rooms.superblock.log_blocks
        crashed = running.memory.copy()
    async with opened(crashed) as running:
        for index in range(150):
            assert await running.read("a", index * BLOCK_BYTES, BLOCK_BYTES) == data(index)


async def test_replay_keeps_the_count_of_a_split_exact() -> None:
    async with new_pool() as running:
        await backed_clone(running, 300)
        await running.pool.split_start("clone", "copy", rate_max_bytes=1)
        await running.until(lambda: running.pool.split_show("clone")["counted"])
        await running.pool.split_pause("clone")
        holes = running.pool.split_show("clone")["holes_remaining"]
        await running.checkpoint()
        filled = await running.holes("clone")
        await running.write("clone", 290 * BLOCK_BYTES, data(5, 20), fua=True)
        crashed = running.memory.copy()
        left = await running.holes("clone")
        assert (holes, running.pool.split_show("clone")["holes_remaining"]) == (filled, left)
    async with opened(crashed) as running:
        shown = running.pool.split_show("clone")
        assert shown["counted"] and shown["holes_remaining"] == left


async def test_a_full_pool_with_a_full_log_opens_again() -> None:
    async with new_pool(8 << 20) as running:
        await running.pool.vdisk_create("a", 1 << 30)
        with suppress(PoolFull):
            for index in range(100000):
                await running.write("a", index * BLOCK_BYTES, data(index))
        with suppress(PoolFull):
            for index in range(1, 1000):
                await running.write("a", index * LEAF_BYTES, bytes(BLOCK_BYTES))
        await running.flush("a")
        crashed = running.memory.copy()
    async with opened(crashed) as running:
        assert await running.read("a", 0, BLOCK_BYTES) == data(0)


@pytest.mark.parametrize(
    ("vbns", "expected"),
    [
        ([], []),
        ([1, 1], []),
        ([70, 71, 72], [[70, 71, 72]]),
        ([70, 72, 71], [[70], [72], [71]]),
        ([1, 70, 71, 1, 72, 0], [[70, 71], [72]]),
        (range(100, 101 + READ_BLOCKS), [list(range(100, 100 + READ_BLOCKS)), [100 + READ_BLOCKS]]),
    ],
)
def test_neighbours_on_the_device_are_read_together(
    vbns: list[int], expected: list[list[int]]
) -> None:
    found = runs([(1, 0, 0, vbn, 1) for vbn in vbns])
    assert [[entry[3] for entry in run] for run in found] == expected


async def test_a_record_left_behind_by_a_lost_one_never_follows_a_new_one() -> None:
    """Found by review: older data came back over newer that was acknowledged as durable.

    Power fails while records s and s+1 are not synced; only s+1 reaches the medium. The next life
    writes a record s of its own; after a second crash the old s+1 would be its successor.
    """
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 1 << 20)
        vbn = LOG_FIRST_VBN + running.pool.rooms.log.head_block
        for fbn in range(130):  # more than one record holds
            await running.write("a", fbn * BLOCK_BYTES, data(1))
        lost_record = running.memory.copy()
        lost_record._write([bytes(BLOCK_BYTES)], vbn * BLOCK_BYTES)
    async with opened(lost_record) as running:
        assert await running.read("a", 125 * BLOCK_BYTES, 2 * BLOCK_BYTES) == bytes(2 * BLOCK_BYTES)
        await running.write("a", 127 * BLOCK_BYTES, data(2), fua=True)
        crashed = lost_record.copy()
    async with opened(crashed) as running:
        assert await running.read("a", 127 * BLOCK_BYTES, BLOCK_BYTES) == data(2)


async def test_nothing_is_built_on_what_may_be_in_the_page_cache_only() -> None:
    """Found by review: a killed daemon's superblock may be written and not synced; what it freed is
    still needed if it gets lost.
    """
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 1 << 20)
        await running.write("a", 0, data(1), fua=True)
        found = running.memory.copy()
    device = DelayDevice(found)
    device.hold(SYNC)
    before = found.copy()
    opening = asyncio.create_task(open_on(found, device))
    while not device.held(SYNC):
        await asyncio.sleep(0)
    assert found._pages == before._pages
    device.release(SYNC)
    await (await within(opening)).close()
