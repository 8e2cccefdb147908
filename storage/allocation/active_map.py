"""The active map (a bit a VBN: in use) and the region summary (how many bits of each map block are
set).

Both change only within a consistency point, from the lists of its epoch. Writing the maps allocates
blocks itself, whose bits must be set in the same maps: ``apply`` repeats until no list has anything
left. It ends, because each map block moves at most once in a consistency point, and quickly,
because what is allocated at one time lies together.
"""

from collections.abc import Iterator
from itertools import chain

import numpy as np
import numpy.typing as npt

from storage.epoch.epoch import Epoch
from storage.epoch.vbn_arrays import VbnArray, as_array, concatenated
from storage.layout import BLOCK_BYTES, REGION_BLOCKS, SUMMARIES_PER_BLOCK
from storage.slicer import CHUNK, Slicer, in_thread_if_large
from storage.state.pool_state import PoolState
from storage.tree.attempt import when_possible
from storage.tree.buffer_tree import BufferTree
from storage.tree.node import Hold, Node

Bits = npt.NDArray[np.uint8]
REGION_SHIFT = REGION_BLOCKS.bit_length() - 1
SUMMARIES_SHIFT = SUMMARIES_PER_BLOCK.bit_length() - 1
# Runs of at least 1 MiB are given back to the device: shorter holes cost the file system more than
# they give back. Blocks that clients overwrite are not: they are about to be written again, and a
# file without holes is faster to write.
DISCARD_BLOCKS_MIN = 256
NO_BITS: Bits = np.zeros(BLOCK_BYTES, dtype=np.uint8)
NO_BITS.flags.writeable = False


def packed(offsets: npt.NDArray[np.intp]) -> Bits:
    """A map block's worth of bits (4096 bytes), set at ``offsets`` within the region."""
    flags = np.zeros(REGION_BLOCKS, dtype=np.uint8)
    flags[offsets] = 1
    return np.packbits(flags, bitorder="little")


def count_bits(bits: Bits) -> int:
    """How many bits are set."""
    return int(np.bitwise_count(bits.view(np.uint64)).sum())


class ActiveMap:
    """The two metafiles, read by the write allocator and changed by the consistency point."""

    __slots__ = ("_state", "summary_tree", "tree", "used_blocks")

    def __init__(
        self, state: PoolState, tree: BufferTree, summary_tree: BufferTree, used_blocks: int
    ) -> None:
        self._state = state
        self.tree = tree
        self.summary_tree = summary_tree
        # Bits that are set in the map as it stands; the superblock keeps it.
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

    async def apply(self, epoch: Epoch, slicer: Slicer) -> None:
        """Enter what the epoch allocated and freed into the maps, until writing the maps needs
        nothing more.
        """
        while epoch.allocated or epoch.freed or epoch.freed_arrays:
            allocated, freed_singly, freed_arrays = epoch.allocated, epoch.freed, epoch.freed_arrays
            epoch.allocated, epoch.freed, epoch.freed_arrays = [], [], []
            epoch.discards += await in_thread_if_large(
                sum(map(len, freed_arrays)), long_runs, freed_arrays
            )
            extents = await _extents_array(allocated, slicer)
            freed = [await as_array(freed_singly, slicer), *freed_arrays]
            size = int(extents[:, 1].sum()) + sum(map(len, freed))
            taken, returned = await in_thread_if_large(size, _sorted_vbns, extents, freed)
            returned_by_region = dict(_by_region(returned))
            for region, offsets in _by_region(taken):
                await self._change(epoch, region, offsets, returned_by_region.pop(region, None))
                await slicer.breathe()
            for region, offsets in returned_by_region.items():
                await self._change(epoch, region, None, offsets)
                await slicer.breathe()

    async def _change(
        self,
        epoch: Epoch,
        region: int,
        taken: npt.NDArray[np.intp] | None,
        returned: npt.NDArray[np.intp] | None,
    ) -> None:
        """Set and clear bits of one region; what is cleared stays held until the epoch
        is released.
        """
        node, summary = await when_possible(self._state, lambda: self._writable(epoch, region))
        bits = np.frombuffer(node.buf, dtype=np.uint8)
        change = 0
        if taken is not None:
            mask = packed(taken)
            if (bits & mask).any():
                self._state.fail(
                    f"the write allocator handed out a block of region {region} that is in use: run"
                    " `cleaved check`"
                )
            bits |= mask
            self._state.allocator.settle(region, mask)
            change += len(taken)
        if returned is not None:
            mask = packed(returned)
            if count_bits(mask & bits) != len(returned):
                self._state.fail(
                    f"a block of region {region} was freed that is not in use: run `cleaved check`"
                )
            bits &= ~mask
            self._state.allocator.hold(region, mask)
            epoch.hold(region, mask)
            change -= len(returned)
        memoryview(summary.buf).cast("H")[region & (SUMMARIES_PER_BLOCK - 1)] += change
        self.used_blocks += change

    def _writable(self, epoch: Epoch, region: int) -> tuple[Node, Node] | None:
        """The region's map block and the one of its summary, free to be changed in the
        same step.
        """
        node = self.tree.writable(region, epoch, 0)
        summary = (
            self.summary_tree.writable(region >> SUMMARIES_SHIFT, epoch, 0)
            if node is not None
            else None
        )
        return (node, summary) if node is not None and summary is not None else None


async def _extents_array(extents: list[tuple[int, int]], slicer: Slicer) -> npt.NDArray[np.uint64]:
    """(first VBN, length) rows."""
    parts = [np.zeros(0, dtype=np.uint64)]
    for start in range(0, len(extents), CHUNK):
        flat = list(chain.from_iterable(extents[start : start + CHUNK]))
        parts.append(np.array(flat, dtype=np.uint64))
        await slicer.breathe()
    return concatenated(parts).reshape(-1, 2)


def long_runs(freed: list[VbnArray]) -> list[tuple[int, int]]:
    """(first VBN, length) of what trims and deletions freed in runs of
    DISCARD_BLOCKS_MIN or more.
    """
    vbns = concatenated(freed)
    if len(vbns) < DISCARD_BLOCKS_MIN:
        return []
    vbns.sort()
    breaks = np.flatnonzero(np.diff(vbns) != 1)
    starts = vbns[np.concatenate(([0], breaks + 1))]
    lengths = np.diff(np.concatenate(([-1], breaks, [len(vbns) - 1])))
    long = lengths >= DISCARD_BLOCKS_MIN
    return list(zip(starts[long].tolist(), lengths[long].tolist(), strict=True))


def _sorted_vbns(
    extents: npt.NDArray[np.uint64], freed: list[VbnArray]
) -> tuple[VbnArray, VbnArray]:
    """Every VBN that was allocated, and every one that was freed, each ascending."""
    counts = extents[:, 1].astype(np.intp)
    first = np.repeat(extents[:, 0], counts)
    within = np.arange(len(first), dtype=np.uint64) - np.repeat(
        np.cumsum(counts) - counts, counts
    ).astype(np.uint64)
    taken = first + within
    taken.sort()
    returned = concatenated(freed)
    returned.sort()
    return taken, returned


def _by_region(vbns: VbnArray) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
    """(region, offsets within it) for ascending VBNs."""
    regions = vbns >> np.uint64(REGION_SHIFT)
    starts = np.flatnonzero(np.diff(regions, prepend=np.uint64(2**63)))
    for start, end in zip(
        starts.tolist(), [*starts[1:].tolist(), len(vbns)], strict=len(starts) > 0
    ):
        yield int(regions[start]), (vbns[start:end] & np.uint64(REGION_BLOCKS - 1)).astype(np.intp)
