"""The share map: for each VBN the count of references beyond the first, as a sparse metafile of
u32.

Counts of data blocks are needed only when a reference goes, and that is settled at the consistency
point, a whole epoch at once. Counts of *pointer* blocks decide whether a node must be unshared
before it changes, so they must be exact at every moment: ``try_count`` adds the changes that the
current and the frozen epoch hold (``AllocationLedger.pointer_delta``) to what the map says.

A count is a u32 and must not wrap. A pointer block has at most one reference from each tree, so the
number of images (each of which takes a block of the table) bounds its count. A data block can have
any number: copies by reference give one more for each block of the destination, share-mode splits
and changes of shared pointer blocks one for each field that is copied. 256 of them lie on one
pointer block of their own, so 2^31 of them take 32 GiB of pointer blocks, and from there to 2^32 it
is 32 GiB more. Each consistency point looks at every count that it changes. Past SHARES_CROWDED
what leads to more references is refused (``check_room``): no new snapshots, share-mode splits or
copies by reference until the count has come down. What writes to blocks that are shared already can
still add goes on; should it ever come to SHARES_MAX, the pool goes read-only before that
consistency point becomes the pool's.
"""

import asyncio

import numpy as np
import numpy.typing as npt

from storage.epoch.epoch import Epoch
from storage.epoch.vbn_arrays import VbnArray, as_array, concatenated
from storage.errors import RequestError
from storage.layout import SHARES_CROWDED, SHARES_MAX, SHARES_PER_BLOCK
from storage.slicer import Slicer, in_thread_if_large
from storage.state.pool_state import PoolState
from storage.tree.attempt import when_possible
from storage.tree.editor import TreeEditor
from storage.tree.node import HOLES, Hold, Node

# How often a write to a full pool looks whether the consistency point under way has settled the
# counts. Rare.
SETTLED_POLL_SECONDS = 0.001
SHARES_SHIFT = SHARES_PER_BLOCK.bit_length() - 1


