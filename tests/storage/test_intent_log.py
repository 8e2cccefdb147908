"""The intent log: group commit, room in the ring, and what a record says."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from storage.device import Buffer, Device
from storage.epoch.epoch import Epoch
from storage.epoch.log_queue import LogEntry
from storage.errors import StorageError
from storage.layout import BLOCK_BYTES, ENTRIES_PER_RECORD, LOG_FIRST_VBN
from storage.log.intent_log import IntentLog
from storage.log.record import LogRecord
from storage.log.ring import Ring
from storage.state.host_room import HostRoom
from storage.state.point_requests import AtFreeze, PointRequests
from storage.state.pool_state import PoolState
from tests.storage.devices import (
    SYNC,
    WRITE,
    DelayDevice,
    Fault,
    FaultyDevice,
    MemoryDevice,
    WrappedDevice,
)
from tests.storage.pools import LEAF_BYTES, data, new_pool, opened, within

UUID_BYTES = bytes(range(16))
RING_BLOCKS = 64


class Log:
    """A log over a device in memory, with nothing else of a pool."""

    def __init__(
        self,
        decorate: Callable[
            [MemoryDevice], DelayDevice | FaultyDevice | MemoryDevice
        ] = lambda memory: memory,
    ) -> None:
        self.memory = MemoryDevice(1 << 20)
        self.device = decorate(self.memory)
        self.state = PoolState(self.device, 0, 1 << 20)
        self.log = IntentLog(
            self.state, HostRoom(self.state), self._requests(), UUID_BYTES, RING_BLOCKS, 0, 1
        )
        self.points = 0

    def _requests(self) -> PointRequests:
        point = self._point

        class Requests(PointRequests):
            """Each request is served at once."""

            def request(self, at_freeze: AtFreeze | None = None) -> "asyncio.Future[None]":
                return point()

        return Requests()

    def _point(self) -> "asyncio.Future[None]":
        """A consistency point in one step: everything is durable, the log empty."""
        self.points += 1
        _, _, used = self.log.mark()
        self.state.frozen, self.state.epoch = None, Epoch(self.state.epoch.number + 1)
        self.log.trim(used)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def change(self, count: int, fbn: int = 0) -> None:
        self.state.epoch.unlogged.entries.extend(
            (1, 0, fbn + index, 1, 1) for index in range(count)
        )

    async def flush(self) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.log.flush(
            lambda error: done.set_exception(error) if error is not None else done.set_result(None)
        )
        await within(done)

    def ring(self) -> Ring:
        content = bytearray(RING_BLOCKS * BLOCK_BYTES)
        self.memory._read([content], LOG_FIRST_VBN * BLOCK_BYTES)
        return Ring(content, UUID_BYTES)


def record_of(
    entries: list[LogEntry], sequence: int = 1, cp_number: int = 1, durable: int = 0
) -> bytearray:
    record = LogRecord(0, sequence, cp_number, durable, UUID_BYTES)
    record.add(entries)
    return record.buf


def test_a_record_says_what_was_put_in() -> None:
    entries = [(7, 0xDEADBEEF, 1 << 38, 12345, 1), (8, 0, 5, 1, 1 << 38)]
    record = record_of(entries, 42, 9, 41)
    assert len(record) == BLOCK_BYTES
    found = Ring(record, UUID_BYTES).record_at(0)
    assert found is not None
    assert (
        found.sequence,
        found.cp_number,
        found.durable_sequence,
        found.blocks,
        found.entries,
    ) == (42, 9, 41, 1, entries)
    assert Ring(record, bytes(16)).record_at(0) is None  # another pool's
    for at in (0, 5, 20, 60, BLOCK_BYTES - 1):
        spoilt = bytearray(record)
        spoilt[at] ^= 1
        assert Ring(spoilt, UUID_BYTES).record_at(0) is None


def test_a_record_grows_until_it_is_full() -> None:
    record = LogRecord(0, 1, 1, 0, UUID_BYTES)
    entries = [(1, number, number + 5, number + 9, 1) for number in range(ENTRIES_PER_RECORD)]
    for number, entry in enumerate(entries):
        assert record.room == ENTRIES_PER_RECORD - number
        record.add([entry])
        found = Ring(record.buf, UUID_BYTES).record_at(0)
        assert found is not None
        assert found.entries == entries[: number + 1]
    assert record.room == 0


async def test_all_flushes_that_wait_share_the_next_record() -> None:
    log = Log(DelayDevice)
    assert isinstance(log.device, DelayDevice)
    log.device.hold(SYNC)
    log.change(1)
    flush = first = asyncio.create_task(log.flush())
    while not log.device.held(SYNC) and not flush.done():
        await asyncio.sleep(0)
    log.change(3)
    others = [asyncio.create_task(log.flush()) for _ in range(20)]
    await asyncio.sleep(0)
    log.device.release(SYNC)
    await asyncio.gather(first, *others)
    assert log.log.commits == 2
    assert [len(record.entries) for record in log.ring().records_from(1)] == [1, 3, 0]


async def test_a_record_says_that_those_before_it_are_durable() -> None:
    log = Log()
    for _ in range(3):
        log.change(1)
        await log.flush()
    assert [record.durable_sequence for record in log.ring().records_from(1)] == [0, 1, 2, 3]


async def test_records_go_round_the_ring() -> None:
    log = Log()
    for round_ in range(200):
        log.change(ENTRIES_PER_RECORD * 2, round_)
        await log.flush()
        if round_ % 20 == 19:
            _, sequence, _ = log.log.mark()
            await log._point()
    assert log.points == 10
    log.change(ENTRIES_PER_RECORD * 5)
    await log.flush()
    records = log.ring().records_from(sequence)
    assert [len(record.entries) for record in records] == [ENTRIES_PER_RECORD] * 5 + [0]


async def test_a_full_ring_is_emptied_by_a_consistency_point_and_never_written_over() -> None:
    log = Log()
    for _ in range(RING_BLOCKS):
        log.change(1)
        await log.flush()
    assert log.points == 0 and len(log.ring().records_from(1)) == RING_BLOCKS
    log.change(1)
    await log.flush()
    assert log.points == 1 and len(log.ring().records_from(1)) == RING_BLOCKS


async def test_changes_that_the_ring_has_no_room_for_become_durable_by_a_consistency_point() -> (
    None
):
    log = Log()
    log.change(RING_BLOCKS * ENTRIES_PER_RECORD + 1)
    await log.flush()
    assert log.points == 1
    assert len(log.ring().records_from(1)) == RING_BLOCKS


async def test_changes_are_noted_without_a_sync_and_the_open_record_grows() -> None:
    log = Log(lambda memory: FaultyDevice(memory, Fault(SYNC)))
    for number in range(5):
        log.change(1, number)
        log.log.note()
        (record,) = log.ring().records_from(1)
        assert [entry[2] for entry in record.entries] == list(range(number + 1))
    assert isinstance(log.device, FaultyDevice)
    assert log.device.calls.get(SYNC, 0) == 0


async def test_a_record_that_a_flush_counts_on_is_never_written_over() -> None:
    log = Log()
    log.change(1)
    await log.flush()
    first = bytes(log.ring()._data[:BLOCK_BYTES])
    log.change(1, 5)
    log.log.note()
    assert bytes(log.ring()._data[:BLOCK_BYTES]) == first
    assert [record.durable_sequence for record in log.ring().records_from(1)] == [0, 1]


async def test_changes_of_the_frozen_epoch_come_before_those_of_the_current_one() -> None:
    log = Log()
    log.change(1, 100)
    frozen = log.state.epoch
    log.log.mark()
    log.state.frozen, log.state.epoch = frozen, Epoch(frozen.number + 1)
    log.change(1, 200)
    log.log.note()
    records = log.ring().records_from(1)
    assert [(record.cp_number, record.entries[0][2]) for record in records] == [
        (frozen.number, 100),
        (frozen.number + 1, 200),
    ]


async def test_what_the_device_does_not_take_at_once_is_written_in_order_later() -> None:
    log = Log(lambda memory: MemoryDevice(memory.size_bytes, deferred=True, miss_rate=1.0, seed=1))
    for number in range(3):
        log.change(ENTRIES_PER_RECORD, number)
        log.log.note()
    await log.flush()
    content = bytearray(RING_BLOCKS * BLOCK_BYTES)
    await log.device.readv([content], LOG_FIRST_VBN * BLOCK_BYTES)
    records = Ring(content, UUID_BYTES).records_from(1)
    assert [record.entries[0][2] for record in records] == [0, 1, 2]


class SometimesAtOnce(DelayDevice):
    """What goes by the threads can be held; what is taken at once is on the device."""

    refuses = True

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        return not self.refuses and self.inner.try_writev(buffers, offset_bytes, length_bytes)


async def test_a_record_is_not_overtaken_by_one_that_the_device_takes_at_once() -> None:
    log = Log(SometimesAtOnce)
    assert isinstance(log.device, SometimesAtOnce)
    log.device.hold(WRITE)
    log.change(ENTRIES_PER_RECORD)
    assert not log.log.note()
    noted: list[Exception | None] = []
    log.log.when_noted(noted.append)
    while not log.device.held(WRITE):
        await asyncio.sleep(0)
    log.device.refuses = False
    log.change(1, 5)
    assert not log.log.note()  # the first record is on its way
    assert not noted and not log.ring().records_from(1)
    log.device.release(WRITE)
    await log.log.drain()
    assert noted == [None]
    assert log.log.note()
    assert [len(record.entries) for record in log.ring().records_from(1)] == [ENTRIES_PER_RECORD, 1]


@pytest.mark.parametrize("operation", [WRITE, SYNC])
async def test_after_a_failed_commit_nothing_is_acknowledged_as_durable(operation: str) -> None:
    log = Log(lambda memory: FaultyDevice(memory, Fault(operation)))
    log.change(1)
    with pytest.raises(StorageError, match="planted fault"):
        await log.flush()
    assert log.state.read_only_reason is not None
    with pytest.raises(StorageError, match="the pool is read-only: the device failed to"):
        await log.flush()


async def test_a_mistake_in_the_log_answers_the_flush_and_the_next_one() -> None:
    log = Log()
    log.state.epoch.unlogged.entries.append(
        (-1, 0, 0, 1, 1)
    )  # no image has that number, and no record can say it
    for _ in range(2):
        with pytest.raises(StorageError, match="internal error"):
            await log.flush()
        log.state.epoch.unlogged.entries.append((-1, 0, 0, 1, 1))


async def test_invariant_1_what_was_flushed_or_written_with_fua_survives() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.write("a", 0, data(1, 10), fua=True)
        after_fua = running.memory.copy()
        await running.write("a", 5 * BLOCK_BYTES, data(2, 10))
        await running.zero("a", 0, 3 * BLOCK_BYTES)
        await running.flush("a")
        after_flush = running.memory.copy()
        await running.zero("a", 3 * BLOCK_BYTES, BLOCK_BYTES, fua=True)
        after_zeros = running.memory.copy()
    first, second = data(1, 10), data(2, 10)
    async with opened(after_fua) as running:
        assert await running.read("a", 0, len(first)) == first
    expected = bytes(3 * BLOCK_BYTES) + first[3 * BLOCK_BYTES : 5 * BLOCK_BYTES] + second
    async with opened(after_flush) as running:
        assert await running.read("a", 0, len(expected)) == expected
    async with opened(after_zeros) as running:
        assert (
            await running.read("a", 0, len(expected))
            == bytes(4 * BLOCK_BYTES) + expected[4 * BLOCK_BYTES :]
        )


class NeverAtOnce(WrappedDevice):
    """As a device is when much is dirty: whatever is written goes by the threads."""

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        return False


@pytest.mark.parametrize(
    "decorate", [lambda memory: memory, NeverAtOnce], ids=["at once", "by the threads"]
)
async def test_a_killed_process_loses_no_acknowledged_write(
    decorate: Callable[[MemoryDevice], Device],
) -> None:
    """What was in the page cache is still there: all that was acknowledged, flushed or not, is
    found again at the next start.

    By the threads: found by review, for acknowledgements did not wait for their records there.
    """
    async with new_pool(decorate=decorate) as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        for index in range(300):
            await running.write("a", index * BLOCK_BYTES, data(index, 1))
        await running.zero("a", 7 * BLOCK_BYTES, 3 * BLOCK_BYTES)
        killed = running.memory.copy()
    async with opened(killed) as running:
        for index in range(300):
            expected = bytes(BLOCK_BYTES) if 7 <= index < 10 else data(index, 1)
            assert await running.read("a", index * BLOCK_BYTES, BLOCK_BYTES) == expected


@pytest.mark.parametrize(
    ("writes", "filled", "expected"),
    [
        ([[(1, 10, 4)]], 0, [4]),
        ([[(1, 10, 4)]], ENTRIES_PER_RECORD - 4, [ENTRIES_PER_RECORD]),
        ([[(1, 10, 4)]], ENTRIES_PER_RECORD - 2, [ENTRIES_PER_RECORD - 2, 4]),
        (
            [[(1, 10, 1), (1, 20, 1), (1, 30, 2)]],
            ENTRIES_PER_RECORD - 3,
            [ENTRIES_PER_RECORD - 1, 2],
        ),
        ([[(1, 10, 2), (2, 12, 2)]], ENTRIES_PER_RECORD - 3, [ENTRIES_PER_RECORD - 1, 2]),
        ([[(1, 10, 100)], [(1, 110, 20)], [(1, 130, 30)]], 0, [120, 30]),
        (
            [[(1, 0, 300)]],
            5,
            [5, ENTRIES_PER_RECORD, ENTRIES_PER_RECORD, 300 - 2 * ENTRIES_PER_RECORD],
        ),
    ],
)
async def test_no_write_lies_in_two_records_that_fits_into_one(
    writes: list[list[tuple[int, int, int]]], filled: int, expected: list[int]
) -> None:
    """``writes`` are batches of (image, FBN, blocks), noted while the ring was full and logged when
    it was not; ``filled`` comes first.
    """
    log = Log()
    log.log._used_blocks = RING_BLOCKS if not filled else 0
    log.state.epoch.unlogged.entries.extend((9, 7, 2 * fbn, 100 + fbn, 1) for fbn in range(filled))
    log.log.note()
    log.log._used_blocks = RING_BLOCKS if len(writes) > 1 else log.log._used_blocks
    for batch in writes:
        log.state.epoch.unlogged.entries.extend(
            (image, 7, first + at, 1000 + at, 1)
            for image, first, count in batch
            for at in range(count)
        )
        log.log.note()
    log.log._used_blocks = 0
    log.log.note()
    assert [len(record.entries) for record in log.ring().records_from(1)] == expected
