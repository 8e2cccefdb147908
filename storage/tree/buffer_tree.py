"""A buffer tree: the pointer blocks over a vdisk, a snapshot or a metafile.

Looking up is synchronous while the page cache has the blocks; a None answer means that the device would block, and the caller
goes on with the asynchronous twin. Changing follows one rule: before a node changes for the first time in an epoch it gets a new
VBN (so the location that the last consistency point knows is never overwritten), and so does every node above it, from the root
down. Because the VBN is known at once, a parent's field always names its child's newest location; only the CRC32C in it is
filled in by the consistency point.

Lazy sharing (design section 4): a node whose block another tree also refers to gives its children one more reference each when it
is copied, and takes one from the shared block. A block born after ``shared_cp`` cannot be shared, and costs no look-up.
"""

import asyncio
from typing import TYPE_CHECKING

from crc32c import crc32c

from storage.consistency.epoch import Epoch
from storage.errors import BlockDamaged
from storage.layout import BLOCK_BYTES, FIELDS_MASK, FIELDS_SHIFT, HOLE, KIND_DELETED, TREE_LEVELS_MAX, ZERO_POINTER
from storage.tree.node import HOLES, ZEROS, Node, filled_buffer

if TYPE_CHECKING:
    from storage.images.image import Image
    from storage.state import PoolState


# How often a reader of a snapshot that is just being made looks whether it is there. Rare, and over within one consistency point.
UNWRITTEN_POLL_SECONDS = 0.001


