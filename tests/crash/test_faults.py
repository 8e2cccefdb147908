"""For each public operation the n-th device call fails, for n = 1 until it passes untouched: once, and from then on for ever.

And the same with a cancellation at the n-th suspension. What must hold: no false acknowledgement, no hang, a readable pool afterwards;
after a failed sync the pool is read-only and says so; after a cancellation no lock, task, read pin or claim on a block is left behind.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from copy import deepcopy
from typing import Any

import pytest

from storage.errors import StorageError
from storage.pool import Pool
from tests.crash.determinism import SteadyPace, VirtualLoop, repeatable, run_to_the_end
from tests.crash.oracle import SECTORS_PER_BLOCK, Model
from tests.crash.recording import PageDevice, Pages, RecordingDevice
from tests.crash.session import CACHE_BYTES, Session, abandon, read_block
from tests.crash.verify import Verification, image_names, nothing
from tests.crash.workloads import POOL_BYTES, make_base
from tests.storage.devices import DISCARD, READ, SYNC, WRITE, Fault, FaultyDevice

# An operation makes fewer device calls of a kind than this, or the loop would not end.
CALLS_MAX = 400
SUSPENSIONS_MAX = 400

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


OPERATIONS: dict[str, Operation] = {
    "write": lambda session: session.write("a", 10 * BLOCK, 2 * BLOCK),
    "write_part": lambda session: session.write("c", 2 * BLOCK + 1, 3),
    "write_fua": lambda session: session.write("c", 3 * BLOCK, BLOCK, fua=True),
    "unmap": lambda session: session.unmap("c", 0, 4 * BLOCK + 3),
    "flush": lambda session: session.flush("a"),
    "consistency_point": lambda session: session.consistency_point(),
    "create": lambda session: session.create("new", 700),
    "resize_down": lambda session: session.resize("a", 200),
    "resize_up": lambda session: session.resize("a", 70_000),
    "rename": lambda session: rename(session),
    "snapshot": lambda session: session.snapshot_create("a", "new"),
    "snapshot_delete": delete_snapshot,
    "clone": lambda session: session.clone_create("a", "base", "new"),
    "delete": delete_clone,
    "split_copy": lambda session: split(session, "copy"),
    "split_share": lambda session: split(session, "share"),
    "split_estimate": lambda session: session.pool.split_estimate("c"),
    "show": lambda session: session.pool.vdisk_show("c"),
    "list": lambda session: session.pool.snapshot_list(),
    "check": lambda session: session.pool.check(verify_data=True),
}


async def rename(session: Session) -> None:
    after = session.model.begin()
    after["z"] = after.pop("c")
    await session.pool.vdisk_rename("c", "z")
    session.model.acknowledged()


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
    task = pool._handler._task
    assert task is not None
    task.cancel()
    await asyncio.wait([task])
    pool._handler._pace = SteadyPace()  # type: ignore[assignment]
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
    failed = False
    try:
        await operation(session)
    except StorageError:
        failed = True
    met = device.calls[fault.operation] >= fault.nth
    device.faults = []
    await still_reads(session)
    await shows_what_is(session)
    shown = session.pool.show()
    if fault.operation == SYNC and met:
        assert shown["read_only"] and shown["read_only_reason"], "a sync failed, and the pool goes on as if nothing were"
        assert "pool.read_only" in events and session.pool.volume("a").read_only
    split_done = not failed and session.splits_ended
    await abandon(session.pool)
    if split_done:
        await split_is_durable(recording.base)
    if failed and session.model.after is None:
        session.model.begin()
    # Power is lost on top of it: nothing that was acknowledged may be missing, nothing that failed may be half there.
    await Verification(recording.base, POOL_BYTES, session.model.expectation()).run(use=False)
    await Verification(dict(recording.pages), POOL_BYTES, session.model.expectation()).run(use=False)
    return met


async def split_is_durable(pages: Pages) -> None:
    """A split that was said to be done is done after a power loss, too."""
    pool = await Pool.open_on(PageDevice(POOL_BYTES, dict(pages)), CACHE_BYTES)
    assert (await pool.vdisk_show("c"))["backing"] is None, "a split was said to be done, and is not"
    await abandon(pool)


async def still_reads(session: Session) -> None:
    for name in image_names(session.pool):
        disk = session.model.disks[name]
        for fbn in (0, 1, 2, 3, 255, 256):
            found = await read_block(session.pool.volume(name), fbn) if fbn * 4096 < session.pool.volume(name).size_bytes else b""
            lba = fbn * BLOCK
            for step in range(len(found) // 512):
                allowed = disk.sectors.get(lba + step, (bytes(512),))
                assert found[step * 512 : (step + 1) * 512] in allowed, f"{name}: sector {lba + step}"


async def shows_what_is(session: Session) -> None:
    """What failed was never made, and is not shown; what was to go away is still there."""
    pool, disks = session.pool, session.model.disks
    assert image_names(pool) == disks.keys()
    rows = {row["name"]: row for row in [*await pool.vdisk_list(), *await pool.snapshot_list()]}
    assert {name: row["size_bytes"] for name, row in rows.items()} == {name: disk.size_blocks * 4096 for name, disk in disks.items()}
    assert all(pool.volume(name).name == name for name in disks)
    if pool.show()["read_only"]:
        assert not [row for row in pool.split_list() if row["state"] == "running"], "nothing runs on a pool that takes no changes"


FAULTS = [
    Fault(READ), Fault(READ, forever=True), Fault(WRITE), Fault(WRITE, forever=True), Fault(WRITE, errno=errno.ENOSPC),
    Fault(WRITE, errno=errno.ENOSPC, forever=True), Fault(WRITE, partial_bytes=4096), Fault(SYNC), Fault(SYNC, forever=True),
    Fault(DISCARD, forever=True),
]  # fmt: skip


def fault_name(fault: Fault) -> str:
    how = "short" if fault.partial_bytes else errno.errorcode[fault.errno]
    return f"{fault.operation}-{how}-{'forever' if fault.forever else 'once'}"


@pytest.mark.parametrize("fault", FAULTS, ids=fault_name)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_device_call_may_fail(base: tuple[Pages, Model], name: str, fault: Fault) -> None:
    for nth in range(1, CALLS_MAX):
        numbered = Fault(fault.operation, nth, fault.errno, fault.forever, fault.partial_bytes)
        if not in_virtual_time(fail_once(base, OPERATIONS[name], numbered)):
            return
    raise AssertionError(f"{name} does not come to an end of its device calls")


# --- Cancellation ------------------------------------------------------------------------------------------------


class Stepper:
    """Drives a coroutine as a Task does, and throws CancelledError in at its n-th suspension."""

    def __init__(self, work: Coroutine[Any, Any, Any], nth: int) -> None:
        self._work = work
        self._nth = nth
        self.suspensions = 0

    def __await__(self) -> Any:
        iterator = self._work.__await__()
        value = None
        try:
            while True:
                waiting = iterator.send(value)
                self.suspensions += 1
                if self.suspensions == self._nth:
                    return iterator.throw(asyncio.CancelledError())
                value = yield waiting
        except StopIteration as end:
            return end.value


async def cancel_once(base: tuple[Pages, Model], operation: Operation, nth: int) -> bool:
    """Whether the cancellation was met."""
    recording = RecordingDevice(POOL_BYTES, base[0], nothing, seed=nth)
    session = await opened(recording, base[1])
    stepper = Stepper(as_coroutine(operation(session)), nth)
    task = asyncio.create_task(as_coroutine(stepper))
    await asyncio.wait([task])
    met = task.cancelled()
    assert met or task.exception() is None, task.exception()
    if met and session.model.after is None:
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
    for volume in list(session.pool._lifecycle._volumes.values()):
        await volume.drain()
    await session.pool._log.drain()
    await session.pool.consistency_point()
    await asyncio.sleep(0)


def nothing_is_left(pool: Pool) -> None:
    state = pool._state
    assert state.read_only_reason is None
    assert state.frozen is None and not state.epoch.readers and not state.retired
    for name in image_names(pool):
        volume = pool.volume(name)
        assert not volume._locks.held and not volume._tasks and volume.image.busy is None, name
    expected = {pool._points._task, asyncio.current_task()}
    # The consistency point's timer runs as a task of its own (asyncio.wait_for).
    others = [task for task in asyncio.all_tasks() if task not in expected and "Event.wait" not in repr(task.get_coro())]
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
