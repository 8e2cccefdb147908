"""Superblocks: the newer whole one wins, and what is not a pool that this program can open is
refused with the reason.
"""

import pytest

from storage.errors import PoolRefused
from storage.layout import BLOCK_BYTES, METAFILES, SUPERBLOCK_CRC_OFFSET, SUPERBLOCK_MAGIC
from storage.superblock.superblock import MetafileRoot, Superblock, decode, newest
from tests.storage.devices import MemoryDevice
from tests.storage.pools import SMALL_POOL_BYTES, data, new_pool, open_on

SIZE_BLOCKS = 2048


def superblock(cp_number: int, **changes: int) -> Superblock:
    made = Superblock(
        bytes(range(16)),
        SIZE_BLOCKS,
        64,
        12345,
        cp_number=cp_number,
        used_blocks=77,
        log_head_block=5,
        log_head_sequence=99,
    )
    made.roots = [
        MetafileRoot(10 + number, 20 + number, 30 + number, 1 + number % 3, 40 + number)
        for number in METAFILES
    ]
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def opened_from(*blocks: bytearray) -> Superblock:
    return newest(list(blocks), "/pool", SIZE_BLOCKS * BLOCK_BYTES)


def test_a_superblock_is_read_back_as_it_was_written() -> None:
    written = superblock(7)
    assert decode(written.encode()) == written
    assert len(written.encode()) == BLOCK_BYTES


def test_the_newer_whole_one_wins() -> None:
    old, new = superblock(7).encode(), superblock(8).encode()
    assert opened_from(old, new).cp_number == opened_from(new, old).cp_number == 8
    for at in (0, 9, 100, 300, SUPERBLOCK_CRC_OFFSET - 1, SUPERBLOCK_CRC_OFFSET):
        torn = bytearray(new)
        torn[at] ^= 0x40
        assert opened_from(old, torn).cp_number == 7
        assert opened_from(torn, old).cp_number == 7


@pytest.mark.parametrize("sector", range(8))
def test_a_torn_write_leaves_no_mixture(sector: int) -> None:
    """Any mixture of sectors of two superblocks is one of the two, or none."""
    old, new = superblock(7).encode(), superblock(9, used_blocks=1000).encode()
    mixed = bytearray(new)
    mixed[sector * 512 : (sector + 1) * 512] = old[sector * 512 : (sector + 1) * 512]
    found = decode(mixed)
    assert found in (None, superblock(7), superblock(9, used_blocks=1000))


REFUSED = [
    ("zeros", [bytearray(BLOCK_BYTES)] * 2, "it is not a cleaved pool: check the path"),
    ("something else", [bytearray(data(3))] * 2, "it is not a cleaved pool: check the path"),
    (
        "both damaged",
        [bytearray(SUPERBLOCK_MAGIC + bytes(BLOCK_BYTES - 8))] * 2,
        "both superblocks are damaged: restore it from a copy",
    ),
    (
        "a newer feature",
        [superblock(7, incompat=4).encode()] * 2,
        "features 0x4, newer than this program knows: use a newer cleaved",
    ),
    (
        "truncated",
        [superblock(7, size_blocks=SIZE_BLOCKS + 1).encode()] * 2,
        "is truncated: .* restore its full size",
    ),
]


@pytest.mark.parametrize(
    ("blocks", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_is_no_pool_is_refused_with_the_reason_and_what_to_do(
    blocks: list[bytearray], message: str
) -> None:
    with pytest.raises(PoolRefused, match=message):
        opened_from(*blocks)


async def test_a_device_that_is_too_short_for_superblocks_is_refused_untouched() -> None:
    for size in (0, 512, BLOCK_BYTES):
        device = MemoryDevice(size)
        with pytest.raises(PoolRefused, match="it is not a cleaved pool"):
            await open_on(device)
        assert device.allocated_bytes == 0


async def test_an_unknown_feature_that_only_forbids_writing_opens_read_only_log_and_all() -> None:
    async with new_pool(SMALL_POOL_BYTES) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        await running.write("a", 0, data(1), fua=True)  # in the log only
        memory = running.memory.copy()
    for vbn in (0, 1):
        block = bytearray(BLOCK_BYTES)
        memory.try_readv([block], vbn * BLOCK_BYTES)
        found = decode(block)
        assert found is not None
        found.ro_compat = 8
        memory.try_writev([found.encode()], vbn * BLOCK_BYTES, BLOCK_BYTES)
    before = memory.copy()
    running = await open_on(memory)
    shown = running.pool.show()
    assert shown["read_only"] and "use a newer cleaved to write" in shown["read_only_reason"]
    assert await running.read("a", 0, BLOCK_BYTES) == data(1)
    await running.close()
    assert memory._pages == before._pages
