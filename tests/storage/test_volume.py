"""A volume: what clients write is what they read, and every command is answered exactly once,
whatever happens.
"""

import asyncio
import errno
from typing import Any

import pytest

from storage.data import write_path
from storage.data.read_path import locate
from storage.errors import BlockDamaged, OutOfRange, PoolReadOnly, StorageError, VolumeClosed
from storage.layout import BLOCK_BYTES, SECTOR_BYTES
from storage.tree.buffer_tree import BufferTree
from tests.storage.devices import READ, WRITE, DelayDevice, Fault, FaultyDevice
from tests.storage.pools import LEAF_BYTES, Delayed, OpenPool, data, new_pool, opened, within


class Answers:
    """Completions by name, with everything they were called with."""

    def __init__(self) -> None:
        self.given: dict[str, list[Exception | None]] = {}

    def __call__(self, name: str) -> Any:
        self.given[name] = []
        return self.given[name].append

    def once(self) -> dict[str, Exception | None]:
        assert all(len(answers) == 1 for answers in self.given.values()), self.given
        return {name: answers[0] for name, answers in self.given.items()}


async def drained(running: OpenPool, name: str) -> None:
    await within(running.volume(name).drain())


@pytest.mark.parametrize("miss_rate", [0.0, 0.5, 1.0])
async def test_what_is_written_is_read_at_every_alignment(miss_rate: float) -> None:
    async with new_pool(miss_rate=miss_rate, deferred=miss_rate > 0) as running:
        await running.pool.vdisk_create("a", 2 * LEAF_BYTES)
        expected = bytearray(2 * LEAF_BYTES)
        ranges = [
            (0, 512),
            (512, 4096),
            (3584, 1024),
            (4096, 8192),
            (LEAF_BYTES - 512, 1024),
            (100 * 512, 33 * 512),
        ]
        for seed, (offset, length) in enumerate(ranges):
            content = (
                data(seed, 5)[1024 : 1024 + length] if length <= 16384 else data(seed, 5)[:length]
            )
            await running.write("a", offset, content)
            expected[offset : offset + length] = content
            assert await running.read("a", 0, 300 * BLOCK_BYTES) == expected[: 300 * BLOCK_BYTES]


async def test_writes_of_one_batch_are_one_write_to_the_device_and_one_to_the_log() -> None:
    async with new_pool(decorate=FaultyDevice) as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(0))
        volume, answers = running.volume("a"), Answers()
        before = running.device.calls[WRITE]
        for index in range(32):
            volume.write((index * 7 % 256) * BLOCK_BYTES, data(index), False, answers(str(index)))
        volume.settle()
        assert running.device.calls[WRITE] == before + 2
        assert set(answers.once().values()) == {None}
        assert await running.read("a", 7 * BLOCK_BYTES, BLOCK_BYTES) == data(1)


async def test_zeros_take_no_space() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1, 4) + bytes(4 * BLOCK_BYTES) + data(2, 2))
        assert running.image("a").used_blocks == 6
        await running.write("a", 0, bytes(4 * BLOCK_BYTES))
        assert running.image("a").used_blocks == 2


async def test_two_partial_writes_of_one_block_under_way_together_lose_nothing() -> None:
    """The race that the block locks close: both read the old block before either writes."""
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1))
        delayed.device.hold(READ)
        writes = [
            running.begin_write("a", sector * SECTOR_BYTES, bytes([sector + 1]) * SECTOR_BYTES)
            for sector in range(8)
        ]
        whole = running.begin_write("a", BLOCK_BYTES, data(2))
        await asyncio.sleep(0.01)
        delayed.device.release(READ)
        for write in (*writes, whole):
            await within(write)
        expected = b"".join(bytes([sector + 1]) * SECTOR_BYTES for sector in range(8))
        assert await running.read("a", 0, 2 * BLOCK_BYTES) == expected + data(2)


async def test_one_write_that_fails_does_not_fail_its_neighbours_in_the_batch() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        volume, answers = running.volume("a"), Answers()
        volume.write(0, data(1), False, answers("good"))
        volume.write(LEAF_BYTES, data(2), False, answers("beyond the end"))
        volume.write(BLOCK_BYTES, data(3), False, answers("good too"))
        volume.settle()
        outcome = answers.once()
        assert (outcome["good"], outcome["good too"]) == (None, None)
        assert (
            isinstance(outcome["beyond the end"], OutOfRange)
            and outcome["beyond the end"].errno == errno.EINVAL
        )
        assert await running.read("a", 0, 2 * BLOCK_BYTES) == data(1) + data(3)


