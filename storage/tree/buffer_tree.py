"""A buffer tree: the pointer blocks over a vdisk, a snapshot or a metafile.

Looking up is synchronous. A None answer means that the device would block: ``state.missing`` then
says what to wait for (storage.tree.attempt). Changing follows one rule: before a node changes for
the first time in an epoch it gets a new VBN (so the location that the last consistency point knows
is never overwritten), and so does every node above it, from the root down. Because the VBN is known
at once, a parent's field always names its child's newest location; only the CRC32C in it is filled
in by the consistency point.

That happens in two parts within one step. The *plan* finds the nodes on the way and looks whether
everything is at hand: it may load, and may fail, and changes nothing. Carrying it out changes
everything, cannot load, and cannot fail.

Lazy sharing (design section 4): a node whose block another tree also refers to gives its children
one more reference each when it is copied, and takes one from the shared block. A block born after
``shared_cp`` cannot be shared, and costs no look-up.
"""

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from storage.checksum import crc32c
from storage.epoch.epoch import Epoch
from storage.errors import BlockDamaged
from storage.layout import (
    BLOCK_BYTES,
    FIELDS_MASK,
    FIELDS_SHIFT,
    HOLE,
    KIND_DELETED,
    TREE_LEVELS_MAX,
    ZERO_POINTER,
)
from storage.tree.attempt import when_possible
from storage.tree.node import HOLES, ZEROS, Hold, Node, filled_buffer

if TYPE_CHECKING:
    from storage.images.image import Image
    from storage.state.pool_state import PoolState


# How often a reader of a snapshot that is just being made looks whether it is there. Rare, and over
# within one consistency point.
UNWRITTEN_POLL_SECONDS = 0.001


class Plan:
    """What has to be done in an epoch before some nodes of one tree may be changed.

    ``steps`` are the nodes that get a new location, from the root down, by level and index; HOLES
    or ZEROS stand for one that has to be made. ``grows``: the tree takes more blocks than it gives
    back, because nodes are made, or shared ones are copied.
    """

    __slots__ = ("epoch", "grows", "steps")

    def __init__(self, epoch: Epoch) -> None:
        self.epoch = epoch
        self.grows = False
        self.steps: dict[tuple[int, int], Node] = {}


