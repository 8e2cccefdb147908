"""A host without room is a state: it comes and goes at any call, and the pool loses nothing, stops
for nothing, and goes on by itself.

The device is a sparse file (FullHostDevice). While its host is full, only what was written or set
aside before can be written.
"""

import asyncio
import errno
from typing import Any

import pytest

from storage.errors import DeviceFull, HostStaysFull, StorageError
from storage.layout import SUPERBLOCK_VBNS
from storage.pool import Pool
from storage.pool.closing import CLOSE_SECONDS
from tests.crash.oracle import Model
from tests.crash.recording import PageDevice, Pages, RecordingDevice
from tests.crash.session import CACHE_BYTES, Session, abandon, waiter
from tests.crash.test_faults import (
    BLOCK,
    CALLS_MAX,
    FULL_SECONDS,
    OPERATIONS,
    base,
    carried_out,
    goes_on,
    in_virtual_time,
    left_by_a_crash,
    make_room,
    opened,
    shows_what_is,
    split_is_durable,
    still_reads,
)
from tests.crash.verify import Verification, nothing
from tests.crash.workloads import POOL_BYTES
from tests.storage.devices import FullHostDevice
from tests.storage.ordering import OrderingChecker

__all__ = ["base"]

# What makes room, what only makes durable, and what only reads, works on a full host; and so do a
# few small changes.
ALWAYS = (
    "read", "allocation", "flush", "consistency_point", "rename", "snapshot", "snapshot_delete",
    "delete", "unmap", "resize_down", "configure", "show", "list", "check", "scrub", "create",
)  # fmt: skip
# An orderly stop has ten seconds in all.
STOP_SECONDS = 10.0


class Rig:
    """A pool on a sparse file: in use, and its host about to be full."""

    def __init__(self, base: tuple[Pages, Model]) -> None:
        self.recording = RecordingDevice(POOL_BYTES, base[0], nothing)
        self.device = FullHostDevice(self.recording, base[0])
        self.events: list[tuple[str, dict[str, Any]]] = []

    async def open(self, model: Model) -> Session:
        session = await opened(
            self.device, model, lambda name, **fields: self.events.append((name, fields))
        )
        await session.pool.rooms.allocator.stock.top_up()
        # Nothing but what is in use, or was set aside: what else was written once would make it
        # easy.
        self.device.allocated &= (
            used_pages(self.recording.base, self.recording.pages) | self.device.reserved
        )
        self.device.calls = 0
        return session

    def count(self, event: str) -> int:
        return [name for name, _ in self.events].count(event)

    async def verify(self, model: Model) -> None:
        """After a power loss, and after the death of the process alone."""
        for pages in (self.recording.base, self.recording.pages):
            await Verification(dict(pages), POOL_BYTES, model.expectation()).run(use=False)


async def comes_and_goes(base: tuple[Pages, Model], name: str, nth: int) -> bool:
    """The host is full from the n-th call on that needs room, and has some again after a while.
    Returns whether that was met.
    """
    rig = Rig(base)
    session = await rig.open(base[1])
    rig.device.full_from = nth
    succeeded = await carried_out(session, OPERATIONS[name], rig.device)
    met = rig.device.calls >= nth
    rig.device.full_from = None
    await still_reads(session)
    await shows_what_is(session)
    await goes_on(session)
    assert rig.count("pool.host_full") == rig.count("pool.host_room") <= met, "once for each time"
    split_done = succeeded and session.splits_ended
    await abandon(session.pool)
    if split_done:
        await split_is_durable(rig.recording.base)
    if not succeeded and session.model.after is None:
        session.model.begin()
    await rig.verify(session.model)
    return met


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_full_host_comes_and_goes(base: tuple[Pages, Model], name: str) -> None:
    for nth in range(1, CALLS_MAX):
        if not in_virtual_time(comes_and_goes(base, name, nth)):
            return
    raise AssertionError("it does not come to an end of its calls")


async def on_a_full_host(base: tuple[Pages, Model], name: str) -> None:
    rig = Rig(base)
    session = await rig.open(base[1])
    rig.device.full = True
    await OPERATIONS[name](session)
    await session.pool.consistency_point()
    assert not session.pool.show()["read_only"]
    await session.pool.close()
    # All that was acknowledged is in the last consistency point: nothing is left to the log.
    assert rig.events[-1] == (
        "pool.closed",
        {"cp_number": session.pool.rooms.superblock.cp_number, "log_records": 0},
    )
    session.model.all_durable()
    await rig.verify(session.model)


