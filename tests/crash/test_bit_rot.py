"""Bit rot, misdirected and lost writes: whatever is damaged is found, or harmless by proof, is
never served as data, and hangs nobody.

Harmless by proof is only what nothing reads: blocks that the superblock does not reach, and one of
two copies of the superblock. Every byte of a reachable block is under the CRC32C of the field that
names it.
"""

from random import Random
from typing import Any

import pytest
from crc32c import crc32c

from storage.check import check_device
from storage.errors import PoolRefused, StorageError
from storage.layout import BLOCK_BYTES, SUPERBLOCK_VBNS
from storage.pool import Pool
from tests.crash.determinism import VirtualLoop, repeatable, run_to_the_end
from tests.crash.oracle import SECTORS_PER_BLOCK, Model
from tests.crash.recording import ZERO_PAGE, PageDevice, Pages
from tests.crash.session import CACHE_BYTES, abandon, read_block
from tests.crash.verify import PagesReader, image_names
from tests.crash.workloads import POOL_BYTES, make_base

# Byte positions of each reachable block that are flipped on a pool in use.
MOUNTED_BYTES = (0, 12, 513)
CHECKED_BYTES = 8


def in_virtual_time(work: Any) -> Any:
    loop = VirtualLoop()
    try:
        return run_to_the_end(loop, work)
    finally:
        loop.close()


@pytest.fixture(scope="module")
def base() -> tuple[Pages, Model]:
    with repeatable():
        made: tuple[Pages, Model] = in_virtual_time(make_base())
    return made


def reachable(pages: Pages) -> dict[int, bytes]:
    """What a full check reads, the superblocks and the log left out."""
    reader = PagesReader(pages, POOL_BYTES)
    report = check_device(reader, verify_data=True)
    assert report.ok, report.errors
    first_free = 2 + 64
    return {vbn: content for vbn, content in reader.seen.items() if vbn >= first_free}


def flipped(content: bytes, at: int, bits: int) -> bytes:
    return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]


def with_page(pages: Pages, vbn: int, content: bytes) -> Pages:
    return {**pages, vbn: content}


def test_every_flipped_byte_changes_the_sum_of_its_block(base: tuple[Pages, Model]) -> None:
    """Every byte of every reachable block, in each of eight ways: the CRC32C in the field above is
    another's.
    """
    looked_at = 0
    for content in reachable(base[0]).values():
        expected = crc32c(content)
        block = bytearray(content)
        for at in range(BLOCK_BYTES):
            block[at] ^= 1 << at % 8
            assert crc32c(block) != expected
            block[at] ^= 1 << at % 8
            looked_at += 1
    assert looked_at > 20 * BLOCK_BYTES


def test_the_check_looks_at_every_sum(base: tuple[Pages, Model]) -> None:
    """With the test above: no byte of a reachable block can rot unseen. Positions differ from block
    to block.
    """
    pages, random = base[0], Random(1)
    for vbn in reachable(pages):
        for at in random.sample(range(BLOCK_BYTES), CHECKED_BYTES):
            damaged = with_page(pages, vbn, flipped(pages[vbn], at, 1 << at % 8))
            try:
                ok = check_device(PagesReader(damaged, POOL_BYTES), verify_data=True).ok
            except PoolRefused:
                ok = False
            assert not ok, f"byte {at} of VBN {vbn} was flipped, and the check finds nothing"


async def use_damaged(pages: Pages, model: Model, vbn: int) -> str:
    """What becomes of a pool in use: ``refused``, ``detected`` or ``harmless``. Raises
    AssertionError for wrong data.
    """
    events: list[str] = []
    try:
        pool = await Pool.open_on(
            PageDevice(POOL_BYTES, dict(pages)),
            CACHE_BYTES,
            lambda name, **fields: events.append(name),
        )
    except StorageError:
        return "refused"
    errors = 0
    try:
        for name in image_names(pool):
            errors += await wrong_reads(pool, name, model)
        errors += await use(pool)
        report = await checked(pool)
    finally:
        await abandon(pool)
    if errors or "block.damaged" in events or "image.damaged" in events or not report:
        return "detected"
    return "harmless"