async def test_a_damaged_block_is_an_error_for_that_block_alone() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1, 3))
        location = locate(running.image("a"), 1)
        assert location is not None
        running.memory.try_writev(
            [data(9)], location[0] * BLOCK_BYTES, BLOCK_BYTES
        )  # misdirected: whole, but not what belongs there
        for length in (BLOCK_BYTES, 3 * BLOCK_BYTES):
            offset = BLOCK_BYTES if length == BLOCK_BYTES else 0
            assert running.volume("a").try_read(offset, length) is None
            with pytest.raises(BlockDamaged, match=f"byte {BLOCK_BYTES} ") as caught:
                await within(running.begin_read("a", offset, length))
            assert (caught.value.errno, caught.value.offset_bytes) == (errno.EIO, BLOCK_BYTES)
        with pytest.raises(BlockDamaged):
            await running.write(
                "a", BLOCK_BYTES + SECTOR_BYTES, b"x" * SECTOR_BYTES
            )  # would have to merge with damage
        assert await running.read("a", 0, BLOCK_BYTES) == data(1, 3)[:BLOCK_BYTES]
        await running.write("a", BLOCK_BYTES, data(2))
        assert await running.read("a", BLOCK_BYTES, BLOCK_BYTES) == data(2)


async def test_a_snapshot_takes_no_writes() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.pool.snapshot_create([("a", "s")])
        assert running.volume("a@s").read_only
        for command in (
            running.begin_write("a@s", 0, data(1)),
            running.begin_zero("a@s", 0, BLOCK_BYTES),
        ):
            with pytest.raises(
                PoolReadOnly, match="a snapshot, which never changes: clone it"
            ) as caught:
                await within(command)
            assert caught.value.errno == errno.EROFS
        await running.flush("a@s")


async def test_what_the_device_refuses_fails_with_its_reason_and_gives_the_blocks_back() -> None:
    async with new_pool(decorate=FaultyDevice) as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1))
        device, allocator = running.device, running.pool._state.allocator
        free = allocator.free_now
        device.faults.append(Fault(WRITE, nth=device.calls[WRITE] + 1, errno=errno.ENOSPC))
        with pytest.raises(StorageError, match="planted fault") as caught:
            await running.write("a", 0, data(2))
        assert caught.value.errno == errno.ENOSPC
        assert allocator.free_now == free
        assert await running.read("a", 0, BLOCK_BYTES) == data(1)
        await running.write("a", 0, data(3))
        assert await running.read("a", 0, BLOCK_BYTES) == data(3)


async def test_every_command_is_answered_once_even_if_the_store_itself_is_mistaken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.write("a", 0, data(1))
        volume, answers = running.volume("a"), Answers()

        def mistaken(*_: Any) -> Any:
            raise KeyError("a mistake of ours")

        with monkeypatch.context() as patched:
            patched.setattr(write_path, "write_now", mistaken)
            patched.setattr(write_path, "write_blocks", mistaken)
            patched.setattr(BufferTree, "load", mistaken)
            patched.setattr("storage.data.read_path.read_blocks", mistaken)
            volume.write(0, data(1), False, answers("whole"))
            volume.write(BLOCK_BYTES, data(1), True, answers("whole, fua"))
            volume.write(SECTOR_BYTES, b"x" * SECTOR_BYTES, False, answers("partial"))
            volume.settle()
            volume.write(0, data(1, 256) * 2, False, answers("large"))
            volume.settle()
            volume.unmap(0, BLOCK_BYTES, answers("unmap"))
            read = answers("read")
            volume.read(0, BLOCK_BYTES, lambda _, error: read(error))
            await drained(running, "a")
        assert all(
            isinstance(error, StorageError) and error.errno == errno.EIO
            for error in answers.once().values()
        ), answers.given
        assert all("KeyError" in str(error) for error in answers.once().values())