@pytest.mark.parametrize("name", ALWAYS)
def test_what_needs_no_room_goes_on_on_a_full_host(base: tuple[Pages, Model], name: str) -> None:
    in_virtual_time(on_a_full_host(base, name))


async def writes_refused_and_taken_again(base: tuple[Pages, Model]) -> None:
    rig = Rig(base)
    session = await rig.open(base[1])
    rig.device.full = True
    volume = session.pool.volume("a")
    for _ in range(3):
        future, done = waiter()
        volume.write(100 << 12, b"x" * 4096, False, done)
        volume.settle()
        with pytest.raises(DeviceFull) as refused:
            await within(0.01, future)
        assert refused.value.errno == errno.ENOSPC
    shown = session.pool.show()
    assert (shown["host_full"], shown["available_bytes"], shown["available_limited_by"]) == (
        True,
        0,
        "host",
    )
    assert (
        shown["host_available_bytes"] == 0
        and shown["host_full_since_ns"]
        and shown["host_reserve_bytes"]
    )
    assert rig.count("pool.host_full") == 1
    rig.device.full = False
    await within(0.01, session.write("a", 100 * BLOCK, BLOCK, fua=True))
    await asyncio.sleep(1)
    shown = session.pool.show()
    assert (shown["host_full"], shown["available_limited_by"], shown["host_full_since_ns"]) == (
        False,
        "pool",
        None,
    )
    assert rig.count("pool.host_room") == 1
    await abandon(session.pool)
    await rig.verify(session.model)


def test_writes_are_refused_at_once_and_taken_as_soon_as_there_is_room(
    base: tuple[Pages, Model],
) -> None:
    in_virtual_time(writes_refused_and_taken_again(base))


