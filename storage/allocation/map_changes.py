"""Changing the active map and the region summary, within a consistency point, from the ledger of
its epoch.

Writing the maps allocates blocks itself, whose bits must be set in the same maps: ``apply`` repeats
until no list has anything left. It ends, because each map block moves at most once in a consistency
point, and quickly, because what is allocated at one time lies together.
"""

from collections.abc import Iterator
from itertools import chain

import numpy as np
import numpy.typing as npt

from storage.allocation.active_map import (
    REGION_SHIFT,
    SUMMARIES_SHIFT,
    ActiveMap,
    Bits,
    count_bits,
)
from storage.allocation.write_allocator import WriteAllocator
from storage.epoch.epoch import Epoch
from storage.epoch.vbn_arrays import VbnArray, as_array, concatenated
from storage.layout import REGION_BLOCKS, SUMMARIES_PER_BLOCK
from storage.slicer import CHUNK, Slicer, in_thread_if_large
from storage.state.pool_state import PoolState
from storage.tree.attempt import when_possible
from storage.tree.editor import TreeEditor
from storage.tree.node import Node

# Runs of at least 1 MiB are given back to the device: shorter holes cost the file system more than
# they give back. Blocks that clients overwrite are not: they are about to be written again, and a
# file without holes is faster to write.
DISCARD_BLOCKS_MIN = 256


def packed(offsets: npt.NDArray[np.intp]) -> Bits:
    """A map block's worth of bits (4096 bytes), set at ``offsets`` within the region."""
    flags = np.zeros(REGION_BLOCKS, dtype=np.uint8)
    flags[offsets] = 1
    return np.packbits(flags, bitorder="little")


class MapChanges:
    """Enters the ledger of an epoch into the maps."""

    __slots__ = ("_active_map", "_allocator", "_bits", "_state", "_summary")

    def __init__(
        self,
        state: PoolState,
        active_map: ActiveMap,
        bits: TreeEditor,
        summary: TreeEditor,
        allocator: WriteAllocator,
    ) -> None:
        self._state = state
        self._active_map = active_map
        self._bits = bits
        self._summary = summary
        self._allocator = allocator

    async def apply(self, epoch: Epoch, slicer: Slicer) -> None:
        """Enter what the epoch allocated and freed into the maps, until writing the maps needs
        nothing more.
        """
        ledger = epoch.ledger
        while ledger.allocated or ledger.freed or ledger.freed_arrays:
            allocated, freed_singly, freed_arrays = (
                ledger.allocated,
                ledger.freed,
                ledger.freed_arrays,
            )
            ledger.allocated, ledger.freed, ledger.freed_arrays = [], [], []
            ledger.discards += await in_thread_if_large(
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
            self._allocator.settle(region, mask)
            change += len(taken)
        if returned is not None:
            mask = packed(returned)
            if count_bits(mask & bits) != len(returned):
                self._state.fail(
                    f"a block of region {region} was freed that is not in use: run `cleaved check`"
                )
            bits &= ~mask
            self._allocator.hold(region, mask)
            epoch.ledger.hold(region, mask)
            change -= len(returned)
        memoryview(summary.buf).cast("H")[region & (SUMMARIES_PER_BLOCK - 1)] += change
        self._active_map.used_blocks += change

    def _writable(self, epoch: Epoch, region: int) -> tuple[Node, Node] | None:
        """The region's map block and the one of its summary, free to be changed in the
        same step.
        """
        node = self._bits.writable(region, epoch, 0)
        summary = (
            self._summary.writable(region >> SUMMARIES_SHIFT, epoch, 0)
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
