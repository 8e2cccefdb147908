"""The two copies of the superblock on a device: reading them, saying what is wrong with one, and
bringing it into agreement with the other.

Invariant: a copy is written only while the other one is whole, the newest there is, and durable. A
consistency point keeps to that by the parity of its number, which holds only when both copies are
good at its begin: so an open repairs them before anything else is written.
"""

from collections.abc import Sequence
from typing import NamedTuple

from storage.device import Buffer, Device
from storage.errors import DeviceFailed
from storage.layout import (
    BLOCK_BYTES,
    OWNER,
    OWNER_OFFSET,
    SECTOR_BYTES,
    SUPERBLOCK_CRC_OFFSET,
    SUPERBLOCK_HEAD,
    SUPERBLOCK_MAGIC,
    SUPERBLOCK_VBNS,
    UNFINISHED_MAGIC,
)
from storage.superblock.superblock import Superblock, decode, newest

# Why a copy is not as good as the other one.
UNREADABLE = "unreadable"
UNWRITTEN = "unwritten"
STALE = "stale"
TORN = "torn"
DAMAGED = "damaged"


class Copies(NamedTuple):
    """``best`` is the newest whole superblock. ``whole_vbn`` holds it; of two that do, it is the
    one that was written first. ``faults``: VBN of a copy that does not hold it, and why.
    """

    best: Superblock
    whole_vbn: int
    faults: dict[int, str]


async def read_copies(device: Device) -> Copies:
    """What the device holds. Raises PoolRefused, NoPool, and DeviceFailed when neither copy is
    whole and one cannot be read.
    """
    blocks: list[bytearray | None] = []
    failure: DeviceFailed | None = None
    if device.size_bytes < len(SUPERBLOCK_VBNS) * BLOCK_BYTES:
        blocks = [bytearray(BLOCK_BYTES) for _ in SUPERBLOCK_VBNS]
    else:
        for vbn in SUPERBLOCK_VBNS:
            block = bytearray(BLOCK_BYTES)
            try:
                await device.readv((block,), vbn * BLOCK_BYTES)
                blocks.append(block)
            except DeviceFailed as error:
                failure = error
                blocks.append(None)
    if failure is not None and not any(
        block is not None and decode(block) is not None for block in blocks
    ):
        raise failure
    return judge(blocks, device.path, device.size_bytes)


def judge(blocks: Sequence[bytearray | None], path: str, device_bytes: int) -> Copies:
    """Which copy counts, and what is wrong with the other one. Raises PoolRefused, NoPool."""
    best = newest(blocks, path, device_bytes)
    faults = {
        vbn: fault for vbn, block in enumerate(blocks) if (fault := _fault(block, best)) is not None
    }
    primary = best.cp_number & 1
    return Copies(best, primary if primary not in faults else 1 - primary, faults)


def _fault(block: bytearray | None, best: Superblock) -> str | None:
    if block is None:
        return UNREADABLE
    found = decode(block)
    if found is not None:
        # Another pool's number says nothing; there can be one only where somebody wrote past us.
        if found.uuid != best.uuid:
            return DAMAGED
        return STALE if found.cp_number < best.cp_number else None
    if block[:8] == UNFINISHED_MAGIC:
        # The pool was made, and its first consistency point did not come to the second copy.
        return UNWRITTEN
    return TORN if _is_mixture(block, best) else DAMAGED


def _is_mixture(block: bytearray, best: Superblock) -> bool:
    """Whether a write that was cut off explains it: sectors of one consistency point beside those
    of the one before or after.

    Two of those differ in the first sector, in the owner's, and in the last one by the CRC32C.
    Everything else is zeros in both.
    """
    if any(block[SECTOR_BYTES:OWNER_OFFSET]) or any(
        block[OWNER_OFFSET + OWNER.size : SUPERBLOCK_CRC_OFFSET]
    ):
        return False
    head = SUPERBLOCK_HEAD.unpack_from(block)
    if head[0] != SUPERBLOCK_MAGIC or head[6] != best.uuid:
        return False
    return (
        abs(head[7] - best.cp_number) == 1 or block[:SECTOR_BYTES] == best.encode()[:SECTOR_BYTES]
    )


async def write_copies(device: Device, superblock: Superblock, whole_vbn: int) -> None:
    """Make both copies this superblock, durably. ``whole_vbn`` is good and durable, and is written
    last. Raises DeviceFailed.
    """
    block = superblock.encode()
    await write_block(device, block, 1 - whole_vbn)
    await device.sync()
    await write_block(device, block, whole_vbn)
    await device.sync()


async def write_block(device: Device, block: Buffer, vbn: int) -> None:
    """Write one block. Raises DeviceFailed."""
    if not device.try_writev((block,), vbn * BLOCK_BYTES, BLOCK_BYTES):
        await device.writev((block,), vbn * BLOCK_BYTES)
