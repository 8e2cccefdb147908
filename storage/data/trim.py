"""Trimming: a range of blocks becomes zero pointers, at the highest level that the range covers.

Existing pointer blocks are visited once; holes and zero pointers above them cost one field each, so
trimming an empty disk of any size is a few hundred steps. Every step that changes something is
atomic (no await in it) and enters the log by itself.

Where nothing can be seen through a hole (no backing store, or beyond its end), a hole stays a hole:
it reads as zeros as it is.
"""

from typing import TYPE_CHECKING

import numpy as np

from storage.layout import FIELDS_MASK, FIELDS_PER_BLOCK, FIELDS_SHIFT, HOLE, ZERO_POINTER
from storage.state.slices import Slicer
from storage.tree.attempt import when_possible
from storage.tree.node import Node

if TYPE_CHECKING:
    from storage.images.image import Image
    from storage.state.epoch import Epoch


async def trim_blocks(image: "Image", first: int, count: int, keep_count: bool = True) -> None:
    """Make blocks [first, first + count) zero pointers.

    ``keep_count`` keeps ``used_blocks`` exact, for which shared subtrees must be walked too, and
    logs the trim; without it (an image that is being reclaimed) a shared subtree is let go of as
    one, and nothing is logged. Raises BlockDamaged, DeviceFailed, PoolFull.
    """
    await _Trim(image, first, first + count, keep_count).run()