class BufferTree:
    """``nodes[level][index]`` lists the nodes in memory; the root field (``root_vbn``,
    ``root_crc``, ``root_birth``) names the top one.
    """

    __slots__ = (
        "_loading",
        "image",
        "label",
        "levels",
        "nodes",
        "root_birth",
        "root_crc",
        "root_vbn",
        "shared_cp",
        "state",
    )

    def __init__(
        self,
        state: "PoolState",
        label: str,
        levels: int,
        root: tuple[int, int, int],
        shared_cp: int,
        image: "Image | None",
    ) -> None:
        self.state = state
        self.label = label
        self.levels = levels
        self.root_vbn, self.root_crc, self.root_birth = root
        self.shared_cp = shared_cp
        self.image = image
        self.nodes: list[dict[int, Node]] = [{} for _ in range(TREE_LEVELS_MAX + 1)]
        self._loading: dict[tuple[int, int], asyncio.Future[None]] = {}

    # --- Looking up -------------------------------------------------------------------------------

    def peek(self, index: int, level: int = 1) -> Node | None:
        """The node, or HOLES or ZEROS where a field above it says so, or None when the device would
        block.
        """
        node = self.nodes[level].get(index)
        if node is not None:
            node.referenced = True
            return node
        return self._descend(index, level)

    def _descend(self, index: int, level: int) -> Node | None:
        """Walk down from the lowest ancestor in memory, loading what the page cache has."""
        at = level
        while at < self.levels:
            at += 1
            node = self.nodes[at].get(index >> FIELDS_SHIFT * (at - level))
            if node is not None:
                node.referenced = True
                break
        else:
            if index >> FIELDS_SHIFT * (self.levels - level):
                return HOLES  # beyond what a tree of this height covers
            node = self._enter_root()
        while node is not None and node.tree is not None and node.level > level:
            node = self._enter(node, index >> FIELDS_SHIFT * (node.level - 1 - level))
        return node

    def _enter_root(self) -> Node | None:
        node = self.nodes[self.levels].get(0)
        if node is not None:
            return node
        if self.root_vbn <= ZERO_POINTER:
            return ZEROS if self.root_vbn else HOLES
        if self._root_unwritten():
            self.state.missing = self._root_written
            return None
        return self._load_now(self.levels, 0, self.root_vbn, self.root_crc, self.root_birth)

    def _root_unwritten(self) -> bool:
        """Whether this is a snapshot that is just being made: the consistency point under way will
        write its root, and say its CRC32C.
        """
        frozen = self.state.frozen
        return not self.root_crc and frozen is not None and self.root_birth == frozen.number

    def _enter(self, parent: Node, index: int) -> Node | None:
        """The child of ``parent`` at ``index`` of the level below."""
        node = self.nodes[parent.level - 1].get(index)
        if node is not None:
            return node
        at = (index & FIELDS_MASK) * 2
        vbn = parent.q[at]
        if vbn <= ZERO_POINTER:
            return ZEROS if vbn else HOLES
        tail = parent.q[at + 1]
        return self._load_now(parent.level - 1, index, vbn, tail & 0xFFFFFFFF, tail >> 32)

    def _load_now(self, level: int, index: int, vbn: int, crc: int, birth: int) -> Node | None:
        buf = bytearray(BLOCK_BYTES)
        if not self.state.device.try_readv((buf,), vbn * BLOCK_BYTES):
            self.state.missing = partial(self._bring, level, index, vbn, crc, birth)
            return None
        return self._take_in(level, index, buf, vbn, crc, birth)

    def _take_in(
        self, level: int, index: int, buf: bytearray, vbn: int, crc: int, birth: int
    ) -> Node:
        if crc32c(buf) != crc:
            self.state.on_event("block.damaged", tree=self.label, level=level, index=index, vbn=vbn)
            raise BlockDamaged(
                f"{self.label}: the level-{level} pointer block {index} at VBN {vbn} is damaged"
                " (its CRC32C differs)"
            )
        node = Node(self, level, index, buf, vbn, birth)
        self.nodes[level][index] = node
        self.state.cache.add(node)
        return node

    async def load(self, index: int, level: int = 1) -> Node:
        """The node, or HOLES or ZEROS; waits for the device where it must. Raises BlockDamaged,
        DeviceFailed.

        It is that of now: after the next wait it may have been evicted, and another one may be
        listed in its place.
        """
        return await when_possible(self.state, partial(self.peek, index, level))

    async def _bring(
        self, level: int, index: int, vbn: int, crc: int, birth: int, hold: Hold
    ) -> None:
        """Load one block, that the field above it named just now, and hold it; one load at a time
        for each.
        """
        key = (level, index)
        waiting = self._loading.get(key)
        if waiting is not None:
            await asyncio.shield(waiting)
            return
        gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loading[key] = gate
        epoch = self.state.begin_read()
        buf = bytearray(BLOCK_BYTES)
        try:
            await self.state.device.readv((buf,), vbn * BLOCK_BYTES)
            # The field may have changed meanwhile, or be no longer in memory: then this may be a
            # block of the past. The caller looks again.
            if index not in self.nodes[level] and self._named(level, index) == vbn:
                hold.keep(self._take_in(level, index, buf, vbn, crc, birth))
        finally:
            self.state.end_read(epoch)
            del self._loading[key]
            gate.set_result(None)

    async def _root_written(self, hold: Hold) -> None:
        """Wait for the consistency point that makes this snapshot."""
        self.state.check_writable()  # if that failed, this snapshot was never made
        await asyncio.sleep(UNWRITTEN_POLL_SECONDS)

    def _named(self, level: int, index: int) -> int:
        """The VBN that the field above a block names, or HOLE where that field is not in memory."""
        if level == self.levels:
            return self.root_vbn
        parent = self.nodes[level + 1].get(index >> FIELDS_SHIFT)
        return HOLE if parent is None else parent.q[(index & FIELDS_MASK) * 2]

    # --- Changing ---------------------------------------------------------------------------------

    def writable(self, index: int, epoch: Epoch, level: int = 1) -> Node | None:
        """The node, made (from the field above) if it did not exist, and free to be changed in
        ``epoch``. None: nothing was changed, and ``state.missing`` says what to wait for. Raises
        BlockDamaged.
        """
        node = self.nodes[level].get(index)
        if node is not None and node.epoch is epoch:
            node.referenced = True
            return node
        plan = Plan(epoch)
        if not self.plan(plan, index, level) or not self.at_hand(plan):
            return None
        self.carry_out(plan)
        return self.nodes[level][index]

    def plan(self, plan: Plan, index: int, level: int = 1) -> bool:
        """Add to the plan what makes this node writable. False: something has to be waited for.
        Raises BlockDamaged.
        """
        parent: Node | None = None
        for at in range(self.levels, level - 1, -1):
            here = index >> FIELDS_SHIFT * (at - level)
            node = plan.steps.get((at, here))
            if node is None:
                if parent is None:
                    node = self._enter_root()
                else:
                    node = self._enter(parent, here) if parent.tree is not None else parent
                if node is None or (
                    node.epoch is not plan.epoch and not self._plan_step(plan, node, at, here)
                ):
                    return False
            parent = node
        return True

    def _plan_step(self, plan: Plan, node: Node, level: int, index: int) -> bool:
        """One node that needs a new location. False: its share count has to be waited for."""
        if node.tree is None:
            plan.grows = True
        elif node.birth <= self.shared_cp:
            count = self.state.share_map.try_count(node.vbn)
            if count is None:
                return False
            plan.grows |= count > 0
        plan.steps[level, index] = node
        return True

    def at_hand(self, plan: Plan) -> bool:
        """Whether there are VBNs for the whole plan, and for the table entry that changes with it.
        False: they have to be waited for.
        """
        blocks = len(plan.steps)
        if not blocks:
            return True
        allocator = self.state.allocator
        entry = self.image is not None and self.image.epoch is not plan.epoch
        return allocator.nodes_at_hand(
            blocks, allocator.floor(plan.epoch, plan.grows and not self._for_reclaim()), entry
        )

    def carry_out(self, plan: Plan) -> None:
        """Give every node of the plan its new location. Everything it needs is at hand, so nothing
        here loads, waits or fails.
        """
        if not plan.steps:
            return
        if self.image is not None:
            self.image.touch()  # before the change: a frozen table entry must keep the old root
        for (level, index), node in plan.steps.items():
            parent = self.nodes[level + 1][index >> FIELDS_SHIFT] if level < self.levels else None
            if node.tree is None:
                self._create(node, level, index, plan.epoch, parent)
            else:
                self._make_dirty(node, parent, plan.epoch)

    def _create(
        self, filler: Node, level: int, index: int, epoch: Epoch, parent: Node | None
    ) -> None:
        """A pointer block where a hole or a zero pointer was: its fields all say what the one above
        them said.
        """
        fill = ZERO_POINTER if filler is ZEROS and level else HOLE
        node = Node(
            self,
            level,
            index,
            filled_buffer(fill),
            self.state.allocator.take_node(epoch),
            epoch.number,
        )
        node.epoch = epoch
        self.nodes[level][index] = node
        self._point_at(node, parent)
        epoch.dirty[node] = None
        self.state.cache.add(node)

    def _make_dirty(self, node: Node, parent: Node | None, epoch: Epoch) -> None:
        """Give ``node`` a new location in ``epoch`` and let go of the old one."""
        assert self.nodes[node.level].get(node.index) is node, (
            "a node that is not listed would be changed for nothing"
        )
        # Not as planned: a parent that was copied just now has given it one more reference.
        shared = node.birth <= self.shared_cp and self.state.share_map.try_count(node.vbn)
        assert shared is not None, "the plan has looked at it"
        if shared:
            self._unshare(node, epoch)
        else:
            epoch.freed.append(node.vbn)
        if node.epoch is not None:
            old_vbn, old_birth = node.vbn, node.birth
            node.epoch.saved[node] = (node.replace_buffer(), old_vbn, old_birth)
        node.vbn, node.birth, node.epoch = (
            self.state.allocator.take_node(epoch),
            epoch.number,
            epoch,
        )
        node.referenced = True
        epoch.dirty[node] = None
        self._point_at(node, parent)

    def _unshare(self, node: Node, epoch: Epoch) -> None:
        """The shared block loses this tree's reference; its children gain one each,
        from the copy.
        """
        epoch.count_pointer(node.vbn, -1)
        vbns = node.vbns()
        children = vbns[vbns > ZERO_POINTER]
        if node.level == 1:
            epoch.added.append(children)
        else:
            for child in children.tolist():
                epoch.count_pointer(child, 1)

    def _point_at(self, node: Node, parent: Node | None) -> None:
        """Enter a node's new location in the field above it; the consistency point will add the
        CRC32C.
        """
        if parent is None:
            self.root_vbn, self.root_crc, self.root_birth = node.vbn, 0, node.birth
            return
        at = (node.index & FIELDS_MASK) * 2
        parent.q[at] = node.vbn
        parent.q[at + 1] = node.birth << 32

    def _for_reclaim(self) -> bool:
        """Whether this is what is left of a deleted image: taking that apart must go on where
        clients have to wait.
        """
        return self.image is not None and self.image.kind == KIND_DELETED

    async def make_writable(self, index: int, level: int = 1) -> Node:
        """``writable`` in the current epoch, waiting where it must; the caller changes the node in
        the same step.

        Raises BlockDamaged, DeviceFailed, PoolFull.
        """
        return await when_possible(
            self.state, lambda: self.writable(index, self.state.epoch, level)
        )

    def grow(self, levels: int, epoch: Epoch) -> bool | None:
        """Put new root blocks on top until the tree has ``levels`` levels. None: nothing was
        changed, it has to be waited for.
        """
        more = levels - self.levels
        if more <= 0:
            return True
        image, allocator = self.image, self.state.allocator
        entry = image is not None and image.epoch is not epoch
        if self.root_vbn != HOLE and not allocator.nodes_at_hand(
            more, allocator.floor(epoch, grows=True), entry
        ):
            return None
        if image is not None:
            image.touch()
        if self.root_vbn == HOLE:
            self.levels = levels
        for _ in range(levels - self.levels):
            root = Node(
                self,
                self.levels + 1,
                0,
                filled_buffer(HOLE),
                allocator.take_node(epoch),
                epoch.number,
            )
            root.q[0] = self.root_vbn
            root.q[1] = self.root_crc | self.root_birth << 32
            root.epoch = epoch
            epoch.dirty[root] = None
            self.levels += 1
            self.nodes[self.levels][0] = root
            self._point_at(root, None)
            self.state.cache.add(root)
        return True

    def forget(self, node: Node, epoch: Epoch) -> None:
        """Take out of memory a node whose block this tree no longer refers to (the caller settled
        the reference).
        """
        if self.nodes[node.level].get(node.index) is node:
            del self.nodes[node.level][node.index]
        if node.epoch is epoch:
            epoch.dirty.pop(node, None)
