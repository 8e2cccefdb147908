"""Making a new pool on a device, and what to say where there is none."""

import time
import uuid

from storage.device import Device, contents_of, is_block_device
from storage.device.signatures import HEAD_BYTES, TAIL_BYTES
from storage.errors import RequestError
from storage.layout import (
    ACTIVE_MAP,
    BLOCK_BYTES,
    LOG_FIRST_VBN,
    POOL_BLOCKS_MIN,
    REGION_SUMMARY,
    SHARE_MAP,
    SHARES_PER_BLOCK,
    SUMMARIES_PER_BLOCK,
    SUPERBLOCK_VBNS,
    UNFINISHED_MAGIC,
    log_blocks,
    region_count,
    tree_levels,
)
from storage.pool.rooms import Rooms
from storage.state.pool_state import no_events
from storage.superblock.superblock import Superblock

# 1 MiB a write.
RUN_BLOCKS = 256


def why_no_pool(path: str) -> str:
    """What to tell a caller that meant to open it."""
    try:
        found = contents_of(path)
    except OSError as error:
        return (
            f"{path} holds no pool, and cannot be read any more: {error.strerror}; see the host's"
            " kernel log"
        )
    if found is not None:
        return f"{path} is not a cleaved pool, it holds {found}: check the path"
    if is_block_device(path):
        return f"{path} holds no pool: make one with `cleaved create {path}`"
    return (
        f"{path} is there, but no pool was completed in it (it is empty, or its creation was"
        f" interrupted): remove it and try again, or replace it with `cleaved create {path} --size"
        " SIZE --overwrite`"
    )


def checked_size(size_bytes: int) -> int:
    """Size in blocks of a pool of ``size_bytes``, rounded down. Raises RequestError when that is
    too small.
    """
    blocks = size_bytes // BLOCK_BYTES
    if blocks < POOL_BLOCKS_MIN:
        raise RequestError(
            f"a pool of {size_bytes} bytes is too small: use at least"
            f" {POOL_BLOCKS_MIN * BLOCK_BYTES} (8MiB)"
        )
    return blocks


async def format_device(
    device: Device, cache_bytes: int, size_bytes: int | None, *, erase: bool
) -> Superblock:
    """Make a new pool on a device, over whatever it holds, with its superblocks last.
    ``size_bytes``: not the whole device.

    ``erase``: the marks of what was there, too. Raises RequestError, DeviceFailed.
    """
    size_blocks = checked_size(device.size_bytes if size_bytes is None else size_bytes)
    superblock = new_superblock(size_blocks)
    await begin_format(device)
    if erase:
        await erase_marks(device)
    fixed = LOG_FIRST_VBN + superblock.log_blocks
    await write_zeros(device, LOG_FIRST_VBN, fixed)
    rooms = Rooms(device, superblock, cache_bytes, no_events)
    rooms.allocator.adopt(0, fixed)
    rooms.state.epoch.ledger.allocated.append((0, fixed))
    rooms.points.start()
    try:
        await rooms.requests.request()
    finally:
        await rooms.points.stop()
    await device.sync()
    return superblock


def new_superblock(size_blocks: int) -> Superblock:
    """That of an empty pool, before its first consistency point."""
    superblock = Superblock(
        uuid.uuid4().bytes, size_blocks, log_blocks(size_blocks), time.time_ns()
    )
    regions = region_count(size_blocks)
    for number, size in (
        (ACTIVE_MAP, regions),
        (SHARE_MAP, -(-size_blocks // SHARES_PER_BLOCK)),
        (REGION_SUMMARY, -(-regions // SUMMARIES_PER_BLOCK)),
    ):
        root = superblock.roots[number]
        root.size_blocks, root.levels = size, tree_levels(size)
    return superblock


async def begin_format(device: Device) -> None:
    """Mark the pool as unfinished, durably: the first thing that is written, and the last that its
    superblocks replace. Whatever was there is no pool from now on, so that no old superblock can be
    taken for a new one.
    """
    mark = UNFINISHED_MAGIC.ljust(BLOCK_BYTES, b"\0")
    await device.writev((mark, bytes(BLOCK_BYTES)), SUPERBLOCK_VBNS[0] * BLOCK_BYTES)
    await device.sync()


async def erase_marks(device: Device) -> None:
    """Zeros where other systems leave their marks, so that none of them takes the device for its
    own later.
    """
    blocks, rest_bytes = divmod(device.size_bytes, BLOCK_BYTES)
    await write_zeros(device, LOG_FIRST_VBN, min(HEAD_BYTES // BLOCK_BYTES, blocks))
    await write_zeros(device, max(LOG_FIRST_VBN, blocks - TAIL_BYTES // BLOCK_BYTES), blocks)
    if rest_bytes:
        await device.writev((bytes(rest_bytes),), blocks * BLOCK_BYTES)


async def write_zeros(device: Device, first: int, end: int) -> None:
    """Write zeros to the blocks from VBN ``first`` up to ``end``. Raises DeviceFailed.

    Over the ring of the intent log: so no record of an earlier life is in it, and the host has room
    for every later one.
    """
    zeros = memoryview(bytes(RUN_BLOCKS * BLOCK_BYTES))
    for vbn in range(first, end, RUN_BLOCKS):
        await device.writev((zeros[: min(RUN_BLOCKS, end - vbn) * BLOCK_BYTES],), vbn * BLOCK_BYTES)
