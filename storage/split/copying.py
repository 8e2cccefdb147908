"""Replacing holes, the two ways (design section 5, step 3).

``copy``: the data behind the holes is read, verified, and written unaltered to newly allocated
blocks; then each field is pointed at its new block *if it is still a hole*. A client write that
came first wins, and the new block is given back unused. ``share``: the fields take the backing
store's own pointers, and the share map counts one more reference to each.
"""

import asyncio
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from storage.checksum import crc32c
from storage.data.backing import visible_slots
from storage.data.read_path import Location, damaged, runs
from storage.data.write_path import Extents
from storage.device import read_all
from storage.errors import StorageError
from storage.fields import set_field
from storage.images.image import Image
from storage.layout import BLOCK_BYTES, FIELDS_PER_BLOCK, FIELDS_SHIFT, HOLE
from storage.split.loading import Holes, find_holes, shared_block
from storage.tree.attempt import when_possible

# What lies behind one level-1 block.
COPY_BYTES_MAX = FIELDS_PER_BLOCK * BLOCK_BYTES


class CopyBuffers:
    """Buffers of COPY_BYTES_MAX for all splits of a pool, which copy one after the other; a new one
    each time would cost as much to map and clear as to copy.
    """

    def __init__(self, kept_max: int) -> None:
        self._kept_max = kept_max
        self._free: list[bytearray] = []

    def take(self) -> bytearray:
        """A buffer with whatever was in it."""
        return self._free.pop() if self._free else bytearray(COPY_BYTES_MAX)

    def give_back(self, buffer: bytearray) -> None:
        """No write uses it any more."""
        if len(self._free) < self._kept_max:
            self._free.append(buffer)

    def clear(self) -> None:
        """No split runs."""
        self._free.clear()


async def read_behind(clone: Image, holes: Holes, buffer: bytearray) -> memoryview:
    """The data behind the holes, verified, as the first part of ``buffer`` (COPY_BYTES_MAX). Raises
    BlockDamaged, DeviceFailed.
    """
    state = clone.state
    locations: list[Location] = list(
        zip(holes.fields["vbn"].tolist(), holes.fields["crc"].tolist(), strict=True)
    )
    view = memoryview(buffer)[: len(locations) * BLOCK_BYTES]
    epoch = state.begin_read()
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
    at = 0
    for slot, (vbn, crc) in zip(holes.slots.tolist(), locations, strict=True):
        if crc32c(view[at : at + BLOCK_BYTES]) != crc:
            raise damaged(clone, (holes.index << FIELDS_SHIFT) + slot, vbn)
        at += BLOCK_BYTES
    return view


def pieces(extents: Extents, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """(byte offset, bytes) of writes that fill the extents; a short one keeps a client's write to
    the same file waiting less.
    """
    for first, length in extents:
        for start in range(0, length * BLOCK_BYTES, piece_bytes):
            yield first * BLOCK_BYTES + start, min(piece_bytes, length * BLOCK_BYTES - start)


async def write_copy(clone: Image, data: memoryview, piece_bytes: int) -> Extents:
    """Write the data to newly allocated blocks, in pieces of at most ``piece_bytes``. Raises
    PoolFull, DeviceFailed.
    """
    device = clone.state.device
    count = len(data) // BLOCK_BYTES
    extents = await when_possible(clone.state, lambda: clone.allocator.take(count))
    at = 0
    try:
        for offset, length in pieces(extents, piece_bytes):
            part = data[at : at + length]
            if not device.try_writev((part,), offset, length):
                await device.writev((part,), offset)
            at += length
            await asyncio.sleep(0)
    except StorageError:
        clone.allocator.give_back(extents)
        raise
    return extents


async def install_copy(clone: Image, holes: Holes, extents: Extents) -> int:
    """Compare and set: point at the copies those fields that are still holes. Returns how many
    were. Raises PoolFull, DeviceFailed.
    """
    return await when_possible(clone.state, lambda: _install_copy_now(clone, holes, extents))


def _install_copy_now(clone: Image, holes: Holes, extents: Extents) -> int | None:
    epoch = clone.state.epoch
    node = clone.editor.writable(holes.index, epoch)
    if node is None:
        return None
    fields = node.fields()
    vbns = np.concatenate(
        [np.arange(first, first + length, dtype=np.uint64) for first, length in extents]
    )
    still = (fields["vbn"][holes.slots] == HOLE) & visible_slots(clone, holes.index)[holes.slots]
    slots = holes.slots[still]
    clone.touch()
    fields["vbn"][slots] = vbns[still]
    fields["crc"][slots] = holes.fields["crc"][still]
    fields["birth"][slots] = epoch.number
    clone.used_blocks += len(slots)
    if len(slots) == len(vbns):
        epoch.ledger.allocated.extend(extents)
    else:
        epoch.ledger.allocated.extend((vbn, 1) for vbn in vbns[still].tolist())
        clone.allocator.give_back([(vbn, 1) for vbn in vbns[~still].tolist()])
    return len(slots)


async def share_fields(clone: Image, index: int) -> int:
    """Share mode for one level-1 block. Returns how many holes were replaced. Raises PoolFull,
    DeviceFailed, BlockDamaged.
    """
    return await when_possible(clone.state, lambda: _share_fields_now(clone, index))


def _share_fields_now(clone: Image, index: int) -> int | None:
    """Find the holes and take the pointers behind them, in one step. None: nothing was changed."""
    holes = find_holes(clone, index)
    if holes is None:
        return None
    if not len(holes):
        return 0
    node = clone.editor.writable(index, clone.state.epoch)
    if node is None:
        return None
    mark_shared(clone)
    node.fields()[holes.slots] = holes.fields
    clone.state.epoch.ledger.added.append(vbns_of(holes))
    clone.used_blocks += len(holes)
    return len(holes)


def vbns_of(holes: Holes) -> npt.NDArray[np.uint64]:
    """The VBNs behind the holes."""
    return np.ascontiguousarray(holes.fields["vbn"])


def mark_shared(clone: Image) -> None:
    """From now on blocks as old as now may be shared with the backing store."""
    clone.touch()
    clone.tree.shared_cp = clone.state.epoch.number


async def share_block(clone: Image, index: int, level: int, blocks: int | None) -> int:
    """Share a whole pointer block of the backing store, ``blocks`` set fields below it (None: of
    level 1, to be counted).

    Returns how many holes that replaced; 0 where it is not possible (any more). Raises PoolFull,
    DeviceFailed, BlockDamaged.
    """
    return await when_possible(clone.state, lambda: _share_block_now(clone, index, level, blocks))


def _share_block_now(clone: Image, index: int, level: int, blocks: int | None) -> int | None:
    """Look whether the block can be shared, and share it, in one step. None: nothing
    was changed.
    """
    tree, epoch = clone.tree, clone.state.epoch
    field = shared_block(clone, index, level)
    if field is None:
        return 0
    if blocks is None:
        holes = find_holes(clone, index)
        if holes is None:
            return None
        blocks = len(holes)
    if level < tree.levels:
        parent = clone.editor.writable(index >> FIELDS_SHIFT, epoch, level + 1)
        if parent is None:
            return None
        mark_shared(clone)
        set_field(parent.q, index, field)
    else:
        mark_shared(clone)
        tree.root_vbn, tree.root_crc, tree.root_birth = field
    epoch.ledger.count_pointer(field[0], 1)
    clone.used_blocks += blocks
    return blocks