class BufferTree:
    """``nodes[level][index]`` lists the nodes in memory; the root field (``root_vbn``, ``root_crc``, ``root_birth``) names the top one."""

    __slots__ = ("_loading", "image", "label", "levels", "nodes", "root_birth", "root_crc", "root_vbn", "shared_cp", "state")

    def __init__(
        self, state: "PoolState", label: str, levels: int, root: tuple[int, int, int], shared_cp: int, image: "Image | None"
    ) -> None:
        self.state = state
        self.label = label
        self.levels = levels
        self.root_vbn, self.root_crc, self.root_birth = root
        self.shared_cp = shared_cp
        self.image = image
        self.nodes: list[dict[int, Node]] = [{} for _ in range(TREE_LEVELS_MAX + 1)]
        self._loading: dict[tuple[int, int], asyncio.Future[None]] = {}

    # --- Looking up --------------------------------------------------------------------------------------------

    def peek(self, index: int, level: int = 1) -> Node | None:
        """The node, or HOLES or ZEROS where a field above it says so, or None when the device would block."""
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
            return None
        return self._load_now(self.levels, 0, self.root_vbn, self.root_crc, self.root_birth)

    def _root_unwritten(self) -> bool:
        """Whether this is a snapshot that is just being made: the consistency point under way will write its root, and say its CRC32C."""
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
            return None
        return self._take_in(level, index, buf, vbn, crc, birth)

    def _take_in(self, level: int, index: int, buf: bytearray, vbn: int, crc: int, birth: int) -> Node:
        if crc32c(buf) != crc:
            self.state.on_event("block.damaged", tree=self.label, level=level, index=index, vbn=vbn)
            raise BlockDamaged(f"{self.label}: the level-{level} pointer block {index} at VBN {vbn} is damaged (its CRC32C differs)")
        node = Node(self, level, index, buf, vbn, birth)
        self.nodes[level][index] = node
        self.state.cache.add(node)
        return node

    async def load(self, index: int, level: int = 1) -> Node:
        """The node, or HOLES or ZEROS; waits for the device where it must. Raises BlockDamaged, DeviceFailed."""
        while True:
            node = self.peek(index, level)
            if node is not None:
                return node
            if self._root_unwritten() and 0 not in self.nodes[self.levels]:
                self.state.check_writable()  # if its consistency point failed, this snapshot was never made
                await asyncio.sleep(UNWRITTEN_POLL_SECONDS)
            else:
                await self._load_missing(index, level)

    async def _load_missing(self, index: int, level: int) -> None:
        """Load the highest node on the path that is not in memory; one load at a time for each."""
        at, vbn, crc, birth = self._missing(index, level)
        here = index >> FIELDS_SHIFT * (at - level)
        key = (at, here)
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
            # The field may have changed meanwhile: then this is a block of the past, and the caller looks again.
            if here not in self.nodes[at] and self._missing(index, level)[:2] == (at, vbn):
                self._take_in(at, here, buf, vbn, crc, birth)
        finally:
            self.state.end_read(epoch)
            del self._loading[key]
            gate.set_result(None)

    def _missing(self, index: int, level: int) -> tuple[int, int, int, int]:
        """Level, VBN, CRC32C and birth of the highest block on the path that is not in memory; level 0 and VBN 0 when none is missing."""
        root = self.nodes[self.levels].get(0)
        if root is None:
            return self.levels, self.root_vbn, self.root_crc, self.root_birth
        node = root
        while node.level > level:
            here = index >> FIELDS_SHIFT * (node.level - 1 - level)
            at = (here & FIELDS_MASK) * 2
            vbn, tail = node.q[at], node.q[at + 1]
            child = self.nodes[node.level - 1].get(here)
            if child is None:
                return node.level - 1, vbn, tail & 0xFFFFFFFF, tail >> 32
            node = child
        return 0, HOLE, 0, 0

    # --- Changing ----------------------------------------------------------------------------------------------

    def writable(self, index: int, epoch: Epoch, level: int = 1) -> Node | None:
        """The node, made (from the field above) if it did not exist, and free to be changed in ``epoch``.

        None: something on the way has to be waited for; call ``prepare`` and try again. Stopping half-way does no harm: a dirty node
        that nothing changed is only written once more.
        """
        node = self.nodes[level].get(index)
        if node is not None and node.epoch is epoch:
            node.referenced = True
            return node
        return self._make_writable(index, epoch, level)

    def _make_writable(self, index: int, epoch: Epoch, level: int) -> Node | None:
        parent: Node | None = None
        node: Node | None = None
        for at in range(self.levels, level - 1, -1):
            here = index >> FIELDS_SHIFT * (at - level)
            node = self._enter_root() if parent is None else self._enter(parent, here)
            if node is None:
                return None
            if node.epoch is epoch:
                parent = node
                continue
            if node.tree is None:
                node = self._create(node, at, here, epoch, parent)
            elif not self._make_dirty(node, parent, epoch):
                return None
            if node is None:
                return None
            parent = node
        return node

    def _create(self, filler: Node, level: int, index: int, epoch: Epoch, parent: Node | None) -> Node | None:
        """A pointer block where a hole or a zero pointer was: its fields all say what the one above them said."""
        vbn = self.state.allocator.take_node(epoch, self._for_reclaim())
        if not vbn:
            return None
        fill = ZERO_POINTER if filler is ZEROS and level else HOLE
        node = Node(self, level, index, filled_buffer(fill), vbn, epoch.number)
        node.epoch = epoch
        self.nodes[level][index] = node
        self._point_at(node, parent)
        epoch.dirty[node] = None
        self.state.cache.add(node)
        return node

    def _make_dirty(self, node: Node, parent: Node | None, epoch: Epoch) -> bool:
        """Give ``node`` a new location in ``epoch`` and let go of the old one."""
        extra_references = 0
        if node.birth <= self.shared_cp:
            count = self.state.share_map.try_count(node.vbn)
            if count is None:
                return False
            extra_references = count
        vbn = self.state.allocator.take_node(epoch, self._for_reclaim())
        if not vbn:
            return False
        if extra_references:
            self._unshare(node, epoch)
        else:
            epoch.freed.append(node.vbn)
        if node.epoch is not None:
            old_vbn, old_birth = node.vbn, node.birth
            node.epoch.saved[node] = (node.replace_buffer(), old_vbn, old_birth)
        node.vbn, node.birth, node.epoch = vbn, epoch.number, epoch
        epoch.dirty[node] = None
        self._point_at(node, parent)
        return True

    def _unshare(self, node: Node, epoch: Epoch) -> None:
        """The shared block loses this tree's reference; its children gain one each, from the copy."""
        epoch.count_pointer(node.vbn, -1)
        vbns = node.vbns()
        children = vbns[vbns > ZERO_POINTER]
        if node.level == 1:
            epoch.added.append(children)
        else:
            for child in children.tolist():
                epoch.count_pointer(child, 1)

    def _point_at(self, node: Node, parent: Node | None) -> None:
        """Enter a node's new location in the field above it; the consistency point will add the CRC32C."""
        if parent is None:
            if self.image is not None:
                self.image.touch()  # before the change: a frozen table entry must keep the old root
            self.root_vbn, self.root_crc, self.root_birth = node.vbn, 0, node.birth
            return
        at = (node.index & FIELDS_MASK) * 2
        parent.q[at] = node.vbn
        parent.q[at + 1] = node.birth << 32

    async def prepare(self, index: int, epoch: Epoch, level: int = 1) -> None:
        """Load what ``writable`` found missing: the path, the share counts of its old blocks, room in the allocator.

        Raises BlockDamaged, DeviceFailed, PoolFull.
        """
        for at in range(self.levels, level - 1, -1):
            # Each level for itself: a block may be in memory while the one above it was evicted.
            here = index >> FIELDS_SHIFT * (at - level)
            await self.load(here, at)
            node = self.nodes[at].get(here)
            if node is not None and node.birth <= self.shared_cp:
                await self.state.share_map.load(node.vbn)
        await self.state.allocator.prepare_nodes(epoch, self._for_reclaim())

    def _for_reclaim(self) -> bool:
        """Whether this is what is left of a deleted image: taking that apart must go on where clients have to wait."""
        return self.image is not None and self.image.kind == KIND_DELETED

    async def make_writable(self, index: int, level: int = 1) -> Node:
        """``writable`` in the current epoch, waiting where it must."""
        while True:
            epoch = self.state.epoch
            node = self.writable(index, epoch, level)
            if node is not None:
                return node
            await self.prepare(index, epoch, level)

    def grow(self, levels: int, epoch: Epoch) -> bool:
        """Put new root blocks on top until the tree has ``levels`` levels. False: call ``state.allocator.prepare_nodes`` and try again."""
        while self.levels < levels:
            if self.root_vbn == HOLE:
                if self.image is not None:
                    self.image.touch()
                self.levels = levels
                break
            vbn = self.state.allocator.take_node(epoch)
            if not vbn:
                return False
            root = Node(self, self.levels + 1, 0, filled_buffer(HOLE), vbn, epoch.number)
            root.q[0] = self.root_vbn
            root.q[1] = self.root_crc | self.root_birth << 32
            root.epoch = epoch
            epoch.dirty[root] = None
            if self.image is not None:
                self.image.touch()
            self.levels += 1
            self.nodes[self.levels][0] = root
            self._point_at(root, None)
            self.state.cache.add(root)
        return True

    def forget(self, node: Node, epoch: Epoch) -> None:
        """Take out of memory a node whose block this tree no longer refers to (the caller settled the reference)."""
        if self.nodes[node.level].get(node.index) is node:
            del self.nodes[node.level][node.index]
        if node.epoch is epoch:
            epoch.dirty.pop(node, None)