class _Trim:
    """One trim under way."""

    def __init__(self, image: "Image", first: int, end: int, keep_count: bool) -> None:
        self.image = image
        self.tree = image.tree
        self.first = first
        self.end = end
        self.keep_count = keep_count
        self.slicer = Slicer()

    async def run(self) -> None:
        tree = self.tree
        while self.first < self.end:
            top = await tree.load(0, tree.levels)
            if top.tree is not None:
                await self._trim_node(tree.levels, 0)
                return
            if top.q[0] == ZERO_POINTER or self.first >= self.image.backing_blocks:
                self._log_unchanged(self.first, self.end)
                return
            await tree.make_writable(
                0, tree.levels
            )  # a clone without a tree: give it a root, then cut into that

    async def _trim_node(self, level: int, index: int) -> None:
        """Trim what lies below one existing pointer block."""
        if level == 1:
            await self._trim_fields(index)
            return
        shift = FIELDS_SHIFT * (level - 1)
        low = max(0, (self.first >> shift) - index * FIELDS_PER_BLOCK)
        high = min(FIELDS_PER_BLOCK, (self.end - 1 >> shift) + 1 - index * FIELDS_PER_BLOCK)
        for slot in range(low, high):
            child = index * FIELDS_PER_BLOCK + slot
            covered = self.first <= child << shift and (child + 1) << shift <= self.end
            await self._trim_child(level, index, child, covered)
            await self.slicer.breathe()

    async def _trim_child(self, level: int, index: int, child: int, covered: bool) -> None:
        """Trim one field of a pointer block of level 2 or more."""
        shift = FIELDS_SHIFT * (level - 1)
        while True:
            node = await self.tree.load(index, level)
            vbn = node.q[(child & FIELDS_MASK) * 2]
            if vbn == ZERO_POINTER or (vbn == HOLE and not self._visible(child << shift)):
                first, end = max(self.first, child << shift), min(self.end, child + 1 << shift)
                self._log_unchanged(first, end)
                return
            if vbn == HOLE:
                if not covered:
                    await self.tree.make_writable(child, level - 1)
                elif await self._replace(level, index, child):
                    return
            elif (
                covered
                and (level == 2 or not self.keep_count)
                and await self._cut(level, index, child)
            ):
                return
            else:
                await self._trim_node(level - 1, child)
                if covered:
                    await self._collapse(level, index, child)
                return

    def _log_unchanged(self, first: int, end: int) -> None:
        """Log blocks that read as zeros already, if a copy by reference may have zeroed them.

        The log cannot express such a copy, so after a crash it may be gone while this trim, which
        was acknowledged, must not be.
        """
        state = self.image.state
        copied = state.epoch.by_reference or (
            state.frozen is not None and state.frozen.by_reference
        )
        if self.keep_count and copied:
            state.epoch.unlogged.append((self.image.number, 0, first, ZERO_POINTER, end - first))

    def _visible(self, fbn: int) -> bool:
        """Whether something may be seen through a hole at ``fbn``."""
        return self.image.backing is not None and fbn < self.image.backing_blocks

    async def _replace(self, level: int, index: int, child: int) -> bool:
        """A covered hole becomes a zero pointer. False: it was no longer a hole."""
        node = await self.tree.make_writable(index, level)
        if node.q[(child & FIELDS_MASK) * 2] != HOLE:
            return False
        self._hide(node, child, FIELDS_SHIFT * (level - 1))
        return True

    def _hide(self, node: Node, child: int, shift: int) -> None:
        """Enter the zero pointer, and tell the log and the split."""
        image, epoch = self.image, self.image.state.epoch
        slot = (child & FIELDS_MASK) * 2
        if image.job is not None:
            image.job.holes_hidden()
        image.touch()
        node.q[slot], node.q[slot + 1] = ZERO_POINTER, 0
        if self.keep_count:
            epoch.unlogged.append((image.number, 0, child << shift, ZERO_POINTER, 1 << shift))

    async def _cut(self, level: int, index: int, child: int) -> bool:
        """Let go of a whole child: a level-1 block, or any shared one when nothing is counted.
        False: it must be walked.
        """
        return await when_possible(self.image.state, lambda: self._cut_now(level, index, child))

    def _cut_now(self, level: int, index: int, child: int) -> bool | None:
        """Look at the child, and let go of it, in one step. None: nothing was changed."""
        tree, state = self.tree, self.image.state
        block = tree.peek(child, level - 1)
        if block is None:
            return None
        if block.tree is None:
            return False
        node = self._parent_writable(block, level, index)
        if node is None:
            return None
        # Only now: making the parent writable may have given the child one more reference.
        count = state.share_map.try_count(block.vbn) if block.birth <= tree.shared_cp else 0
        if count is None:
            return None
        if level > 2 and not count:
            return False
        self._let_go(block, count > 0, state.epoch)
        self._hide(node, child, FIELDS_SHIFT * (level - 1))
        return True

    def _parent_writable(self, block: Node, level: int, index: int) -> Node | None:
        """The pointer block above ``block``, with what ``block`` shares at hand. None: nothing was
        changed.
        """
        tree = self.tree
        if (
            block.birth <= tree.shared_cp
            and self.image.state.share_map.try_count(block.vbn) is None
        ):
            return None
        return tree.writable(index, self.image.state.epoch, level)

    def _let_go(self, block: Node, shared: bool, epoch: "Epoch") -> None:
        """Settle the reference to a child, and to the data below it unless others still refer to
        the child.
        """
        fields = block.fields()
        set_fields = fields[fields["vbn"] > ZERO_POINTER]
        if block.level == 1 and self.keep_count:
            self.image.touch()
            self.image.used_blocks -= len(set_fields)
        if shared:
            epoch.count_pointer(block.vbn, -1)
            self._forget_below(block)
        else:
            self._drop_data(set_fields, epoch)
            epoch.freed.append(block.vbn)
        self.tree.forget(block, epoch)

    def _drop_data(
        self, set_fields: "np.ndarray[tuple[int], np.dtype[np.void]]", epoch: "Epoch"
    ) -> None:
        own = set_fields["birth"] > self.tree.shared_cp
        epoch.freed_arrays.append(set_fields["vbn"][own])
        epoch.dropped_arrays.append(set_fields["vbn"][~own])

    def _forget_below(self, block: Node) -> None:
        """Nodes below a block that is let go of as one must not be found any more."""
        epoch = self.image.state.epoch
        for level in range(block.level - 1, 0, -1):
            shift = FIELDS_SHIFT * (block.level - level)
            nodes = self.tree.nodes[level]
            for index in [index for index in nodes if index >> shift == block.index]:
                self.tree.forget(nodes[index], epoch)

    async def _collapse(self, level: int, index: int, child: int) -> None:
        """After everything below a covered child was trimmed: replace it by a zero pointer, unless
        somebody wrote there meanwhile.
        """
        await when_possible(self.image.state, lambda: self._collapse_now(level, index, child))

    def _collapse_now(self, level: int, index: int, child: int) -> bool | None:
        state, tree = self.image.state, self.tree
        block = tree.peek(child, level - 1)
        if block is None:
            return None
        if block.tree is None:
            return True
        if self.image.backing is not None and not (block.vbns() == ZERO_POINTER).all():
            # Holes that nothing is seen through may stay, and writes that came meanwhile do.
            return True
        if (block.vbns() > ZERO_POINTER).any():
            return True
        node = self._parent_writable(block, level, index)
        if node is None:
            return None
        count = state.share_map.try_count(block.vbn) if block.birth <= tree.shared_cp else 0
        if count:
            state.epoch.count_pointer(block.vbn, -1)  # a snapshot was taken meanwhile
        else:
            state.epoch.freed.append(block.vbn)
        tree.forget(block, state.epoch)
        self._hide(node, child, FIELDS_SHIFT * (level - 1))
        return True

    async def _trim_fields(self, index: int) -> None:
        """Trim fields of one level-1 block."""
        await when_possible(self.image.state, lambda: self._trim_fields_now(index))

    def _trim_fields_now(self, index: int) -> bool | None:
        image, tree = self.image, self.tree
        low = max(0, self.first - index * FIELDS_PER_BLOCK)
        high = min(FIELDS_PER_BLOCK, self.end - index * FIELDS_PER_BLOCK)
        found = tree.peek(index)
        if found is None:
            return None
        if not self._changes(found.fields()[low:high], index * FIELDS_PER_BLOCK + low):
            self._log_unchanged(index * FIELDS_PER_BLOCK + low, index * FIELDS_PER_BLOCK + high)
            return True
        epoch = image.state.epoch
        node = tree.writable(index, epoch)
        if node is None:
            return None
        fields = node.fields()[low:high]
        set_fields = fields[fields["vbn"] > ZERO_POINTER]
        image.touch()
        if image.job is not None and (fields["vbn"] == HOLE).any():
            image.job.holes_hidden()
        image.used_blocks -= len(set_fields)
        self._drop_data(set_fields, epoch)
        fields["vbn"] = ZERO_POINTER
        fields["crc"] = fields["birth"] = 0
        if self.keep_count:
            epoch.unlogged.append(
                (image.number, 0, index * FIELDS_PER_BLOCK + low, ZERO_POINTER, high - low)
            )
        return True

    def _changes(self, fields: "np.ndarray[tuple[int], np.dtype[np.void]]", fbn: int) -> bool:
        """Whether trimming these fields would change what they say."""
        return bool((fields["vbn"] > ZERO_POINTER).any()) or (
            self._visible(fbn) and bool((fields["vbn"] == HOLE).any())
        )
