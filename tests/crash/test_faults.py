"""For each public operation the n-th device call fails, for n = 1 until it passes untouched: once,
and from then on for ever.

And the same with a cancellation at the n-th suspension. What must hold: no false acknowledgement,
no hang, a readable pool afterwards; after a failed sync the pool is read-only and says so; after a
cancellation no lock, task, read pin or claim on a block is left behind.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from copy import deepcopy
from functools import partial
from typing import Any

import pytest

from storage.errors import StorageError
from storage.pool import Pool
from storage.state.host_room import QUIET_SECONDS
from tests.crash.determinism import SteadyPace, VirtualLoop, repeatable, run_to_the_end
from tests.crash.oracle import SECTORS_PER_BLOCK, Model
from tests.crash.recording import PageDevice, Pages, RecordingDevice
from tests.crash.session import CACHE_BYTES, Session, abandon, read_block, waiter
from tests.crash.verify import Verification, image_names, nothing
from tests.crash.workloads import POOL_BYTES, make_base
from tests.storage.devices import DISCARD, READ, SYNC, WRITE, Fault, FaultyDevice, FullHostDevice

# An operation makes fewer device calls of a kind than this, or the loop would not end.
CALLS_MAX = 400
SUSPENSIONS_MAX = 400

# Virtual seconds after which a full host has room again: several tries.
FULL_SECONDS = 3.0

Operation = Callable[[Session], Awaitable[Any]]
BLOCK = SECTORS_PER_BLOCK


async def split(session: Session, mode: str) -> None:
    session.split_mode = mode
    await session.split_start("c")
    while await session.step():
        pass
    state = session.pool.split_show("c")["state"]
    if state != "done":
        raise StorageError(f"the split is {state}")
    session.splits_ended = True


async def delete_snapshot(session: Session) -> None:
    await session.snapshot_delete("a", "spare")
    while await session.step():
        pass


async def delete_clone(session: Session) -> None:
    await session.delete("c")
    while await session.step():
        pass


async def rename(session: Session) -> None:
    after = session.model.begin()
    after["z"] = after.pop("c")
    await session.pool.vdisk_rename("c", "z")
    session.model.acknowledged()


async def steer_split(session: Session) -> None:
    pool = session.pool
    await session.split_start("c")
    await pool.split_pause("c")
    await session.step()
    await pool.split_resume("c")
    await session.step()
    await pool.split_cancel("c")
    session.model.all_durable()


async def configure(session: Session) -> None:
    try:
        await session.pool.configure("section", bytes(9000))
    except StorageError:
        assert session.pool.configuration("section") == b"", "what could not be stored is shown"
        raise
    assert session.pool.configuration("section") == bytes(9000)


async def snapshot_group(session: Session) -> None:
    after = session.model.begin()
    after["a@g"], after["c@g"] = after["a"].copy(), after["c"].copy()
    await session.pool.snapshot_create([("a", "g"), ("c", "g")])
    session.model.acknowledged()


async def read_everything(session: Session) -> None:
    for name in sorted(image_names(session.pool)):
        for fbn in (0, 2, 255, 256, 299):
            assert await read_block(session.pool.volume(name), fbn) == session.model.disks[
                name
            ].read(fbn)


async def copy_from(session: Session) -> None:
    """Two blocks of the vdisk's become the clone's, by reference."""
    source, target = session.model.disks["a"], session.model.disks["c"]
    target.write(40 * BLOCK, source.read(2) + source.read(3))
    future, done = waiter()
    session.pool.volume("c").copy_from(
        session.pool.volume("a"), 2 * 4096, 40 * 4096, 2 * 4096, done
    )
    await future
    target.durable_range(40 * BLOCK, 2 * BLOCK)


async def allocation(session: Session) -> None:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def done(runs: Any, error: Exception | None) -> None:
        if not future.cancelled():
            future.set_result(runs) if error is None else future.set_exception(error)

    volume = session.pool.volume("c")
    volume.allocation(0, volume.size_bytes, 1024, done)
    assert await future


async def scrub(session: Session) -> None:
    await session.pool.scrub_start(1 << 40)
    while await session.step():
        pass
    shown = session.pool.scrub_show()
    if shown["state"] != "done" or shown["damages"]:
        raise StorageError(f"the scrub is {shown['state']}, with {len(shown['damages'])} damages")


OPERATIONS: dict[str, Operation] = {
    "write": lambda session: session.write("a", 10 * BLOCK, 2 * BLOCK),
    "write_part": lambda session: session.write("c", 2 * BLOCK + 1, 3),
    "write_fua": lambda session: session.write("c", 3 * BLOCK, BLOCK, fua=True),
    "unmap": lambda session: session.unmap("c", 0, 4 * BLOCK + 3),
    "write_long": lambda session: session.write("a", 60 * BLOCK, 70 * BLOCK),
    "write_atomic": lambda session: session.write_atomic("a", 240, 32, fua=True),
    "write_zeros": lambda session: session.client.write_zeros(
        "a", 30 * BLOCK, 4 * BLOCK + 3, fua=True
    ),
    "copy_from": copy_from,
    "read": read_everything,
    "allocation": allocation,
    "flush": lambda session: session.flush("a"),
    "consistency_point": lambda session: session.consistency_point(),
    "create": lambda session: session.create("new", 700),
    "resize_down": lambda session: session.resize("a", 200),
    "resize_up": lambda session: session.resize("a", 70_000),
    "rename": rename,
    "snapshot": lambda session: session.snapshot_create("a", "new"),
    "snapshot_group": snapshot_group,
    "snapshot_delete": delete_snapshot,
    "clone": lambda session: session.clone_create("a", "base", "new"),
    "delete": delete_clone,
    "split_copy": lambda session: split(session, "copy"),
    "split_share": lambda session: split(session, "share"),
    "split_steered": steer_split,
    "split_estimate": lambda session: session.pool.split_estimate("c"),
    "show": lambda session: session.pool.vdisk_show("c"),
    "list": lambda session: session.pool.snapshot_list(),
    "configure": configure,
    "check": lambda session: session.pool.check(verify_data=True),
    "scrub": scrub,
}


@pytest.fixture(scope="module")
def base() -> tuple[Pages, Model]:
    loop = VirtualLoop()
    try:
        with repeatable():
            return run_to_the_end(loop, make_base())
    finally:
        loop.close()


def in_virtual_time(work: Coroutine[Any, Any, Any]) -> Any:
    """Run it to the end; what waits for ever is a Hang."""
    loop = VirtualLoop()
    try:
        return run_to_the_end(loop, work)
    finally:
        loop.close()


async def opened(device: Any, model: Model, on_event: Any = None) -> Session:
    """A pool in use: something is written and not durable, something is."""
    pool = await Pool.open_on(device, CACHE_BYTES, on_event)
    task = pool.rooms.handler._task
    assert task is not None
    task.cancel()
    await asyncio.wait([task])
    pool.rooms.handler._pace = SteadyPace()  # type: ignore[assignment]
    session = Session(pool, deepcopy(model))
    await session.write("a", 20 * BLOCK, BLOCK, fua=True)
    await session.write("c", 21 * BLOCK, BLOCK)
    return session


async def fail_once(base: tuple[Pages, Model], operation: Operation, fault: Fault) -> bool:
    """Whether the fault was met. Raises AssertionError for anything that must not be."""
    recording = RecordingDevice(POOL_BYTES, base[0], nothing)
    device = FaultyDevice(recording)
    events: list[str] = []
    session = await opened(device, base[1], lambda name, **fields: events.append(name))
    device.calls.clear()
    device.faults = [fault]
    failed = not await carried_out(session, operation, device)
    met = device.calls[fault.operation] >= fault.nth
    device.faults = []
    await still_reads(session)
    await shows_what_is(session)
    shown = session.pool.show()
    if fault.operation == SYNC and met:
        assert shown["read_only"] and shown["read_only_reason"], (
            "a sync failed, and the pool goes on as if nothing were"
        )
        assert "pool.read_only" in events and session.pool.volume("a").read_only
    if fault.errno == errno.ENOSPC:
        await goes_on(session)
    split_done = not failed and session.splits_ended
    await abandon(session.pool)
    if split_done:
        await split_is_durable(recording.base)
    if failed and session.model.after is None:
        session.model.begin()
    # Power is lost on top of it: nothing that was acknowledged may be missing, nothing that failed
    # may be half there.
    await Verification(recording.base, POOL_BYTES, session.model.expectation()).run(use=False)
    await Verification(dict(recording.pages), POOL_BYTES, session.model.expectation()).run(
        use=False
    )
    return met


async def carried_out(
    session: Session, operation: Operation, device: FaultyDevice | FullHostDevice
) -> bool:
    """Whether it succeeded. A host that is full has room again after a while: nothing waits any
    longer, and nothing is lost by the wait.
    """
    task = asyncio.create_task(as_coroutine(operation(session)))
    await asyncio.wait([task], timeout=FULL_SECONDS)
    make_room(device)
    await asyncio.wait([task])
    error = task.exception()
    assert error is None or isinstance(error, StorageError), error
    return error is None


def make_room(device: FaultyDevice | FullHostDevice) -> None:
    if isinstance(device, FullHostDevice):
        device.full = False
    else:
        device.faults = [fault for fault in device.faults if fault.errno != errno.ENOSPC]


async def goes_on(session: Session) -> None:
    """The host was full, and has room: that was no failure."""
    shown = session.pool.show()
    assert not shown["read_only"], shown["read_only_reason"]
    await session.pool.consistency_point()
    await asyncio.sleep(QUIET_SECONDS + 1)
    assert not session.pool.show()["host_full"], "the host has room, and the pool does not see it"


async def split_is_durable(pages: Pages) -> None:
    """A split that was said to be done is done after a power loss, too."""
    pool = await Pool.open_on(PageDevice(POOL_BYTES, dict(pages)), CACHE_BYTES)
    assert (await pool.vdisk_show("c"))["backing"] is None, (
        "a split was said to be done, and is not"
    )
    await abandon(pool)


async def still_reads(session: Session) -> None:
    for name in image_names(session.pool):
        disk = session.model.disks[name]
        for fbn in (0, 1, 2, 3, 255, 256):
            found = (
                await read_block(session.pool.volume(name), fbn)
                if fbn * 4096 < session.pool.volume(name).size_bytes
                else b""
            )
            lba = fbn * BLOCK
            for step in range(len(found) // 512):
                allowed = disk.sectors.get(lba + step, (bytes(512),))
                assert found[step * 512 : (step + 1) * 512] in allowed, (
                    f"{name}: sector {lba + step}"
                )


async def shows_what_is(session: Session) -> None:
    """What failed was never made, and is not shown; what was to go away is still there."""
    pool, disks = session.pool, session.model.disks
    assert image_names(pool) == disks.keys()
    rows = {row["name"]: row for row in [*await pool.vdisk_list(), *await pool.snapshot_list()]}
    assert {name: row["size_bytes"] for name, row in rows.items()} == {
        name: disk.size_blocks * 4096 for name, disk in disks.items()
    }
    assert all(pool.volume(name).name == name for name in disks)
    if pool.show()["read_only"]:
        assert not [row for row in pool.split_list() if row["state"] == "running"], (
            "nothing runs on a pool that takes no changes"
        )


FAULTS = [
    Fault(READ), Fault(READ, forever=True), Fault(WRITE), Fault(WRITE, forever=True),
    Fault(WRITE, errno=errno.ENOSPC), Fault(WRITE, errno=errno.ENOSPC, forever=True),
    Fault(WRITE, partial_bytes=4096), Fault(SYNC), Fault(SYNC, forever=True),
    Fault(DISCARD, forever=True),
]  # fmt: skip


def fault_name(fault: Fault) -> str:
    how = "short" if fault.partial_bytes else errno.errorcode[fault.errno]
    return f"{fault.operation}-{how}-{'forever' if fault.forever else 'once'}"


@pytest.mark.parametrize("fault", FAULTS, ids=fault_name)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_device_call_may_fail(base: tuple[Pages, Model], name: str, fault: Fault) -> None:
    until_untouched(
        fault, lambda numbered: bool(in_virtual_time(fail_once(base, OPERATIONS[name], numbered)))
    )


# --- Opening and closing --------------------------------------------------------------------------


async def left_by_a_crash(base: tuple[Pages, Model]) -> tuple[Pages, Model]:
    """A pool with a log to replay, a split to go on with, and a deleted image to take apart."""
    recording = RecordingDevice(POOL_BYTES, base[0], nothing)
    session = await opened(recording, base[1])
    await session.snapshot_delete("a", "spare")
    await session.split_start("c")
    await session.write("a", 2 * BLOCK, BLOCK)
    await session.unmap("c", 0, 2 * BLOCK)
    await session.write_atomic("a", 250, 8, fua=True)
    await abandon(session.pool)
    return dict(recording.pages), session.model


async def open_once(left: tuple[Pages, Model], fault: Fault) -> bool:
    """Whether the fault was met. A pool opens or is refused; either way everything is there when
    the device is sound again.
    """
    recording = RecordingDevice(POOL_BYTES, left[0], nothing)
    device = FaultyDevice(recording, fault)
    try:
        pool = await Pool.open_on(device, CACHE_BYTES)
    except StorageError:
        assert asyncio.all_tasks() == {asyncio.current_task()}, "a pool that did not open goes on"
        recording.close()
    else:
        await abandon(pool)
    for pages in (recording.base, recording.pages):
        await Verification(dict(pages), POOL_BYTES, left[1].expectation()).run(use=False)
    return device.calls[fault.operation] >= fault.nth


async def close_once(base: tuple[Pages, Model], fault: Fault) -> bool:
    """Whether the fault was met. The device is released whatever happens."""
    recording = RecordingDevice(POOL_BYTES, base[0], nothing)
    device = FaultyDevice(recording)
    session = await opened(device, base[1])
    device.calls.clear()
    device.faults = [fault]
    await session.pool.close()
    met = device.calls[fault.operation] >= fault.nth
    assert recording.closed and asyncio.all_tasks() == {asyncio.current_task()}
    if not met:
        session.model.all_durable()
    await Verification(recording.base, POOL_BYTES, session.model.expectation()).run(use=False)
    return met


def until_untouched(fault: Fault, once: Callable[[Fault], bool]) -> None:
    """For n = 1 until it passes untouched."""
    for nth in range(1, CALLS_MAX):
        if not once(Fault(fault.operation, nth, fault.errno, fault.forever, fault.partial_bytes)):
            return
    raise AssertionError("it does not come to an end of its device calls")


@pytest.mark.parametrize("fault", FAULTS, ids=fault_name)
def test_every_device_call_of_an_open_may_fail(base: tuple[Pages, Model], fault: Fault) -> None:
    left = in_virtual_time(left_by_a_crash(base))
    until_untouched(fault, lambda numbered: bool(in_virtual_time(open_once(left, numbered))))


@pytest.mark.parametrize("fault", FAULTS, ids=fault_name)
def test_every_device_call_of_a_close_may_fail(base: tuple[Pages, Model], fault: Fault) -> None:
    until_untouched(fault, lambda numbered: bool(in_virtual_time(close_once(base, numbered))))


# --- Cancellation ---------------------------------------------------------------------------------


class Stepper:
    """Drives a coroutine for its Task, and cancels that Task at the n-th suspension: what is waited
    for there is cancelled first.
    """

    def __init__(self, work: Coroutine[Any, Any, Any], nth: int) -> None:
        self._work = work
        self._nth = nth
        self.suspensions = 0

    def __await__(self) -> Any:
        iterator = self._work.__await__()
        step = partial(iterator.send, None)
        try:
            while True:
                waiting = step()
                self.suspensions += 1
                task = asyncio.current_task()
                if self.suspensions == self._nth and task is not None:
                    task.cancel()
                try:
                    step = partial(iterator.send, (yield waiting))
                except BaseException as error:
                    step = partial(iterator.throw, error)
        except StopIteration as end:
            return end.value


async def cancel_once(base: tuple[Pages, Model], operation: Operation, nth: int) -> bool:
    """Whether the cancellation was met."""
    recording = RecordingDevice(POOL_BYTES, base[0], nothing, seed=nth)
    session = await opened(recording, base[1])
    stepper = Stepper(as_coroutine(operation(session)), nth)
    task = asyncio.create_task(as_coroutine(stepper))
    await asyncio.wait([task])
    met = stepper.suspensions >= nth
    assert task.cancelled() or task.exception() is None, task.exception()
    if task.cancelled() and session.model.after is None:
        session.model.begin()
    await settle(session)
    nothing_is_left(session.pool)
    await still_usable(session)
    await abandon(session.pool)
    await Verification(recording.base, POOL_BYTES, session.model.expectation()).run(use=False)
    return met


async def as_coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


async def settle(session: Session) -> None:
    """Let everything that goes on without its caller come to an end."""
    for volume in session.pool.rooms.volumes.all():
        await volume.drain()
    await session.pool.rooms.log.drain()
    await session.pool.consistency_point()
    await asyncio.sleep(0)


def nothing_is_left(pool: Pool) -> None:
    state = pool._state
    assert state.read_only_reason is None
    assert state.frozen is None and not state.epoch.readers
    assert not pool.rooms.retired.epochs
    for name in image_names(pool):
        volume = pool.volume(name)
        assert not volume._locks.held and not volume._tasks and volume.image.busy is None, name
    expected = {pool.rooms.points._task, asyncio.current_task()}
    # The consistency point's timer runs as a task of its own (asyncio.wait_for).
    others = [
        task
        for task in asyncio.all_tasks()
        if task not in expected and "Event.wait" not in repr(task.get_coro())
    ]
    assert not others


async def still_usable(session: Session) -> None:
    """The names may have changed; whatever there is, can be written and made durable."""
    name = session.pool.names()[0]
    await session.client.write(name, 60 * BLOCK, bytes(range(256)) * 16, fua=True)
    await session.client.write(name, 60 * BLOCK, bytes(4096), fua=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_suspension_may_be_a_cancellation(base: tuple[Pages, Model], name: str) -> None:
    for nth in range(1, SUSPENSIONS_MAX):
        if not in_virtual_time(cancel_once(base, OPERATIONS[name], nth)):
            return
    raise AssertionError(f"{name} does not come to an end of its suspensions")
