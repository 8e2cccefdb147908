"""The check: superblocks, the log, files and devices, and a pool that is running."""

import asyncio
import fcntl
import os
from pathlib import Path

import pytest

from storage import layout
from storage.check import CheckReport, check_live, check_path
from storage.device import open_device
from storage.errors import PoolLocked, PoolRefused
from tests.storage.checking import assert_finds, check, flip, rich_pool
from tests.storage.devices import READ, Fault, FaultyDevice, MemoryDevice
from tests.storage.pool_writer import BLOCK, CP, LOG_BLOCKS, seal_superblock

# --- Superblocks and the intent log ---------------------------------------------------------------


def test_the_newer_valid_superblock_wins_and_a_torn_one_is_a_note() -> None:
    built = rich_pool()[0].build()
    older = bytearray(built)
    older[BLOCK + 40] ^= 1
    report = check(older)
    assert report.ok and report.cp_number == CP - 1
    assert report.notes == [
        (
            "the superblock at VBN 1 is not valid; the other one holds the pool's state (a torn"
            " write leaves this behind)"
        )
    ]


def test_both_superblocks_damaged_and_no_pool_at_all() -> None:
    built = rich_pool()[0].build()
    built[40] ^= 1
    built[BLOCK + 40] ^= 1
    with pytest.raises(PoolRefused, match="both superblocks are damaged"):
        check(built)
    with pytest.raises(PoolRefused, match="not a pool"):
        check(bytes(len(built)))


@pytest.mark.parametrize(
    ("offset", "words"), [(8, "format version 2"), (32, "incompatible features 0x2")]
)
def test_newer_formats_are_refused(offset: int, words: str) -> None:
    built = rich_pool()[0].build()
    block = bytearray(built[BLOCK : 2 * BLOCK])
    block[offset] = 2
    built[BLOCK : 2 * BLOCK] = seal_superblock(block)
    with pytest.raises(PoolRefused, match=words):
        check(built)


def test_truncated_pool_is_refused() -> None:
    built = rich_pool()[0].build()
    with pytest.raises(
        PoolRefused, match="truncated: the pool has 8388608 bytes, the device only 8384512"
    ):
        check(built[:-BLOCK])


@pytest.mark.parametrize("records", [0, 1, 3, LOG_BLOCKS])
def test_log_records_behind_the_head_are_counted_round_the_ring(records: int) -> None:
    pool, _ = rich_pool()
    pool.log_records = records
    built = pool.build()
    report = check(built)
    assert report.ok and report.log_records == records
    if records == 3:
        flip(built, layout.LOG_FIRST_VBN)  # the second, at the ring's begin
        assert check(built).log_records == 1


# --- Paths, and the live device -------------------------------------------------------------------


@pytest.fixture
def pool_path(tmp_path: Path) -> str:
    path = tmp_path / "pool"
    path.write_bytes(rich_pool()[0].build())
    return str(path)


def test_check_path(pool_path: str) -> None:
    before = Path(pool_path).read_bytes()
    phases: list[str] = []
    report = check_path(
        pool_path, verify_data=True, on_progress=lambda phase, blocks: phases.append(phase)
    )
    assert report.ok and report.data_blocks_verified == 7
    assert list(dict.fromkeys(phases)) == [
        "metafiles",
        "vdisk table",
        "trees",
        "counters",
        "splits",
        "maps",
        "intent log",
    ]
    assert Path(pool_path).read_bytes() == before


def test_check_path_shares_its_lock_with_readers_only(pool_path: str) -> None:
    descriptor = os.open(pool_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        assert check_path(pool_path).ok
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(PoolLocked, match="another process has this pool open"):
            check_path(pool_path)
    finally:
        os.close(descriptor)


def test_check_path_refuses_what_is_no_pool(tmp_path: Path) -> None:
    with pytest.raises(PoolRefused, match=r"cannot be opened .*No such file"):
        check_path(str(tmp_path / "missing"))
    with pytest.raises(PoolRefused, match="neither a file nor a block device"):
        check_path(str(tmp_path))
    (tmp_path / "short").write_bytes(b"hello")
    with pytest.raises(PoolRefused, match="short: not a pool"):
        check_path(str(tmp_path / "short"))


def live_check(
    pool: bytes | bytearray, device: MemoryDevice, verify_data: bool = True
) -> CheckReport:
    async def run() -> CheckReport:
        device.writev([bytes(pool)], 0)
        return await check_live(device, bytes(pool[BLOCK : 2 * BLOCK]), verify_data)

    return asyncio.run(run())


def test_live_check_reads_through_the_device_at_once_and_by_its_threads() -> None:
    built = rich_pool()[0].build()
    for device in (
        MemoryDevice(len(built)),
        MemoryDevice(len(built), deferred=True, miss_rate=0.6, seed=3),
    ):
        report = live_check(built, device)
        assert report.ok and report.data_blocks_verified == 7
    built = flip(built, 66)
    assert_finds(
        live_check(built, MemoryDevice(len(built))).errors,
        r"(vdisk|snapshot) 'alpha.*block at FBN 0 \(VBN 66\) is damaged",
    )


@pytest.mark.parametrize("miss_rate", [0.0, 1.0])
def test_live_check_goes_on_behind_a_read_that_fails(miss_rate: float) -> None:
    built = rich_pool()[0].build()
    for nth in range(1, 30):
        device = MemoryDevice(len(built), miss_rate=miss_rate)

        async def run(device: MemoryDevice = device, nth: int = nth) -> CheckReport:
            device.writev([bytes(built)], 0)
            faulty = FaultyDevice(device, Fault(READ, nth=nth))
            return await check_live(faulty, bytes(built[BLOCK : 2 * BLOCK]))

        # A run whose read failed once is read again block by block, which succeeds.
        assert asyncio.run(run()).ok


def test_live_check_gives_way_between_slices() -> None:
    built = rich_pool()[0].build()

    async def run() -> int:
        device = MemoryDevice(len(built))
        device.writev([bytes(built)], 0)
        checking = asyncio.create_task(check_live(device, bytes(built[BLOCK : 2 * BLOCK])))
        turns = 0
        while not checking.done():
            await asyncio.sleep(0)
            turns += 1
        assert checking.result().ok
        return turns

    assert asyncio.run(run()) > 10


def test_check_of_a_device_made_by_the_store(tmp_path: Path) -> None:
    path = str(tmp_path / "pool")
    built = rich_pool()[0].build()
    Path(path).write_bytes(built)

    async def run() -> CheckReport:
        device = open_device(path)
        try:
            with pytest.raises(PoolLocked):
                check_path(path)
            return await check_live(device, bytes(built[BLOCK : 2 * BLOCK]), verify_data=True)
        finally:
            device.close()

    assert asyncio.run(run()).ok
