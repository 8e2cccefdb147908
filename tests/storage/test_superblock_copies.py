"""The two copies of the superblock: repaired at the open, never both at risk, and both durable when
the pool rests or is closed.
"""

import asyncio
from collections.abc import Sequence

import pytest

from storage.consistency import consistency_point
from storage.device import Buffer
from storage.device.owner import Owner
from storage.errors import DeviceFailed, DeviceFull, PoolRefused
from storage.layout import (
    BLOCK_BYTES,
    SUPERBLOCK_CRC_OFFSET,
    SUPERBLOCK_VBNS,
    UNFINISHED_MAGIC,
    VBN,
)
from storage.pool import Pool
from storage.superblock.copies import (
    DAMAGED,
    STALE,
    TORN,
    UNREADABLE,
    UNWRITTEN,
    judge,
    read_copies,
)
from storage.superblock.superblock import Superblock, decode
from tests.storage.crash_device import CrashDevice
from tests.storage.devices import (
    READ,
    SYNC,
    WRITE,
    Fault,
    FaultyDevice,
    MemoryDevice,
    WrappedDevice,
)
from tests.storage.pools import SMALL_POOL_BYTES, OpenPool, data, new_pool, open_on, opened
from tests.storage.test_superblock import SIZE_BLOCKS, superblock

SECTOR = 512


def block_at(device: MemoryDevice, vbn: int) -> bytes:
    block = bytearray(BLOCK_BYTES)
    device._read([block], vbn * BLOCK_BYTES)
    return bytes(block)


def put(device: MemoryDevice, vbn: int, block: bytes | bytearray) -> None:
    device._write([block], vbn * BLOCK_BYTES)


def at(device: MemoryDevice, vbn: int) -> Superblock:
    found = decode(block_at(device, vbn))
    assert found is not None
    return found


async def a_pool() -> MemoryDevice:
    """A pool with a snapshot, closed."""
    async with new_pool(SMALL_POOL_BYTES) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        await running.write("a", 0, data(1))
        await running.pool.snapshot_create([("a", "before")])
    return running.memory.copy()


def repairs(running: OpenPool) -> list[tuple[int, str]]:
    return [
        (fields["vbn"], fields["reason"])
        for name, fields in running.events
        if name == "superblock.repaired"
    ]


# --- What is wrong with a copy ---


def mixed(first: bytes | bytearray, second: bytes | bytearray, sectors: int) -> bytearray:
    return bytearray(first[: sectors * SECTOR] + second[sectors * SECTOR :])


OLD, NEW = superblock(7).encode(), superblock(8).encode()
FLIPPED = bytearray(NEW)
FLIPPED[300] ^= 1
OTHER_POOL = superblock(5)
OTHER_POOL.uuid = bytes(16)


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        (NEW, None),
        (OLD, STALE),
        (None, UNREADABLE),
        (bytearray(BLOCK_BYTES), DAMAGED),
        (FLIPPED, DAMAGED),
        (OTHER_POOL.encode(), DAMAGED),
        (bytearray(UNFINISHED_MAGIC.ljust(BLOCK_BYTES, b"\0")), UNWRITTEN),
        *[(mixed(NEW, OLD, sectors), TORN) for sectors in range(1, 8)],
        *[(mixed(superblock(9).encode(), NEW, sectors), TORN) for sectors in range(1, 8)],
        (mixed(NEW, b"\xff" * BLOCK_BYTES, 7), TORN),
        (mixed(NEW, b"\xff" * BLOCK_BYTES, 3), DAMAGED),
    ],
)
def test_the_fault_of_a_copy_is_named(block: bytearray | None, fault: str | None) -> None:
    if (
        block is not None
        and len(block) == BLOCK_BYTES
        and block[SUPERBLOCK_CRC_OFFSET:] == b"\xff" * 4
    ):
        block[7 * SECTOR : SUPERBLOCK_CRC_OFFSET] = bytes(SUPERBLOCK_CRC_OFFSET - 7 * SECTOR)
    for vbn in SUPERBLOCK_VBNS:
        copies = judge(
            [block, NEW] if vbn == 0 else [NEW, block], "/pool", SIZE_BLOCKS * BLOCK_BYTES
        )
        assert copies.best.cp_number == 8
        assert copies.faults == ({} if fault is None else {vbn: fault})
        assert copies.whole_vbn == (1 - vbn if fault is not None else 0)


# --- The open ---


@pytest.mark.parametrize("vbn", SUPERBLOCK_VBNS)
async def test_a_lost_second_copy_is_repaired_at_the_next_open_and_costs_no_snapshot_later(
    vbn: int,
) -> None:
    """Found from outside: opens and closes left the copies at two numbers, and the newer one's rot
    then took an acknowledged snapshot.
    """
    memory = await a_pool()
    newest = at(memory, vbn)
    older = at(memory, vbn)
    older.cp_number -= 1
    put(memory, 1 - vbn, older.encode())
    async with opened(memory) as running:
        assert repairs(running) == [(1 - vbn, STALE)]
    memory = memory.copy()
    assert at(memory, 1 - vbn).cp_number == at(memory, vbn).cp_number == newest.cp_number
    put(memory, vbn, b"\xff" * BLOCK_BYTES)
    async with opened(memory) as running:
        assert repairs(running) == [(vbn, DAMAGED)]
        assert [row["name"] for row in await running.pool.snapshot_list("a")] == ["a@before"]


