"""What waits meets a store that went on meanwhile: nothing in hand is lost, and nothing is seen in
two halves (storage.tree.attempt).
"""

import asyncio
import gc
import importlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from storage.backdoor.scrub import Scrub
from storage.data.allocation_report import allocated_runs
from storage.device import Device, WritableBuffer
from storage.errors import DeviceFailed, OutOfRange, VolumeClosed
from storage.layout import BLOCK_BYTES
from tests.storage.devices import READ, SYNC, DelayDevice, WrappedDevice
from tests.storage.pools import LEAF_BYTES, OpenPool, backed_clone, data, new_pool, opened, within

ROOT = Path(__file__).resolve().parent.parent.parent
TINY_NODES = 16


def make_cache_tiny(running: OpenPool, nodes: int = TINY_NODES) -> None:
    running.pool._state.cache.nodes_max = nodes


@pytest.mark.parametrize("miss_rate", [0.0, 0.4], ids=["page cache", "disk"])
@pytest.mark.parametrize("nodes", [16, 64, 256])
async def test_a_node_in_hand_is_not_evicted_while_it_is_made_dirty(
    nodes: int, miss_rate: float
) -> None:
    """The loads within ``_make_dirty`` evicted the very node: the write was acknowledged, and
    everything below it read as damaged.
    """
    leaves, chance = 300, Random(nodes)
    async with new_pool(64 << 20, deferred=miss_rate > 0, miss_rate=miss_rate) as running:
        await running.pool.vdisk_create("a", leaves * LEAF_BYTES)
        expected = {}
        for index in range(leaves):
            expected[index] = data(index)
            await running.write("a", index * LEAF_BYTES, data(index))
        await running.pool.snapshot_create([("a", "one")])
        await running.pool.snapshot_create([("a", "two")])
        make_cache_tiny(running, nodes)
        for turn in range(1500):
            index = chance.randrange(leaves)
            if turn % 3:
                assert await running.read("a", index * LEAF_BYTES, BLOCK_BYTES) == expected[index]
            else:
                expected[index] = data(1000 + turn)
                await running.write("a", index * LEAF_BYTES, expected[index])
                assert await running.read("a", index * LEAF_BYTES, BLOCK_BYTES) == expected[index]
            await asyncio.sleep(0)
        for index in range(leaves):
            assert await running.read("a@one", index * LEAF_BYTES, BLOCK_BYTES) == data(index)
        assert "block.damaged" not in running.event_names()
        assert running.pool._state.cache.held == 0


