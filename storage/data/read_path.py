"""Reading: from a range of an image to blocks on the device, field by field through the chain of
backing stores (design section 5).
"""

from storage.checksum import crc32c
from storage.device import read_all
from storage.errors import BlockDamaged, DeviceFailed, StorageError
from storage.fields import CRC_MASK
from storage.images.image import Image
from storage.layout import (
    BLOCK_BYTES,
    FIELDS_MASK,
    FIELDS_PER_BLOCK,
    FIELDS_SHIFT,
    HOLE,
    ZERO_POINTER,
)
from storage.tree.attempt import when_possible

# VBN and CRC32C of one block; VBN 0 stands for zeros, whatever the reason.
Location = tuple[int, int]
NOTHING: Location = (HOLE, 0)


def locate(image: Image, fbn: int) -> Location | None:
    """Where the block lies that a client reads at ``fbn``, or None when a pointer block must be
    loaded first.
    """
    at: Image | None = image
    while at is not None:  # inlines field_at of storage.fields
        node = at.tree.peek(fbn >> FIELDS_SHIFT)
        if node is None:
            return None
        slot = (fbn & FIELDS_MASK) * 2
        vbn = node.q[slot]
        if vbn > ZERO_POINTER:
            return vbn, node.q[slot + 1] & CRC_MASK
        if vbn == ZERO_POINTER or fbn >= at.backing_blocks:
            return NOTHING
        at = at.backing
    return NOTHING


def locate_range(image: Image, fbn: int, count: int) -> list[Location] | None:
    """``locate`` for ``count`` blocks from ``fbn`` on."""
    found: list[Location] = []
    end = fbn + count
    while fbn < end:
        node = image.tree.peek(fbn >> FIELDS_SHIFT)
        if node is None:
            return None
        q = node.q
        stop = min(end, (fbn | FIELDS_MASK) + 1)
        for here in range(fbn, stop):  # inlines field_at of storage.fields
            slot = (here & FIELDS_MASK) * 2
            vbn = q[slot]
            if vbn > ZERO_POINTER:
                found.append((vbn, q[slot + 1] & CRC_MASK))
            elif vbn == ZERO_POINTER or here >= image.backing_blocks or image.backing is None:
                found.append(NOTHING)
            else:
                behind = locate(image.backing, here)
                if behind is None:
                    return None
                found.append(behind)
        fbn = stop
    return found


def runs(locations: list[Location]) -> list[tuple[int, int, int]]:
    """(first index, first VBN, length) of each stretch of blocks that lie one after the other on
    the device; zeros are left out.
    """
    result: list[tuple[int, int, int]] = []
    start, first, length = 0, HOLE, 0
    for index, (vbn, _) in enumerate(locations):
        if length and vbn == first + length:
            length += 1
            continue
        if length:
            result.append((start, first, length))
        start, first, length = index, vbn, 1 if vbn else 0
    if length:
        result.append((start, first, length))
    return result


def first_damaged(locations: list[Location], data: memoryview) -> int | None:
    """Index of the first block whose bytes are not those that its pointer promises."""
    for index, (vbn, crc) in enumerate(locations):
        if vbn and crc32c(data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]) != crc:
            return index
    return None


def damaged(image: Image, fbn: int, vbn: int) -> BlockDamaged:
    """The error for a data block that is not what was written, reported to the log as well."""
    image.state.on_event(
        "block.damaged", image=image.label, offset_bytes=fbn * BLOCK_BYTES, vbn=vbn
    )
    error = BlockDamaged(
        f"{image.label}: the data at byte {fbn * BLOCK_BYTES} (VBN {vbn}) is damaged: restore it"
        " from a snapshot or a backup"
    )
    error.offset_bytes = fbn * BLOCK_BYTES
    return error


async def locate_failure(
    image: Image, offset_bytes: int, length_bytes: int, error: StorageError
) -> None:
    """Note in the error of a read where its first unreadable byte is: it is tried block by block
    where the error does not say.
    """
    if error.offset_bytes is None and isinstance(error, BlockDamaged | DeviceFailed):
        for fbn in range(
            offset_bytes // BLOCK_BYTES, -(-(offset_bytes + length_bytes) // BLOCK_BYTES)
        ):
            try:
                await read_blocks(image, fbn, 1)
            except Exception:  # noqa: BLE001
                # Whatever it is: the read is answered with what it met first.
                error.offset_bytes = fbn * BLOCK_BYTES
                break
    if error.offset_bytes is not None:
        error.offset_bytes = max(offset_bytes, error.offset_bytes)


def locate_run(image: Image, fbn: int, count: int) -> tuple[int, list[int]] | None:
    """First VBN of ``count`` blocks of the image's own that lie one after the other, and what
    stands behind each VBN in its field.

    That is how most of what is read was written. None for everything else: ``locate_range`` tells
    then.
    """
    slot = fbn & FIELDS_MASK  # inlines field_at of storage.fields
    if slot + count > FIELDS_PER_BLOCK:
        return None
    node = image.tree.peek(fbn >> FIELDS_SHIFT)
    if node is None:
        return None
    fields = node.q[slot * 2 : (slot + count) * 2].tolist()
    first: int = fields[0]
    if first <= ZERO_POINTER or fields[::2] != list(range(first, first + count)):
        return None
    return first, fields[1::2]


def try_read_run(image: Image, first: int, tails: list[int]) -> bytearray | None:
    """The blocks that ``locate_run`` found if the page cache has them, and has them whole; None
    otherwise. Raises DeviceFailed.
    """
    data = bytearray(len(tails) * BLOCK_BYTES)
    if not image.state.device.try_readv((data,), first * BLOCK_BYTES):
        return None
    view = memoryview(data)
    at = 0
    for tail in tails:
        if crc32c(view[at : at + BLOCK_BYTES]) != tail & CRC_MASK:
            return None
        at += BLOCK_BYTES
    return data


def try_read_blocks(image: Image, fbn: int, count: int) -> bytearray | None:
    """``count`` whole blocks if everything is in memory or the page cache; None otherwise, or where
    the data are damaged.

    Raises BlockDamaged (a pointer block), DeviceFailed.
    """
    run = locate_run(image, fbn, count)
    if run is not None:
        return try_read_run(image, *run)
    locations = locate_range(image, fbn, count)
    if locations is None:
        return None
    data = bytearray(count * BLOCK_BYTES)
    view = memoryview(data)
    for index, vbn, length in runs(locations):
        part = view[index * BLOCK_BYTES : (index + length) * BLOCK_BYTES]
        if not image.state.device.try_readv((part,), vbn * BLOCK_BYTES):
            return None
    return data if first_damaged(locations, view) is None else None


async def read_blocks(image: Image, fbn: int, count: int) -> bytearray:
    """``count`` whole blocks, waiting for the device where it must. Raises BlockDamaged,
    DeviceFailed.
    """
    state = image.state
    locations = await when_possible(state, lambda: locate_range(image, fbn, count))
    data = bytearray(count * BLOCK_BYTES)
    view = memoryview(data)
    epoch = (
        state.begin_read()
    )  # in the step that found them: from here on nothing is written over them
    try:
        await read_all(
            state.device,
            (
                (view[at * BLOCK_BYTES : (at + length) * BLOCK_BYTES], vbn * BLOCK_BYTES)
                for at, vbn, length in runs(locations)
            ),
        )
    finally:
        state.end_read(epoch)
    bad = first_damaged(locations, view)
    if bad is not None:
        raise damaged(image, fbn + bad, locations[bad][0])
    return data