async def test_a_completion_that_raises_is_not_called_twice() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        calls = []

        def raising(error: Exception | None) -> None:
            calls.append(error)
            raise ZeroDivisionError

        volume = running.volume("a")
        for offset, length in ((0, BLOCK_BYTES), (SECTOR_BYTES, SECTOR_BYTES)):
            volume.write(offset, data(1)[:length], False, raising)
            with pytest.raises(ZeroDivisionError):
                volume.settle()
        assert calls == [None, None]


async def test_commands_of_no_length_do_nothing_and_succeed() -> None:
    delayed = Delayed()
    async with new_pool(decorate=delayed) as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        for offset in (0, SECTOR_BYTES, LEAF_BYTES):
            await running.write("a", offset, b"")
            await running.zero("a", offset, 0)
            assert await running.read("a", offset, 0) == b""
        delayed.device.hold(WRITE)
        under_way = running.begin_write("a", SECTOR_BYTES, data(1)[:SECTOR_BYTES])
        await running.until(lambda: delayed.device.held(WRITE) == 1)
        await running.write("a", 0, b"")  # by way of the locks
        delayed.device.release(WRITE)
        await within(under_way)
        assert running.image("a").used_blocks == 1


async def test_a_large_write_waits_for_the_device_and_lands_whole() -> None:
    async with new_pool(deferred=True, miss_rate=1.0, seed=3) as running:
        await running.pool.vdisk_create("a", 16 * LEAF_BYTES)
        content = data(1, 1500)
        await running.write("a", SECTOR_BYTES, content)
        assert await running.read("a", 0, len(content) + BLOCK_BYTES) == bytes(
            512
        ) + content + bytes(BLOCK_BYTES - 512)


async def test_invariant_7_no_byte_of_one_vdisk_is_readable_through_another() -> None:
    """Blocks change hands again and again; what a vdisk did not write itself reads as zeros."""
    async with new_pool(8 << 20) as running:
        for round_ in range(6):
            name = f"v{round_}"
            await running.pool.vdisk_create(name, LEAF_BYTES * 4)
            assert await running.read(name, 0, 600 * BLOCK_BYTES) == bytes(600 * BLOCK_BYTES)
            await running.write(name, 300 * BLOCK_BYTES + SECTOR_BYTES, b"\xee" * SECTOR_BYTES)
            found = await running.read(name, 300 * BLOCK_BYTES, BLOCK_BYTES)
            assert found == bytes(SECTOR_BYTES) + b"\xee" * SECTOR_BYTES + bytes(
                BLOCK_BYTES - 2 * SECTOR_BYTES
            )
            await running.write(name, 0, data(round_ + 1, 600))
            await running.pool.vdisk_delete(name)
        await running.reclaimed()


@pytest.mark.parametrize("what", ["source deleted", "destination shrunk"])
async def test_a_copy_by_reference_that_meets_a_deletion_or_a_shrink_fails_and_takes_nothing(
    what: str,
) -> None:
    """What reclaim takes apart must not gain references: the next owner of those blocks would be
    read through them (invariant 7).
    """
    async with new_pool() as running:
        for name in ("source", "copy"):
            await running.pool.vdisk_create(name, 4 * LEAF_BYTES)
        await running.write("source", 0, data(1, 900))
        await running.checkpoint()
        memory = running.memory.copy()
    device = DelayDevice(memory)
    async with opened(memory, device) as running:
        await running.pool.vdisk_create(
            "warm", LEAF_BYTES
        )  # now the maps are in memory, and only the source has to be read
        volume, answers = running.volume("copy"), Answers()
        device.hold(READ)
        volume.copy_from(running.volume("source"), 0, 0, 900 * BLOCK_BYTES, answers("copy"))
        await running.until(lambda: device.held(READ) > 0)
        change = (
            running.pool.vdisk_delete("source")
            if what == "source deleted"
            else running.pool.vdisk_resize("copy", LEAF_BYTES // 2)
        )
        task = asyncio.create_task(change)
        while not (
            running.image("copy").limit_bytes < 4 * LEAF_BYTES
            or "source" not in running.pool.names()
        ):
            await asyncio.sleep(0)
        device.release(READ)
        await within(task)
        await drained(running, "copy")
        error = answers.once()["copy"]
        assert isinstance(error, VolumeClosed if what == "source deleted" else OutOfRange)
        await running.reclaimed()
