"""The first and the last thing about a pool: what is written before it has a superblock, and what
to say where there is none.
"""

from storage.device import Device, contents_of, is_block_device
from storage.device.signatures import HEAD_BYTES, TAIL_BYTES
from storage.layout import BLOCK_BYTES, LOG_FIRST_VBN, SUPERBLOCK_VBNS, UNFINISHED_MAGIC

# 1 MiB a write.
RUN_BLOCKS = 256


def why_no_pool(path: str) -> str:
    """What to tell whoever meant to open it."""
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