async def reopened_on_a_full_host(base: tuple[Pages, Model]) -> None:
    rig = Rig(base)
    session = await rig.open(base[1])
    rig.device.full = True
    await session.flush("a")
    await session.pool.close()
    recording = RecordingDevice(POOL_BYTES, rig.recording.pages, nothing)
    rig.device.inner, rig.recording = recording, recording
    # Much is allocated, but in pieces: no run that is asked for whole.
    used = used_pages({}, recording.pages)
    rig.device.allocated = {page for page in range(POOL_BYTES // 4096) if page in used or page % 3}
    again = Session(await Pool.open_on(rig.device, CACHE_BYTES), session.model)
    await again.pool.rooms.allocator.stock.top_up()
    stock = again.pool.rooms.allocator.stock
    assert stock.blocks >= stock.kept_blocks, "what an earlier life had set aside is found again"
    await still_reads(again)
    await again.snapshot_delete("a", "spare")
    await again.pool.close()
    again.model.all_durable()
    await rig.verify(again.model)


def test_a_start_on_a_full_host_finds_what_was_set_aside(base: tuple[Pages, Model]) -> None:
    in_virtual_time(reopened_on_a_full_host(base))


# --- Nothing set aside ----------------------------------------------------------------------------


def used_pages(base: Pages, pages: Pages) -> set[int]:
    """What a pool cannot do without: in use by its consistency point, or other than in ``base``, an
    earlier state of the device.
    """
    checker = OrderingChecker(PageDevice(POOL_BYTES, pages))
    return {
        vbn
        for vbn in pages
        if checker._durable.uses(vbn) or vbn < checker._first_free or pages[vbn] != base.get(vbn)
    }


async def nothing_set_aside(base: tuple[Pages, Model], close: bool) -> None:
    pages, model = await left_by_a_crash(base)
    recording = RecordingDevice(POOL_BYTES, pages, nothing)
    device = FullHostDevice(recording, used_pages(base[0], pages))
    device.full = True
    events: list[str] = []
    pool = await Pool.open_on(device, CACHE_BYTES, lambda name, **fields: events.append(name))
    session = Session(pool, model)
    await still_reads(session)
    waiting = asyncio.gather(
        *(outcome(pool.consistency_point()) for _ in range(2)),
        outcome(pool.vdisk_create("new", 4096)),
    )
    await asyncio.sleep(FULL_SECONDS)
    assert not waiting.done() and not pool.show()["read_only"] and pool.show()["host_full"]
    await still_reads(session)
    assert events.count("pool.host_full") == 1
    if close:
        await within(STOP_SECONDS, pool.close())
        assert all(isinstance(error, HostStaysFull | StorageError) for error in await waiting), (
            "what waits is answered"
        )
        assert "pool.closed_on_full_host" in events and recording.closed
    else:
        device.full = False
        errors = await within(1.0, waiting)
        assert errors == [None, None, None], "the same consistency point, once there is room"
        assert not pool.show()["read_only"]
        await pool.vdisk_delete("new")
        await abandon(pool)
    for left in (recording.base, recording.pages):
        await Verification(dict(left), POOL_BYTES, model.expectation()).run(use=False)


async def outcome(work: Any) -> StorageError | None:
    try:
        await work
    except StorageError as error:
        return error
    return None


async def within(seconds: float, work: Any) -> Any:
    started = asyncio.get_running_loop().time()
    result = await work
    assert asyncio.get_running_loop().time() - started <= seconds
    return result


@pytest.mark.parametrize("close", [False, True], ids=["room", "close"])
def test_a_consistency_point_waits_for_room(base: tuple[Pages, Model], close: bool) -> None:
    in_virtual_time(nothing_set_aside(base, close))


async def acknowledged_while_it_waits(base: tuple[Pages, Model]) -> None:
    """A stop in that state: what was acknowledged and flushed while the consistency point waits is
    durable in the log.
    """
    rig = Rig(base)
    session = await rig.open(base[1])
    stock = session.pool.rooms.allocator.stock
    stock._runs, stock.blocks, rig.device.allocated = (
        [],
        0,
        used_pages(rig.recording.base, rig.recording.pages),
    )
    rig.device.full = True
    point = asyncio.ensure_future(outcome(session.pool.consistency_point()))
    await asyncio.sleep(FULL_SECONDS)
    assert not point.done()
    await session.unmap("a", 20 * BLOCK, BLOCK)
    await session.flush("a")
    await within(CLOSE_SECONDS + 1, session.pool.close())
    assert isinstance(await point, HostStaysFull)
    assert dict(rig.events)["pool.closed_on_full_host"]["log_records"] > 0
    await rig.verify(session.model)


def test_a_stop_while_a_consistency_point_waits_loses_nothing(base: tuple[Pages, Model]) -> None:
    in_virtual_time(acknowledged_while_it_waits(base))


async def room_after_it_was_given_up(base: tuple[Pages, Model]) -> None:
    rig = Rig(base)
    session = await rig.open(base[1])
    stock = session.pool.rooms.allocator.stock
    stock._runs, stock.blocks, rig.device.allocated = (
        [],
        0,
        used_pages(rig.recording.base, rig.recording.pages),
    )
    await session.write("c", 22 * BLOCK, BLOCK, fua=True)
    rig.device.full = True
    point = asyncio.ensure_future(outcome(session.pool.consistency_point()))
    points = session.pool.rooms.points
    points._revert = lambda: make_room(rig.device)  # type: ignore[method-assign]
    await asyncio.sleep(FULL_SECONDS)
    await session.unmap("a", 20 * BLOCK, BLOCK)
    await session.pool.close()
    assert (
        not rig.device.full
        and isinstance(await point, HostStaysFull)
        and not rig.count("pool.read_only")
    )
    await rig.verify(session.model)


def test_no_consistency_point_follows_one_that_was_given_up(base: tuple[Pages, Model]) -> None:
    """It would make a state durable that lacks what the first one holds."""
    in_virtual_time(room_after_it_was_given_up(base))


class SuperblocksRefused(FullHostDevice):
    """A host that is full for the superblocks alone, as one may be that never writes in place."""

    def _allocate(self, offset_bytes: int, length_bytes: int) -> None:
        if self.full and offset_bytes // 4096 in SUPERBLOCK_VBNS:
            raise DeviceFull("no room for a superblock")


async def written_before_the_log_is_found(base: tuple[Pages, Model]) -> None:
    pages, model = await left_by_a_crash(base)
    recording = RecordingDevice(POOL_BYTES, pages, nothing)
    device = SuperblocksRefused(recording, pages)
    device.full = True
    session = Session(await Pool.open_on(device, CACHE_BYTES), model)
    log = session.pool.rooms.log
    assert log.held
    writing = asyncio.create_task(session.write("a", 30 * BLOCK, BLOCK, fua=True))
    await asyncio.wait([writing], timeout=FULL_SECONDS)
    assert not writing.done()
    device.full = False
    await writing
    await session.write("a", 31 * BLOCK, BLOCK, fua=True)
    await abandon(session.pool)
    await Verification(recording.base, POOL_BYTES, model.expectation()).run(use=False)


def test_nothing_is_logged_before_a_superblock_says_where_the_log_goes_on(
    base: tuple[Pages, Model],
) -> None:
    """After a replay it may go on elsewhere than it did; what lay there would not be found after
    the next crash.
    """
    in_virtual_time(written_before_the_log_is_found(base))