class ShareMap:
    """Reads counts at any time; changes them only within a consistency point (``apply``)."""

    __slots__ = ("_crowded", "_editor", "_state", "tree")

    def __init__(self, state: PoolState, editor: TreeEditor) -> None:
        self._state = state
        self._editor = editor
        self.tree = editor.tree
        # VBNs whose count was seen above SHARES_CROWDED.
        self._crowded: set[int] = set()

    def check_room(self, refusal: type[RequestError]) -> None:
        """Raise ``refusal`` while some block has so many references that nothing may be done that
        leads to more.
        """
        if self._crowded:
            raise refusal(
                f"the block at VBN {min(self._crowded)} has more than {SHARES_CROWDED} references,"
                " and the pool cannot count many more: trim or delete copies of it first; data can"
                " still be copied without sharing it"
            )

    def try_count(self, vbn: int) -> int | None:
        """Extra references to the pointer block at ``vbn`` now, or None when the map's block has to
        be loaded first (``state.missing``).
        """
        node = self.tree.peek(vbn >> SHARES_SHIFT, 0)
        if node is None:
            return None
        count = 0 if node is HOLES else memoryview(node.buf).cast("I")[vbn & (SHARES_PER_BLOCK - 1)]
        state = self._state
        count += state.epoch.ledger.pointer_delta.get(vbn, 0)
        if state.frozen is not None:
            count += state.frozen.ledger.pointer_delta.get(vbn, 0)
        return count

    def try_unshared(self, vbns: list[int]) -> bool | None:
        """Whether none of these data blocks has an extra reference now, or is about to get one;
        None: it has to be waited for.
        """
        if self._state.frozen is not None:
            self._state.missing = (
                self._settled
            )  # what that adds may be neither in its lists nor in the map
            return None
        for vbn in vbns:
            count = self.try_count(vbn)
            if count != 0:
                return None if count is None else False
        return not any(np.isin(vbns, array).any() for array in self._state.epoch.ledger.added)

    async def _settled(self, hold: Hold) -> None:
        """Wait for the end of the consistency point under way."""
        while self._state.frozen is not None:
            self._state.check_writable()
            await asyncio.sleep(SETTLED_POLL_SECONDS)

    async def count(self, vbn: int) -> int:
        """``try_count``, waiting where it must. Raises BlockDamaged, DeviceFailed."""
        return await when_possible(self._state, lambda: self.try_count(vbn))

    async def apply(self, epoch: Epoch, slicer: Slicer) -> None:
        """Enter the epoch's references into the map; what lost its last one joins
        ``freed_arrays`` of its ledger.
        """
        vbns, net = await self._net_changes(epoch, slicer)
        if not len(vbns):
            return
        blocks = vbns >> np.uint64(SHARES_SHIFT)
        starts = np.flatnonzero(np.diff(blocks, prepend=np.uint64(2**63)))
        ends = np.append(starts[1:], len(vbns))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            await self._apply_block(epoch, int(blocks[start]), vbns[start:end], net[start:end])
            await slicer.breathe()

    async def _net_changes(
        self, epoch: Epoch, slicer: Slicer
    ) -> tuple[VbnArray, npt.NDArray[np.int64]]:
        """The VBNs whose count changes, ascending, and by how much."""
        ledger = epoch.ledger
        added = concatenated(ledger.added)
        dropped_singly, dropped_arrays = ledger.dropped, ledger.dropped_arrays
        pointer_vbns, pointer_changes = (
            list(ledger.pointer_delta),
            list(ledger.pointer_delta.values()),
        )
        ledger.added, ledger.dropped, ledger.dropped_arrays = [], [], []
        dropped = concatenated([await as_array(dropped_singly, slicer), *dropped_arrays])
        pointers = await as_array(pointer_vbns, slicer)
        weights = np.concatenate(
            (
                np.ones(len(added)),
                -np.ones(len(dropped)),
                np.array(pointer_changes, dtype=np.float64),
            )
        )
        everything = np.concatenate((added, dropped, pointers))
        return await in_thread_if_large(len(everything), _summed, everything, weights)

    async def _apply_block(
        self, epoch: Epoch, block: int, vbns: VbnArray, net: npt.NDArray[np.int64]
    ) -> None:
        """One block of the map."""
        grows = bool((net > 0).any())
        node = await when_possible(self._state, lambda: self._node_for(epoch, block, grows))
        self._change_block(epoch, node, vbns, net)

    def _change_block(
        self, epoch: Epoch, node: Node, vbns: VbnArray, net: npt.NDArray[np.int64]
    ) -> None:
        """All of it in one step, so that ``try_count`` never sees half of it."""
        at = (vbns & np.uint64(SHARES_PER_BLOCK - 1)).astype(np.intp)
        counts = np.frombuffer(node.buf, dtype="<u4")
        changed = counts[at].astype(np.int64) + net
        if (changed < -1).any():
            worst = int(vbns[int(np.argmin(changed))])
            self._state.fail(
                f"the share map holds fewer references to VBN {worst} than are dropped: run"
                " `cleaved check`"
            )
            changed = np.maximum(changed, -1)
        if (changed > SHARES_CROWDED).any() or self._crowded:
            changed = self._watched(vbns, changed)
        if (changed < 0).any():
            epoch.ledger.freed_arrays.append(vbns[changed < 0])
        if node is not HOLES:
            counts[at] = np.maximum(changed, 0)
        pointer_delta = epoch.ledger.pointer_delta
        for vbn in vbns.tolist() if pointer_delta else ():
            pointer_delta.pop(vbn, None)

    def _watched(self, vbns: VbnArray, changed: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Note which counts are far too high; returns them as the map can hold them. Fails the pool
        rather than let one wrap.
        """
        crowded = set(vbns[changed > SHARES_CROWDED].tolist())
        for vbn in sorted(crowded - self._crowded):
            self._state.on_event("references.crowded", vbn=vbn, references_max=SHARES_CROWDED)
        self._crowded = (self._crowded - set(vbns.tolist())) | crowded
        if (changed > SHARES_MAX).any():
            worst = int(vbns[int(np.argmax(changed))])
            self._state.fail(
                f"the block at VBN {worst} has more references than can be counted: copy the vdisks"
                " into a new pool"
            )
        return np.minimum(changed, SHARES_MAX)

    def _node_for(self, epoch: Epoch, block: int, grows: bool) -> Node | None:
        """The map's block, writable unless it is a hole and stays one."""
        node = self.tree.peek(block, 0)
        return (
            node
            if node is None or (node is HOLES and not grows)
            else self._editor.writable(block, epoch, 0)
        )


def _summed(
    vbns: VbnArray, weights: npt.NDArray[np.float64]
) -> tuple[VbnArray, npt.NDArray[np.int64]]:
    """Distinct VBNs, ascending, with the sum of their weights, without those whose sum is 0."""
    distinct, inverse = np.unique(vbns, return_inverse=True)
    net = np.bincount(inverse, weights=weights, minlength=len(distinct)).astype(np.int64)
    return distinct[net != 0], net[net != 0]
