"""What replay makes of a log that is not whole: what was promised to be durable is there, or is
said to be missing, by vdisk and block.

Both sides: rot after a flush that was answered is damage, told exactly, and costs nothing else.
What a loss of power leaves of writes that nobody flushed is no damage, and as much of it as is
whole comes back.
"""

from asyncio import Future
from collections.abc import Sequence
from typing import Any

import pytest
from crc32c import crc32c

from storage.device import WritableBuffer
from storage.errors import BlockDamaged, DeviceFailed, PoolRefused, StorageError
from storage.layout import BLOCK_BYTES, ENTRIES_PER_RECORD, LOG_FIRST_VBN, RECORD_ENTRY, RECORD_HEAD
from storage.log.one_bit import flipped_bit
from storage.superblock.superblock import decode
from tests.storage.devices import MemoryDevice, WrappedDevice
from tests.storage.pools import (
    LEAF_BYTES,
    OpenPool,
    checked_offline,
    data,
    new_pool,
    open_on,
    opened,
)

WRITES = 200


class BadBlocks(WrappedDevice):
    """Some blocks cannot be read."""

    def __init__(self, inner: MemoryDevice, *vbns: int) -> None:
        super().__init__(inner)
        self.bad = frozenset(vbns)

    def _fails(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> bool:
        first = offset_bytes // BLOCK_BYTES
        return not self.bad.isdisjoint(range(first, first + sum(map(len, buffers)) // BLOCK_BYTES))

    def try_readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> bool:
        return not self._fails(buffers, offset_bytes) and self.inner.try_readv(
            buffers, offset_bytes
        )

    def readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> "Future[None]":
        future = self.inner.readv(buffers, offset_bytes)
        if self._fails(buffers, offset_bytes):
            failed: Future[None] = future.get_loop().create_future()
            failed.set_exception(DeviceFailed("memory: a planted bad block"))
            return failed
        return future


def allocated(running: OpenPool) -> list[tuple[int, int]]:
    """Extents (first VBN, length) that the current epoch took."""
    return running.pool._state.epoch.ledger.allocated


async def written(running: OpenPool, blocks: int = WRITES) -> tuple[int, list[int]]:
    """So many writes of one block, old content below them, on vdisk "a". Returns the block of the
    ring where they begin, and their VBNs.
    """
    await running.pool.vdisk_create("a", LEAF_BYTES)
    await running.write("a", 0, data(1, blocks))
    await running.checkpoint()
    first = running.pool.rooms.log.head_block
    for index in range(blocks):
        await running.write("a", index * BLOCK_BYTES, data(2 + index))
    return first, [int(vbn) for vbn in running.image("a").tree.nodes[1][0].vbns()[:blocks]]


def flip(memory: MemoryDevice, vbn: int, byte: int = 99, mask: int = 4) -> None:
    memory._pages[vbn][byte] ^= mask


def events(running: OpenPool, name: str) -> list[dict[str, Any]]:
    return [fields for event, fields in running.events if event == name]


async def old_and_missing(running: OpenPool, blocks: int = WRITES) -> tuple[list[int], list[int]]:
    """Which of the blocks read as before the writes, and which cannot be read. All others must hold
    what was written.
    """
    old, missing = [], []
    for index in range(blocks):
        try:
            found = await running.read("a", index * BLOCK_BYTES, BLOCK_BYTES)
        except StorageError:
            missing.append(index)
            continue
        if found != data(2 + index):
            assert found == data(1, blocks)[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            old.append(index)
    return old, missing


# --- Rot after a flush that was answered ----------------------------------------------------------


@pytest.mark.parametrize("rotten", [[0], [77], [199], [3, 4, 130]])
@pytest.mark.parametrize("unreadable", [False, True], ids=["rotten", "unreadable"])
async def test_rot_after_an_answered_flush_costs_only_the_rotten_blocks_and_names_them(
    rotten: list[int], unreadable: bool
) -> None:
    """Found from outside: one flipped bit, and all 200 writes of a flush that was answered read as
    before, without a word.
    """
    async with new_pool() as running:
        _, vbns = await written(running)
        await running.flush("a")
        killed = running.memory.copy()
    if not unreadable:
        for index in rotten:
            flip(killed, vbns[index])
    device = BadBlocks(killed, *[vbns[index] for index in rotten if unreadable])
    running = await open_on(killed, device)
    assert await old_and_missing(running) == ([], rotten)
    assert not running.pool.show()["read_only"] and "log.torn_tail" not in running.event_names()
    named = [
        fields["offset_bytes"] // BLOCK_BYTES + step
        for fields in events(running, "block.damaged")
        if fields.get("durable") and fields["image"] == "vdisk a"
        for step in range(fields["length_bytes"] // BLOCK_BYTES)
    ]
    assert named == rotten
    for index in rotten:  # writing there again mends it
        await running.write("a", index * BLOCK_BYTES, data(2 + index), fua=True)
    assert await old_and_missing(running) == ([], [])
    await running.close()
    checked_offline(killed)


async def test_a_flush_is_marked_without_a_second_sync_or_room_in_the_ring() -> None:
    async with new_pool() as running:
        await written(running, 3)
        log = running.pool.rooms.log
        before = log._used_blocks
        for _ in range(20):
            await running.flush("a")
        assert log._used_blocks == before + 1
        for index in range(10):  # the mark becomes the next record
            await running.write("a", index * BLOCK_BYTES, data(9), fua=True)
        assert log._used_blocks == before + 11


async def test_rot_below_a_later_write_is_no_damage() -> None:
    async with new_pool() as running:
        _, vbns = await written(running)
        for index in (5, 6):
            await running.write("a", index * BLOCK_BYTES, data(1000 + index))
        await running.zero("a", 7 * BLOCK_BYTES, 2 * BLOCK_BYTES)
        await running.flush("a")
        killed = running.memory.copy()
    for index in (5, 6, 7, 8):
        flip(killed, vbns[index])
    async with opened(killed) as running:
        assert not {"block.damaged", "log.torn_tail"} & set(running.event_names())
        assert await running.read("a", 5 * BLOCK_BYTES, 4 * BLOCK_BYTES) == data(1005) + data(
            1006
        ) + bytes(2 * BLOCK_BYTES)


@pytest.mark.parametrize("back", [0, 1], ids=["first record", "second record"])
@pytest.mark.parametrize("byte", [0, 5, 9, 20, 28, 35, 41, 50, 57, 64, 1000, BLOCK_BYTES - 1])
async def test_one_flipped_bit_in_a_durable_record_costs_nothing(back: int, byte: int) -> None:
    async with new_pool() as running:
        first, _ = await written(running)
        await running.flush("a")
        killed = running.memory.copy()
    flip(killed, LOG_FIRST_VBN + first + back, byte)
    async with opened(killed) as running:
        assert [fields["sequence"] for fields in events(running, "log.record_mended")]
        assert await old_and_missing(running) == ([], [])


async def test_a_damaged_durable_record_names_what_may_be_missing() -> None:
    async with new_pool() as running:
        first, _ = await written(running)
        await running.flush("a")
        killed = running.memory.copy()
    place = LOG_FIRST_VBN + first
    for byte in (RECORD_HEAD.size, RECORD_HEAD.size + 1):
        flip(killed, place, byte)  # the image number of the first entry
    running = await open_on(killed)
    old, missing = await old_and_missing(running)
    assert (old, missing) == (
        [0],
        list(range(1, ENTRIES_PER_RECORD)),
    )  # the first can no longer be named, the other records are whole
    shown = running.pool.show()
    assert (
        shown["read_only"]
        and f"(VBN {place}) is damaged: acknowledged writes may be lost"
        in shown["read_only_reason"]
    )
    (said,) = events(running, "log.record_damaged")
    assert said["may_be_missing"] == [
        {
            "image": "vdisk a",
            "offset_bytes": BLOCK_BYTES,
            "length_bytes": (ENTRIES_PER_RECORD - 1) * BLOCK_BYTES,
        }
    ]
    await running.close()


async def test_an_unreadable_durable_record_leaves_the_pool_read_only() -> None:
    async with new_pool() as running:
        first, _ = await written(running)
        await running.flush("a")
        killed = running.memory.copy()
    running = await open_on(killed, BadBlocks(killed, LOG_FIRST_VBN + first))
    assert await old_and_missing(running) == (list(range(ENTRIES_PER_RECORD)), [])
    assert (
        "cannot be read: acknowledged writes may be lost, which of them, nobody can say"
        in running.pool.show()["read_only_reason"]
    )
    await running.close()


def test_the_bit_that_was_flipped_is_found_and_two_are_not() -> None:
    content = bytearray(range(256)) * 16
    right = crc32c(content)
    for at in (*range(0, BLOCK_BYTES, 97), BLOCK_BYTES - 1):
        for bit in range(8):
            content[at] ^= 1 << bit
            assert flipped_bit(BLOCK_BYTES, crc32c(content) ^ right) == (at, 1 << bit)
            content[at ^ 1] ^= 128 >> bit
            assert flipped_bit(BLOCK_BYTES, crc32c(content) ^ right) is None
            content[at] ^= 1 << bit
            content[at ^ 1] ^= 128 >> bit


# --- What a loss of power leaves of what nobody flushed -------------------------------------------


def lost(memory: MemoryDevice, *vbns: int) -> MemoryDevice:
    """The same device, and these blocks never reached the medium."""
    left = memory.copy()
    for vbn in vbns:
        left._pages.pop(vbn, None)
    return left


@pytest.mark.parametrize("gone", [[0], [60], [199], [0, 1, 2, 150], list(range(0, 200, 7))])
async def test_of_a_torn_tail_all_that_is_whole_comes_back_without_an_alarm(
    gone: list[int],
) -> None:
    async with new_pool() as running:
        _, vbns = await written(running)
        unflushed = running.memory.copy()
    async with opened(lost(unflushed, *[vbns[index] for index in gone])) as running:
        assert await old_and_missing(running) == (gone, [])
        assert set(running.event_names()) == {"log.torn_tail", "pool.opened"}
        (said,) = events(running, "log.torn_tail")
        assert (
            said["blocks_missing"]
            == len(gone)
            == sum(one["length_bytes"] for one in said["missing"]) // BLOCK_BYTES
        )
        assert said["missing"][0]["offset_bytes"] == gone[0] * BLOCK_BYTES


@pytest.mark.parametrize("record", [0, 1])
async def test_the_log_ends_before_a_record_that_power_took(record: int) -> None:
    """What follows may be built on it: a part of a block that was merged with a write in the lost
    record, say.
    """
    async with new_pool() as running:
        first, _ = await written(running)
        unflushed = running.memory.copy()
    async with opened(lost(unflushed, LOG_FIRST_VBN + first + record)) as running:
        assert await old_and_missing(running) == (list(range(ENTRIES_PER_RECORD * record, 200)), [])
        assert "block.damaged" not in running.event_names()


async def test_what_was_merged_with_a_write_that_is_left_out_is_left_out_too() -> None:
    """Found by the store fuzzer: after a loss of power an atomic write was there in the blocks that
    a later, shorter write had merged.
    """
    old = data(1, 64)
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, old)
        await running.checkpoint()
        await running.write("a", 0, data(2, 16))  # atomic; its last block will be lost
        await running.write("a", 512, b"m" * 1024)  # merged with its first block
        await running.write("a", 14 * BLOCK_BYTES + 512, b"n" * BLOCK_BYTES)  # with its last two
        await running.write(
            "a", 15 * BLOCK_BYTES + 1024, b"o" * BLOCK_BYTES
        )  # with what that has merged, and one more
        await running.zero("a", 8 * BLOCK_BYTES, BLOCK_BYTES)
        await running.write(
            "a", 8 * BLOCK_BYTES + 512, b"z" * 512
        )  # with zeros: that is whole without it
        await running.write("a", 32 * BLOCK_BYTES, data(3))
        vbn = (
            next(
                first
                for first, length in running.pool._state.epoch.ledger.allocated
                if length == 16
            )
            + 15
        )
        unflushed = running.memory.copy()
    async with opened(lost(unflushed, vbn)) as running:
        found = await running.read("a", 0, 64 * BLOCK_BYTES)
        assert found[: 8 * BLOCK_BYTES] == old[: 8 * BLOCK_BYTES]
        assert found[8 * BLOCK_BYTES : 9 * BLOCK_BYTES] == bytes(512) + b"z" * 512 + bytes(
            BLOCK_BYTES - 1024
        )
        assert found[9 * BLOCK_BYTES : 32 * BLOCK_BYTES] == old[9 * BLOCK_BYTES : 32 * BLOCK_BYTES]
        assert found[32 * BLOCK_BYTES : 33 * BLOCK_BYTES] == data(3)
        assert set(running.event_names()) == {"log.torn_tail", "pool.opened"}


@pytest.mark.parametrize("at", [0, 5, 31])
@pytest.mark.parametrize("batched", [False, True])
async def test_a_write_of_which_a_block_is_gone_is_left_out_whole_and_its_neighbours_are_not(
    at: int, batched: bool
) -> None:
    """WRITE ATOMIC: 128 KiB, between two others in the same record, and its neighbours
    on the disk.
    """
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        volume = running.volume("a")
        outcomes: list[Exception | None] = []
        for number in range(3):
            volume.write(number * 32 * BLOCK_BYTES, data(number + 1, 32), False, outcomes.append)
            if not batched:
                volume.settle()
        volume.settle()
        assert outcomes == [None] * 3
        vbn = int(running.image("a").tree.nodes[1][0].vbns()[32 + at])
        unflushed = running.memory.copy()
    async with opened(lost(unflushed, vbn)) as running:
        found = [
            await running.read("a", number * 32 * BLOCK_BYTES, 32 * BLOCK_BYTES)
            for number in range(3)
        ]
        assert found[1] == bytes(32 * BLOCK_BYTES)
        for number in (0, 2):  # what was written in one batch cannot be told apart
            assert found[number] in (
                (data(number + 1, 32), bytes(32 * BLOCK_BYTES))
                if batched
                else (data(number + 1, 32),)
            )


async def test_the_log_of_an_earlier_version_is_read_with_the_older_and_wider_unit() -> None:
    """Without marked ends: neighbours in one record may be one write."""
    async with new_pool() as running:
        first, vbns = await written(running, 20)
        unflushed = running.memory.copy()
    place = LOG_FIRST_VBN + first
    block = unflushed._pages[place]
    block[-16:] = bytes(16)
    block[4:8] = bytes(4)
    block[4:8] = crc32c(block).to_bytes(4, "little")
    async with opened(lost(unflushed, vbns[7])) as running:
        assert await old_and_missing(running, 20) == (list(range(20)), [])


# --- Blocks of the ring that cannot be read -------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 7, 63])
async def test_after_an_orderly_stop_no_block_of_the_ring_is_needed(position: int) -> None:
    """Found from outside: one unreadable block anywhere in the ring, and no start."""
    async with new_pool(8 << 20) as running:
        await written(running)
    memory = running.memory.copy()
    ring = range(running.pool.rooms.superblock.log_blocks)
    bad = (running.pool.rooms.superblock.log_head_block + position) % len(ring)
    async with opened(memory, BadBlocks(memory, LOG_FIRST_VBN + bad)) as running:
        assert await old_and_missing(running) == ([], [])
        (said,) = events(running, "log.unreadable")
        assert said["vbns"] == [LOG_FIRST_VBN + bad]
        assert said["changes_may_be_missing"] == (
            position == 0
        )  # where the next record would be, one may have been
        await running.write("a", 0, data(2), fua=True)


async def test_a_block_of_the_ring_that_holds_nothing_needed_costs_nothing_after_a_kill() -> None:
    async with new_pool() as running:
        first, _ = await written(running)
        await running.flush("a")
        killed = running.memory.copy()
    async with opened(killed, BadBlocks(killed, LOG_FIRST_VBN + first + 50)) as running:
        assert await old_and_missing(running) == ([], [])
        assert [said["changes_may_be_missing"] for said in events(running, "log.unreadable")] == [
            False
        ]


async def test_where_neither_the_last_record_nor_its_mark_can_be_read_the_pool_is_read_only() -> (
    None
):
    async with new_pool() as running:
        first, _ = await written(running, 20)
        await running.flush("a")
        killed = running.memory.copy()
    running = await open_on(
        killed, BadBlocks(killed, LOG_FIRST_VBN + first, LOG_FIRST_VBN + first + 1)
    )
    assert "acknowledged writes may be lost" in running.pool.show()["read_only_reason"]
    await running.close()


@pytest.mark.parametrize(("blocks", "head"), [(0, 0), (1 << 40, 0), (64, 64), (64, 1 << 60)])
async def test_a_log_that_cannot_be_is_refused_with_its_numbers(blocks: int, head: int) -> None:
    async with new_pool(8 << 20) as running:
        pass
    memory = running.memory.copy()
    for vbn in (0, 1):
        superblock = decode(memory._pages[vbn])
        assert superblock is not None
        superblock.log_blocks, superblock.log_head_block = blocks, head
        memory._write([superblock.encode()], vbn * BLOCK_BYTES)
    with pytest.raises(PoolRefused, match=rf"has {blocks} blocks and its head is block {head}"):
        await open_on(memory)


async def test_a_damaged_pointer_block_in_replay_leaves_the_rest_readable() -> None:
    """Of the kind: one bad block, and the pool did not open."""
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 2 * LEAF_BYTES)
        await running.pool.vdisk_create("b", 2 * LEAF_BYTES)
        for name in "ab":
            await running.write(name, 0, data(1))
            await running.write(name, LEAF_BYTES, data(2))
        await running.checkpoint()
        leaf = running.image("a").tree.nodes[1][0].vbn
        for name in "ab":
            await running.write(name, BLOCK_BYTES, data(3), fua=True)
        killed = running.memory.copy()
    flip(killed, leaf)
    running = await open_on(killed)
    assert (
        "changes of vdisk a from byte 4096 on are in the intent log and cannot be applied"
        in running.pool.show()["read_only_reason"]
    )
    assert await running.read("b", 0, 2 * BLOCK_BYTES) == data(1) + data(3)
    assert await running.read("a", LEAF_BYTES, BLOCK_BYTES) == data(2)
    with pytest.raises(BlockDamaged):
        await running.read("a", BLOCK_BYTES, BLOCK_BYTES)
    await running.close()


async def test_a_record_of_changes_beyond_the_pool_is_not_followed() -> None:
    async with new_pool() as running:
        first, _ = await written(running, 3)
        killed = running.memory.copy()
    block = killed._pages[LOG_FIRST_VBN + first]
    number, crc, fbn, _, count = RECORD_ENTRY.unpack_from(block, RECORD_HEAD.size)
    RECORD_ENTRY.pack_into(block, RECORD_HEAD.size, number, crc, fbn, 1 << 50, count)
    block[4:8] = bytes(4)
    block[4:8] = crc32c(block).to_bytes(4, "little")
    running = await open_on(killed)
    assert "beyond the pool" in running.pool.show()["read_only_reason"]
    await running.close()


async def test_a_trim_of_any_length_ends_what_was_left_out_below_it() -> None:
    """Short ones are taken out block by block, long ones at once: a log of many of both was
    replayed in quadratic time.
    """
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 1 << 30)
        await running.write("a", 0, data(1, 64))
        await running.checkpoint()
        await running.write("a", 0, data(2, 32))
        vbn = next(first for first, length in allocated(running) if length == 32)
        await running.zero("a", 8 * BLOCK_BYTES, 4 * BLOCK_BYTES)
        await running.zero("a", 20 * BLOCK_BYTES, 1 << 29)
        for fbn in (9, 25, 1):
            await running.write("a", fbn * BLOCK_BYTES + 512, b"p" * 512)
        unflushed = running.memory.copy()
    async with opened(lost(unflushed, vbn)) as running:
        partly = bytes(512) + b"p" * 512 + bytes(BLOCK_BYTES - 1024)
        assert await running.read("a", 9 * BLOCK_BYTES, BLOCK_BYTES) == partly
        assert await running.read("a", 25 * BLOCK_BYTES, BLOCK_BYTES) == partly
        assert await running.read("a", 0, 8 * BLOCK_BYTES) == data(1, 64)[: 8 * BLOCK_BYTES]


async def test_the_log_ends_where_a_record_is_shorter_than_the_next_one_says() -> None:
    """Found by the crash states: the last writing of a record was lost with the power, and the
    record after it was not.
    """
    async with new_pool() as running:
        first, _ = await written(running, ENTRIES_PER_RECORD - 2)
        shorter = bytes(running.memory._pages[LOG_FIRST_VBN + first])
        await running.write("a", 200 * BLOCK_BYTES, data(7, 2))  # atomic; the last of the record
        await running.write(
            "a", 200 * BLOCK_BYTES + 512, b"m" * 512
        )  # merged with it, in the next record
        await running.write("a", 240 * BLOCK_BYTES, data(8))
        unflushed = running.memory.copy()
    unflushed._write([shorter], (LOG_FIRST_VBN + first) * BLOCK_BYTES)
    async with opened(unflushed) as running:
        assert await old_and_missing(running, ENTRIES_PER_RECORD - 2) == ([], [])
        assert await running.read("a", 200 * BLOCK_BYTES, 41 * BLOCK_BYTES) == bytes(
            41 * BLOCK_BYTES
        )
        assert "log.torn_tail" in running.event_names()
