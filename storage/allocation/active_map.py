"""The active map (a bit a VBN: in use) and the region summary (how many bits of each map block are
set), for reading. They change within a consistency point (storage.allocation.map_changes).
"""

import numpy as np
import numpy.typing as npt

from storage.layout import BLOCK_BYTES, REGION_BLOCKS, SUMMARIES_PER_BLOCK
from storage.tree.buffer_tree import BufferTree
from storage.tree.node import Hold

Bits = npt.NDArray[np.uint8]
REGION_SHIFT = REGION_BLOCKS.bit_length() - 1
SUMMARIES_SHIFT = SUMMARIES_PER_BLOCK.bit_length() - 1
NO_BITS: Bits = np.zeros(BLOCK_BYTES, dtype=np.uint8)
NO_BITS.flags.writeable = False


def count_bits(bits: Bits) -> int:
    """How many bits are set."""
    return int(np.bitwise_count(bits.view(np.uint64)).sum())


class ActiveMap:
    """The two metafiles as of the last consistency point, for the write allocator to read.
    ``used_blocks`` are the bits that are set; the superblock keeps it.
    """

    __slots__ = ("summary_tree", "tree", "used_blocks")

    def __init__(self, tree: BufferTree, summary_tree: BufferTree, used_blocks: int) -> None:
        self.tree = tree
        self.summary_tree = summary_tree
        self.used_blocks = used_blocks

    def peek_bits(self, region: int) -> Bits | None:
        """The region's map block as of the last consistency point, or None when it has to be loaded
        (``load``).
        """
        node = self.tree.peek(region, 0)
        return None if node is None else np.frombuffer(node.buf, dtype=np.uint8)

    def peek_used(self, region: int) -> int | None:
        """How many bits the region has set, or None when the summary has to be loaded
        (``load``).
        """
        node = self.summary_tree.peek(region >> SUMMARIES_SHIFT, 0)
        return (
            None
            if node is None
            else memoryview(node.buf).cast("H")[region & (SUMMARIES_PER_BLOCK - 1)]
        )

    async def load(self, region: int, hold: Hold) -> None:
        """Bring the region's map block and summary into memory, and hold them. Raises BlockDamaged,
        DeviceFailed.
        """
        hold.keep(await self.summary_tree.load(region >> SUMMARIES_SHIFT, 0))
        hold.keep(await self.tree.load(region, 0))
