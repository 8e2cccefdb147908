"""Changes of ranges of a vdisk that may have to wait: for old blocks to merge with, for the pool to
have room, for the device. What need not wait is done by the volume itself.
"""

from storage.data import read_path, write_path
from storage.data.block_locks import BlockLocks
from storage.data.copy_by_reference import copy_blocks
from storage.data.trim import trim_blocks
from storage.images.image import Image
from storage.layout import ATOMIC_WRITE_BYTES_MAX, BLOCK_MASK, BLOCK_SHIFT

Buffer = bytes | bytearray | memoryview


class RangeChanges:
    """Changes one image. While anybody holds one of its ``locks``, every write has to come here."""

    __slots__ = ("_image", "locks")

    def __init__(self, image: Image) -> None:
        self._image = image
        self.locks = BlockLocks()

    async def write(self, offset: int, data: Buffer) -> None:
        """Write bytes at any offset. Raises BlockDamaged, DeviceFailed, PoolFull, OutOfRange."""
        image = self._image
        first = offset >> BLOCK_SHIFT
        count = (offset + len(data) + BLOCK_MASK >> BLOCK_SHIFT) - first
        partial = (offset | len(data)) & BLOCK_MASK
        # The lock covers whole blocks too while somebody merges under it: a merged block must not
        # go over a newer one.
        async with self.locks.holding(first, count):
            if partial:
                old = await read_path.read_blocks(image, first, count)
                old[offset & BLOCK_MASK : (offset & BLOCK_MASK) + len(data)] = data
                data = old
            step = len(data)
            # Where a full pool lends blocks, what is borrowed must come back before more is, and a
            # write is done in pieces. What is not longer than one is there entirely or not at all.
            if (
                step > ATOMIC_WRITE_BYTES_MAX
                and image.allocator.is_short(count)
                and await write_path.only_replaces(image, first, count)
            ):
                step = ATOMIC_WRITE_BYTES_MAX
            view = memoryview(data)
            for at in range(0, len(data), step):
                targets: list[write_path.Target] = []
                buffers: list[Buffer] = []
                here = first + (at >> BLOCK_SHIFT)
                write_path.split_blocks(here, view[at : at + step], targets, buffers)
                await write_path.write_blocks(image, targets, buffers)

    async def write_zeros(self, start: int, end: int) -> None:
        """Make the bytes from ``start`` to before ``end`` zeros; whole blocks become zero pointers.
        Raises the same.
        """
        first_whole = (start + BLOCK_MASK) & ~BLOCK_MASK
        end_whole = end & ~BLOCK_MASK
        if first_whole >= end_whole:
            # No whole block: at most two partial ones.
            first_whole = end_whole = min(first_whole, end)
        if start < first_whole:
            await self.write(start, bytes(first_whole - start))
        if first_whole < end_whole:
            first, count = first_whole >> BLOCK_SHIFT, end_whole - first_whole >> BLOCK_SHIFT
            async with self.locks.holding(first, count):
                await trim_blocks(self._image, first, count)
        if end_whole < end:
            await self.write(end_whole, bytes(end - end_whole))

    async def copy(self, source: Image, source_offset: int, offset: int, length: int) -> None:
        """Make whole blocks read as those of ``source``, by reference. Raises the same, and
        VolumeClosed.
        """
        first, count = offset >> BLOCK_SHIFT, length >> BLOCK_SHIFT
        async with self.locks.holding(first, count):
            await copy_blocks(source, source_offset >> BLOCK_SHIFT, self._image, first, count)