async def test_copies_that_agree_are_not_written_at_an_open() -> None:
    memory = await a_pool()
    device = FaultyDevice(memory)
    running = await open_on(memory, device)
    assert repairs(running) == [] and not device.calls[WRITE]
    await running.close()


@pytest.mark.parametrize("vbn", SUPERBLOCK_VBNS)
async def test_no_consistency_point_writes_over_the_only_good_copy(vbn: int) -> None:
    """With the primary copy rotten, the next consistency point went to the other one: a power loss
    there lost both. (The checker of tests/storage/ordering.py looks at every write.)
    """
    memory = await a_pool()
    put(memory, vbn, b"\xff" * BLOCK_BYTES)
    async with opened(memory) as running:
        await running.pool.snapshot_create([("a", "after")])
        await running.pool.snapshot_create([("a", "again")])


@pytest.mark.parametrize("vbn", SUPERBLOCK_VBNS)
async def test_a_copy_that_cannot_be_read_stops_no_open(vbn: int) -> None:
    memory = await a_pool()
    device = FaultyDevice(memory, Fault(READ, nth=vbn + 1))
    async with opened(memory, device) as running:
        assert repairs(running) == [(vbn, UNREADABLE)]
        assert await running.read("a", 0, BLOCK_BYTES) == data(1)


async def test_two_copies_that_cannot_be_read_are_a_failed_device_and_no_lack_of_a_pool() -> None:
    memory = await a_pool()
    with pytest.raises(DeviceFailed):
        await read_copies(FaultyDevice(memory, Fault(READ, forever=True)))
    put(memory, 0, bytes(BLOCK_BYTES))
    with pytest.raises(DeviceFailed):
        await read_copies(FaultyDevice(memory, Fault(READ, nth=2)))
    put(memory, 1, bytes(BLOCK_BYTES))
    with pytest.raises(PoolRefused, match="not a cleaved pool"):
        await read_copies(memory)


@pytest.mark.parametrize(
    "fault", [Fault(WRITE, forever=True), Fault(SYNC, nth=2, forever=True)], ids=["write", "sync"]
)
async def test_a_pool_whose_copy_cannot_be_repaired_serves_reads_and_keeps_the_good_one(
    fault: Fault,
) -> None:
    memory = await a_pool()
    good = block_at(memory, 1)
    put(memory, 0, b"\xff" * BLOCK_BYTES)
    running = await open_on(memory, FaultyDevice(memory, fault))
    assert "cannot be made the same" in running.pool.show()["read_only_reason"]
    assert await running.read("a", 0, BLOCK_BYTES) == data(1)
    await running.close()
    assert block_at(memory, 1) == good


# --- Durable ---


def at_risk(memory: CrashDevice) -> set[VBN]:
    """Copies whose newest content a power loss may take."""
    return set(SUPERBLOCK_VBNS) & memory._versions.keys()


async def test_both_copies_are_durable_when_the_pool_is_closed_and_when_it_rests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second copy has no sync of its own, and no consistency point may follow for days."""
    memory = CrashDevice(SMALL_POOL_BYTES)
    await Pool.format(memory)
    assert not at_risk(memory)
    async with opened(memory) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        assert len(at_risk(memory)) == 1
        monkeypatch.setattr(consistency_point, "REST_SECONDS", 0.0)
        await running.until(lambda: not at_risk(memory))
        monkeypatch.undo()
        await running.pool.vdisk_create("b", 1 << 20)
        assert len(at_risk(memory)) == 1
    assert not at_risk(memory)


async def test_a_failed_sync_of_the_second_copy_is_a_failed_sync(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consistency_point, "REST_SECONDS", 0.0)
    memory = await a_pool()
    device = FaultyDevice(memory)
    running = await open_on(memory, device)
    await running.pool.vdisk_create("b", 1 << 20)
    device.faults = [Fault(SYNC, nth=device.calls[SYNC] + 1)]
    await running.until(lambda: running.pool.show()["read_only"])
    await running.close()


class FullForSuperblocks(WrappedDevice):
    """A host that does not write in place, and is full: no superblock can be written over.
    ``syncs`` counts.
    """

    full = True
    syncs = 0

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        if self.full and offset_bytes < 2 * BLOCK_BYTES:
            raise DeviceFull("full")
        return self.inner.try_writev(buffers, offset_bytes, length_bytes)

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> "asyncio.Future[None]":
        if self.full and offset_bytes < 2 * BLOCK_BYTES:
            failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            failed.set_exception(DeviceFull("full"))
            return failed
        return self.inner.writev(buffers, offset_bytes)

    def sync(self) -> "asyncio.Future[None]":
        self.syncs += 1
        return self.inner.sync()


async def test_a_full_host_without_in_place_writes_makes_no_pool_read_only() -> None:
    """Found by review: the owner could not be noted, and nothing could be deleted any more to make
    room.
    """
    memory = await a_pool()
    device = FullForSuperblocks(memory)
    events: list[str] = []
    owner = Owner(1, b"a boot of a host", 1, 1, 1, "host")
    pool = await Pool.open_on(device, 4 << 20, lambda name, **_: events.append(name), owner)
    assert not pool.show()["read_only"] and "pool.host_full" in events
    device.full = False
    await pool.vdisk_create("b", 1 << 20)
    assert at(memory, 0).owner == at(memory, 1).owner == owner
    device.full, device.syncs = True, 0
    await pool.close()
    assert device.syncs and "pool.read_only" not in events
    async with opened(memory.copy()) as running:
        assert running.pool.names() == ["a", "b"]