async def test_many_commands_that_wait_at_once_all_end_with_the_smallest_cache() -> None:
    """Each loaded what the others had just evicted: a write was not answered for 400 virtual
    seconds.
    """
    leaves = 120
    async with new_pool(64 << 20, deferred=True, miss_rate=1.0, turns_max=4) as running:
        await running.pool.vdisk_create("a", leaves * LEAF_BYTES)
        for index in range(leaves):
            await running.write("a", index * LEAF_BYTES, data(index))
        await running.pool.snapshot_create([("a", "s")])
        await running.pool.clone_create("a", "s", "b")
        make_cache_tiny(running)
        reads = [
            running.begin_read("b", index * LEAF_BYTES, BLOCK_BYTES) for index in range(leaves)
        ]
        writes = [
            running.begin_write("a", index * LEAF_BYTES, data(500 + index))
            for index in range(leaves)
        ]
        zeros = [
            running.begin_zero("b", index * LEAF_BYTES + LEAF_BYTES // 2, BLOCK_BYTES)
            for index in range(leaves)
        ]
        await within(asyncio.gather(*writes, *zeros))
        assert await within(asyncio.gather(*reads)) == [data(index) for index in range(leaves)]
        for index in range(leaves):
            assert await running.read("a", index * LEAF_BYTES, BLOCK_BYTES) == data(500 + index)
        assert running.pool._state.cache.held == 0


class HoldingDevice(WrappedDevice):
    """Keeps all that is read from some VBNs waiting until ``gate`` is set; with ``failing`` every
    read that waits fails.
    """

    def __init__(self, inner: Device) -> None:
        super().__init__(inner)
        self.vbns: set[int] = set()
        self.gate = asyncio.Event()
        self.waiting = 0
        self.failing = False

    def try_readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> bool:
        return (
            not self.failing
            and offset_bytes // BLOCK_BYTES not in self.vbns
            and self.inner.try_readv(buffers, offset_bytes)
        )

    def readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> "asyncio.Future[None]":
        return asyncio.get_running_loop().create_task(self._read_later(buffers, offset_bytes))

    async def _read_later(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> None:
        if offset_bytes // BLOCK_BYTES in self.vbns:
            self.waiting += 1
            await self.gate.wait()
        await asyncio.sleep(0)
        if self.failing:
            raise DeviceFailed("planted")
        await self.inner.readv(buffers, offset_bytes)


async def test_an_allocation_report_sees_data_that_a_split_moves_meanwhile() -> None:
    """It looked through the clone, waited there, and then looked behind an association that had
    ended: all of it was "deallocated".
    """
    async with new_pool() as running:
        await backed_clone(running, 512)
        await running.write("clone", 3 * LEAF_BYTES, data(9))
        await running.checkpoint()
        leaf = running.image("clone").tree.nodes[1][3].vbn
        memory = await running.crashed()
    device = HoldingDevice(memory)
    async with opened(memory, device) as running:
        image = running.image("clone")
        assert await running.read("clone", 2 * LEAF_BYTES, BLOCK_BYTES) == bytes(
            BLOCK_BYTES
        )  # the root is in memory, leaf 3 is not
        device.vbns.add(leaf)
        report = asyncio.create_task(allocated_runs(image, 0, 1024, 1024))
        for _ in range(20):
            await asyncio.sleep(0)
        await running.pool.split_start("clone", "share")
        assert (await running.split_ended("clone"))["state"] == "done"
        device.gate.set()
        assert await within(report) == [(512, True), (256, False), (1, True), (255, False)]


async def test_a_report_on_a_snapshot_that_is_deleted_meanwhile_says_so() -> None:
    """Found by the store fuzzer: it answered "deallocated", from what reclaim had left
    of the tree.
    """
    async with new_pool() as running:
        await backed_clone(running, 512)
        await running.write("clone", 0, data(5, 100))
        await running.pool.snapshot_create([("clone", "s")])
        await running.write("clone", 0, data(6, 100))  # so that the snapshot's blocks are its own
        await running.checkpoint()
        behind = int((await running.image("base@snap").tree.load(0)).vbn)
        memory = await running.crashed()
    device = HoldingDevice(memory)
    device.vbns.add(behind)
    async with opened(memory, device) as running:
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        volume = running.volume("clone@s")
        volume.allocation(
            0, 4 * LEAF_BYTES, 1024, lambda runs, error: answered.set_result((runs, error))
        )
        await running.until(lambda: device.waiting > 0)
        await running.pool.snapshot_delete("clone", "s")
        await running.reclaimed()
        device.gate.set()
        runs, error = await within(answered)
        assert runs is None and isinstance(error, VolumeClosed)


@pytest.mark.parametrize("mode", ["copy", "share"])
async def test_every_allocation_report_during_a_split_finds_all_data_whatever_it_has_to_wait_for(
    mode: str,
) -> None:
    async with new_pool(deferred=True, miss_rate=0.5, turns_max=6, seed=3) as running:
        for turn in range(8):
            await running.pool.vdisk_create(f"base{turn}", 4 * LEAF_BYTES)
            await running.write(f"base{turn}", 0, data(turn, 1024))
            await running.pool.snapshot_create([(f"base{turn}", "s")])
            await running.pool.clone_create(f"base{turn}", "s", f"clone{turn}")
            make_cache_tiny(running)
            await running.pool.split_start(f"clone{turn}", mode)
            image = running.image(f"clone{turn}")
            while image.backing is not None:
                runs = await within(allocated_runs(image, 0, 1024, 1024))
                assert all(allocated for _, allocated in runs), runs
            await running.pool.vdisk_delete(f"clone{turn}")
            await running.pool.snapshot_delete(f"base{turn}", "s")
            await running.pool.vdisk_delete(f"base{turn}")
            await running.reclaimed()


async def test_nothing_waits_between_what_belongs_to_a_freeze_and_the_freeze(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The snapshot's entry held what had been so before a wait for freed blocks; the data was that
    of after it.
    """
    async with new_pool() as running:
        state, rooms, points = running.pool._state, running.pool.rooms, running.pool.rooms.points
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.write("a", 0, data(1, 4))
        loop_turns = 0

        def count() -> None:
            nonlocal loop_turns
            loop_turns += 1
            asyncio.get_running_loop().call_soon(count)

        pinned = state.begin_read()
        await running.write("a", 0, data(2, 4))
        await running.checkpoint()
        assert rooms.retired.epochs
        monkeypatch.setattr(
            rooms.allocator, "client_floor", rooms.allocator.free_now
        )  # as on a pool that is nearly full
        seen: dict[str, Any] = {}

        def at_freeze() -> None:
            seen["turns"], seen["epoch"] = loop_turns, state.epoch
            running.image("a").touch()

        original = points._consistency_point

        async def look(frozen: Any) -> None:
            seen["between"] = loop_turns - seen["turns"]
            seen["frozen"] = frozen[0]
            await original(frozen)

        monkeypatch.setattr(points, "_consistency_point", look)
        count()
        waiting = rooms.requests.request(at_freeze)
        await running.until(lambda: bool(rooms.requests.waiting) or "turns" in seen)
        await asyncio.sleep(0.01)
        assert "turns" not in seen  # it waits for room first
        state.end_read(pinned)
        await within(waiting)
        assert seen["between"] == 0 and seen["frozen"] is seen["epoch"]
        monkeypatch.undo()
        loop_turns = -1_000_000_000


def test_no_step_that_must_not_wait_can_wait() -> None:
    """docs/concurrency.md names those steps: each is a plain function, in which there can be no
    await.
    """
    page = (
        (ROOT / "docs/concurrency.md")
        .read_text()
        .split("## Steps that must not wait", 1)[1]
        .split("\n## ", 1)[0]
    )
    named = re.findall(
        r"`((?:\w+\.)+\w+)`",
        "\n".join(line.split("|")[2] for line in page.splitlines() if line.startswith("|")),
    )
    assert len(named) >= 10
    for name in named:
        step = step_named(name)
        assert (
            inspect.isfunction(step)
            and not inspect.iscoroutinefunction(step)
            and not inspect.isgeneratorfunction(step)
        ), name


def step_named(name: str) -> Any:
    """``write_path.install``, ``consistency_point.ConsistencyPoints._freeze``: the module is the
    only file of that name in storage/.
    """
    first, *path = name.split(".")
    files = list((ROOT / "storage").rglob(f"{first}.py"))
    assert len(files) == 1, f"{name}: {files}"
    found: Any = importlib.import_module(".".join(files[0].relative_to(ROOT).with_suffix("").parts))
    for part in path:
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("moment", ["while it is trimmed", "before its freeze", "after its freeze"])
async def test_a_shrink_that_is_cancelled_leaves_the_size_that_is_shown(moment: str) -> None:
    """Clients were kept from a tail that the vdisk still had."""
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 8 * LEAF_BYTES)
        for index in range(8):
            await running.write("a", index * LEAF_BYTES, data(index, 2))
        await running.checkpoint()
        memory = await running.crashed()
    device = DelayDevice(memory)
    async with opened(memory, device) as running:
        volume = running.volume("a")
        held = READ if moment == "while it is trimmed" else SYNC
        device.hold(held)
        other = (
            asyncio.ensure_future(running.pool.vdisk_create("b", LEAF_BYTES))
            if moment == "before its freeze"
            else None
        )
        if other is not None:
            await running.until(lambda: device.held(held) > 0)
        shrink = asyncio.create_task(running.pool.vdisk_resize("a", LEAF_BYTES))
        await running.until(lambda: volume.size_bytes == LEAF_BYTES and device.held(held) > 0)
        await asyncio.sleep(0.01)
        shrink.cancel()
        with pytest.raises(asyncio.CancelledError):
            await shrink
        device.release(held)
        if other is not None:
            await within(other)
        await running.checkpoint()
        shown = await running.pool.vdisk_show("a")
        assert (
            volume.size_bytes
            == shown["size_bytes"]
            == (LEAF_BYTES if moment == "after its freeze" else 8 * LEAF_BYTES)
        )
        await running.pool.vdisk_resize("a", 16 * LEAF_BYTES)
        assert volume.size_bytes == 16 * LEAF_BYTES


async def test_a_grow_that_is_cancelled_after_its_freeze_gives_clients_what_is_shown() -> None:
    async with new_pool(decorate=DelayDevice) as running:
        device = running.device
        await running.pool.vdisk_create("a", LEAF_BYTES)
        volume = running.volume("a")
        device.hold(SYNC)
        grow = asyncio.create_task(running.pool.vdisk_resize("a", 8 * LEAF_BYTES))
        await running.until(lambda: device.held(SYNC) > 0)
        grow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await grow
        device.release(SYNC)
        await running.checkpoint()
        assert (
            (await running.pool.vdisk_show("a"))["size_bytes"]
            == volume.size_bytes
            == 8 * LEAF_BYTES
        )


async def test_a_shrink_after_a_cancelled_grow_keeps_the_durable_end() -> None:
    """Found by review: a write beyond it was acknowledged with FUA, and replayed at another place
    of the vdisk.
    """
    async with new_pool(decorate=DelayDevice) as running:
        device = running.device
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1, 4))
        await running.checkpoint()
        volume = running.volume("a")
        device.hold(SYNC)
        grow = asyncio.create_task(running.pool.vdisk_resize("a", 8 * LEAF_BYTES))
        await running.until(lambda: device.held(SYNC) > 0)
        grow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await grow
        shrink = asyncio.create_task(running.pool.vdisk_resize("a", 2 * LEAF_BYTES))
        for _ in range(20):
            await asyncio.sleep(0)
        assert volume.size_bytes == LEAF_BYTES
        with pytest.raises(OutOfRange):
            await running.write("a", LEAF_BYTES + BLOCK_BYTES, data(9))
        device.release(SYNC)
        assert (await within(shrink))["size_bytes"] == volume.size_bytes == 2 * LEAF_BYTES
        await running.write("a", LEAF_BYTES + BLOCK_BYTES, data(9), fua=True)
        memory = await running.crashed()
    async with opened(memory) as running:
        assert await running.read("a", 0, 4 * BLOCK_BYTES) == data(1, 4)
        assert await running.read("a", LEAF_BYTES + BLOCK_BYTES, BLOCK_BYTES) == data(9)


async def test_when_several_reads_of_one_command_fail_each_failure_is_seen() -> None:
    """ "Future exception was never retrieved" for all but the first."""
    unseen: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: unseen.append(context["message"])
    )
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        for fbn in range(0, 16, 2):
            await running.write("a", fbn * BLOCK_BYTES, data(fbn))
        await running.checkpoint()
        memory = await running.crashed(miss_rate=1.0, deferred=True)
    device = HoldingDevice(memory)
    async with opened(memory, device) as running:
        await running.read("a", 0, BLOCK_BYTES)
        device.failing = True
        with pytest.raises(DeviceFailed):
            await running.read("a", 0, 16 * BLOCK_BYTES)
        device.failing = False
        gc.collect()
    assert unseen == []


async def test_a_waiting_scrub_does_not_look_at_what_is_being_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It looked whether one was under way, and waited then: blocks of a metafile that were not
    written yet counted as damaged.
    """
    async with new_pool(decorate=DelayDevice) as running:
        device, state = running.device, running.pool._state
        await running.pool.vdisk_create("a", 16 * LEAF_BYTES)
        find, verify = Scrub._find, Scrub._verify
        met: list[str] = []

        async def find_slowly(self: Scrub, where: str, *place: Any) -> Any:
            found = await find(self, where, *place)
            if where == "active map" and not met and place[1] == place[0].levels:
                device.hold(SYNC)
                await running.write("a", 0, data(1))
                running.pool.rooms.requests.want()
                await running.until(lambda: state.frozen is not None)
                met.append(where)
                asyncio.get_running_loop().call_later(0.01, device.release, SYNC)
            return found

        async def verify_at_rest(self: Scrub, where: str, tree: Any, node: Any) -> int:
            metafile = tree in running.pool.rooms.metafiles
            assert not metafile or state.frozen is None, where
            return await verify(self, where, tree, node)

        monkeypatch.setattr(Scrub, "_find", find_slowly)
        monkeypatch.setattr(Scrub, "_verify", verify_at_rest)
        await running.pool.scrub_start(1 << 40)
        await running.until(lambda: running.pool.scrub_show()["state"] != "running")
        assert (
            met
            and running.pool.scrub_show()["state"] == "done"
            and running.pool.scrub_show()["damages"] == []
        )


async def test_a_write_beyond_the_end_that_a_shrink_has_set_meanwhile_changes_nothing() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.write("a", 3 * LEAF_BYTES, data(1))
        await running.checkpoint()
        memory = await running.crashed()
    device = DelayDevice(memory)
    async with opened(memory, device) as running:
        used = running.image("a").used_blocks
        device.hold(READ)
        write = running.begin_write("a", 3 * LEAF_BYTES + BLOCK_BYTES, data(2))
        await running.until(lambda: device.held(READ) > 0)
        running.image("a").limit_bytes = LEAF_BYTES
        device.release(READ)
        with pytest.raises(OutOfRange):
            await within(write)
        assert running.image("a").used_blocks == used and not running.pool._state.epoch.dirty.nodes
        running.image("a").limit_bytes = 4 * LEAF_BYTES