async def wrong_reads(pool: Pool, name: str, model: Model) -> int:
    """Blocks that cannot be read; whatever is read must be right."""
    errors = 0
    disk = model.disks[name]
    for fbn in {lba // SECTORS_PER_BLOCK for lba in disk.sectors} | {0, 7, disk.size_blocks - 1}:
        try:
            found = await read_block(pool.volume(name), fbn)
        except StorageError:
            errors += 1
            continue
        assert found == disk.read(fbn), f"damage is served as data: {name} block {fbn}"
    return errors


async def use(pool: Pool) -> int:
    try:
        await pool.vdisk_create("fresh", 1 << 20)
        await pool.consistency_point()
    except StorageError:
        return 1
    return 0


async def checked(pool: Pool) -> bool:
    try:
        return bool((await pool.check(verify_data=True))["ok"])
    except StorageError:
        return False


def test_a_pool_in_use_never_serves_damage(base: tuple[Pages, Model]) -> None:
    pages, model = base
    outcomes: dict[str, int] = {}
    for vbn, content in reachable(pages).items():
        for at in MOUNTED_BYTES:
            damaged = with_page(pages, vbn, flipped(content, at, 0x40))
            outcome = in_virtual_time(use_damaged(damaged, model, vbn))
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes.keys() <= {"refused", "detected"}, outcomes
    assert outcomes["detected"] > outcomes.get("refused", 0)


def test_misdirected_writes_are_detected(base: tuple[Pages, Model]) -> None:
    """Each block takes the place of its neighbour, whole and with a right sum of its own."""
    pages, model = base
    blocks = reachable(pages)
    vbns = sorted(blocks)
    for vbn, other in zip(vbns, [*vbns[1:], vbns[0]], strict=True):
        if blocks[vbn] != blocks[other]:
            assert in_virtual_time(
                use_damaged(with_page(pages, vbn, blocks[other]), model, vbn)
            ) in {"refused", "detected"}


def test_lost_writes_are_detected(base: tuple[Pages, Model]) -> None:
    pages, model = base
    for vbn in reachable(pages):
        assert in_virtual_time(use_damaged(with_page(pages, vbn, ZERO_PAGE), model, vbn)) in {
            "refused",
            "detected",
        }


class Misdirecting(PageDevice):
    """Reads of one page give another's content."""

    def __init__(self, pages: Pages, wanted: int, given: int) -> None:
        super().__init__(POOL_BYTES, dict(pages))
        self._real, self.pages = self.pages, Redirected(self.pages, wanted, given)


class Redirected(dict[int, bytes]):
    def __init__(self, pages: Pages, wanted: int, given: int) -> None:
        super().__init__(pages)
        self._wanted, self._given = wanted, given

    def get(self, key: int, default: Any = None) -> Any:
        return super().get(self._given if key == self._wanted else key, default)


def test_misdirected_reads_are_detected(base: tuple[Pages, Model]) -> None:
    pages, model = base
    vbns = sorted(reachable(pages))

    async def reads_wrong(wanted: int, given: int) -> bool:
        try:
            pool = await Pool.open_on(Misdirecting(pages, wanted, given), CACHE_BYTES)
        except StorageError:
            return True
        try:
            errors = 0
            for name in image_names(pool):
                errors += await wrong_reads(pool, name, model)
            return errors > 0 or not await checked(pool)
        finally:
            await abandon(pool)

    for wanted, given in zip(vbns, reversed(vbns), strict=True):
        if pages[wanted] != pages[given]:
            assert in_virtual_time(reads_wrong(wanted, given)), (
                f"VBN {given} was read for {wanted}, and nobody noticed"
            )


@pytest.mark.parametrize("vbn", SUPERBLOCK_VBNS)
@pytest.mark.parametrize("damage", ["zeros", "garbage", "one bit"])
def test_either_superblock_may_be_destroyed(
    base: tuple[Pages, Model], vbn: int, damage: str
) -> None:
    """The pool opens from the other one, and is as new as the last acknowledged
    consistency point.
    """
    pages, model = base
    content = {
        "zeros": ZERO_PAGE,
        "garbage": Random(7).randbytes(BLOCK_BYTES),
        "one bit": flipped(pages[vbn], 40, 1),
    }[damage]

    async def opens() -> int:
        pool = await Pool.open_on(
            PageDevice(POOL_BYTES, with_page(pages, vbn, content)), CACHE_BYTES
        )
        for name in model.disks:
            assert not await wrong_reads(pool, name, model)
        number = int(pool.show()["cp_number"])
        await abandon(pool)
        return number

    async def newest() -> int:
        pool = await Pool.open_on(PageDevice(POOL_BYTES, dict(pages)), CACHE_BYTES)
        await abandon(pool)
        return int(pool.show()["cp_number"])

    assert in_virtual_time(opens()) == in_virtual_time(newest())


def test_without_any_superblock_it_is_no_pool(base: tuple[Pages, Model]) -> None:
    pages = {**base[0], 0: ZERO_PAGE, 1: ZERO_PAGE}
    with pytest.raises(PoolRefused):
        in_virtual_time(Pool.open_on(PageDevice(POOL_BYTES, pages), CACHE_BYTES))
