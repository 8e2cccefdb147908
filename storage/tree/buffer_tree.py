"""A buffer tree: the pointer blocks over a vdisk, a snapshot or a metafile, in memory as far as
somebody looked them up.

Looking up is synchronous. A None answer means that the device would block: ``state.missing`` then
says what to wait for (storage.tree.attempt). How a tree is changed stands in storage.tree.editor.
"""

import asyncio
from functools import partial

from storage.checksum import crc32c
from storage.errors import BlockDamaged
from storage.fields import Field, field_at, set_crc, vbn_at
from storage.layout import BLOCK_BYTES, FIELDS_SHIFT, HOLE, TREE_LEVELS_MAX, ZERO_POINTER
from storage.tree.attempt import when_possible
from storage.tree.interfaces import PoolState
from storage.tree.node import HOLES, ZEROS, Hold, Node

# How often a reader of a snapshot that is just being made looks whether it is there. Rare, and over
# within one consistency point.
UNWRITTEN_POLL_SECONDS = 0.001


class BufferTree:
    """The root field (``root_vbn``, ``root_crc``, ``root_birth``) names the top block.

    ``nodes[level][index]`` lists the nodes in memory; only modules of this room use it.
    ``leaves`` are those of level 1, which the paths of single reads and writes look at first.
    """

    __slots__ = (
        "_loading",
        "label",
        "leaves",
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
        state: PoolState,
        label: str,
        levels: int,
        root: Field,
        shared_cp: int,
    ) -> None:
        self.state = state
        self.label = label
        self.levels = levels
        self.root_vbn, self.root_crc, self.root_birth = root
        # Blocks as old as this or older may be shared with another tree.
        self.shared_cp = shared_cp
        self.nodes: list[dict[int, Node]] = [{} for _ in range(TREE_LEVELS_MAX + 1)]
        self.leaves = self.nodes[1]
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
            node = self.enter_root()
        while node is not None and node.tree is not None and node.level > level:
            node = self.enter(node, index >> FIELDS_SHIFT * (node.level - 1 - level))
        return node

    def enter_root(self) -> Node | None:
        """The top node; like ``peek``."""
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

    def enter(self, parent: Node, index: int) -> Node | None:
        """The child of ``parent`` at ``index`` of the level below; like ``peek``."""
        node = self.nodes[parent.level - 1].get(index)
        if node is not None:
            return node
        field = field_at(parent.q, index)
        vbn = field[0]
        if vbn <= ZERO_POINTER:
            return ZEROS if vbn else HOLES
        return self._load_now(parent.level - 1, index, *field)

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

        It is the current node: after the next wait it may have been evicted, and another one may be
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
        return HOLE if parent is None else vbn_at(parent.q, index)

    # --- After writing ----------------------------------------------------------------------------

    def enter_crc(self, level: int, index: int, vbn: int, crc: int) -> None:
        """A block was written to ``vbn``: enter its CRC32C in the field that names it, if that is
        in memory and names that location still.
        """
        above = level + 1
        if above <= TREE_LEVELS_MAX:
            parent = self.nodes[above].get(index >> FIELDS_SHIFT)
            if parent is not None:
                set_crc(parent.q, index, vbn, crc)
        if self.root_vbn == vbn:
            self.root_crc = crc
