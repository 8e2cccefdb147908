"""Nodes: 4096-byte blocks of a buffer tree held in memory, and the cache that bounds how many.

A node is *clean* (``epoch`` is CLEAN: the device holds the same bytes at ``vbn``), *dirty*
(``epoch`` is the number of the current epoch) or *frozen* (that of the one that the running
consistency point writes; a change copies the bytes first). Level 0 nodes are blocks of metafiles;
data blocks of vdisks are never nodes.

When a node may go (all of it is needed; each has cost an acknowledged write when it was missing):
- Only clean nodes are evicted, and only in a turn of the event loop of its own. So no step, however
  much it loads, loses a node that it has found: what a lookup returned stays listed until the
  next await.
- Over an await a node stays only if a ``Hold`` keeps it. An operation that waits without one looks
  it up again before it changes it.
"""

import asyncio
from collections import deque
from types import TracebackType
from typing import Final, Protocol, Self

import numpy as np
import numpy.typing as npt

from storage.fields import FIELD_DTYPE
from storage.layout import BLOCK_BYTES, FIELDS_PER_BLOCK, ZERO_POINTER

# What a node costs beside its 4096 bytes: the object, its memoryview, its place in two dicts and a
# queue (measured: 0.5 KiB).
NODE_OVERHEAD_BYTES = 512
NODE_BYTES = BLOCK_BYTES + NODE_OVERHEAD_BYTES
# Fewer than this many nodes would thrash on a single deep tree's path.
CACHE_NODES_MIN = 256
# For each node that comes in above the limit so many of the oldest are looked at. More than one may
# go, so that a cache that grew while all was dirty comes back to its limit.
LOOKS_A_NODE = 8
# At about 0.1 us each, this many take a small part of a turn.
LOOKS_A_TURN = 512

# ``Node.epoch`` of a node that is on the device as it is in memory: no epoch has that number.
CLEAN: Final = 0


class ListsNodes(Protocol):
    """The tree of a node (storage.tree.buffer_tree)."""

    @property
    def nodes(self) -> "list[dict[int, Node]]":
        """Its nodes in memory, by level and index. For modules of this room."""

    def enter_crc(self, level: int, index: int, vbn: int, crc: int) -> None:
        """A block was written to ``vbn``: enter its CRC32C in the field that names it now."""


class Node:
    """One block of a buffer tree in memory. ``q`` is the block as 512 u64 (storage.fields).
    ``tree`` is None of HOLES and ZEROS alone.
    """

    __slots__ = (
        "birth",
        "buf",
        "epoch",
        "holds",
        "index",
        "level",
        "q",
        "referenced",
        "tree",
        "vbn",
    )

    def __init__(
        self,
        tree: ListsNodes | None,
        level: int,
        index: int,
        buf: bytearray,
        vbn: int,
        birth: int,
    ) -> None:
        self.tree = tree
        self.level = level
        self.index = index
        self.buf = buf
        self.q = memoryview(buf).cast("Q")
        self.vbn = vbn
        self.birth = birth
        # The epoch in which it was changed last, as far as no consistency point has written it.
        self.epoch: int = CLEAN
        self.referenced = True
        # How many waiting operations need it to stay in memory.
        self.holds = 0

    def fields(self) -> npt.NDArray[np.void]:
        """The 256 fields as a structured array (vbn, crc, birth) over the node's own bytes."""
        return np.frombuffer(self.buf, dtype=FIELD_DTYPE)

    def vbns(self) -> npt.NDArray[np.uint64]:
        """The VBNs of the 256 fields, a strided view of the node's own bytes."""
        return np.frombuffer(self.buf, dtype="<u8")[::2]

    def replace_buffer(self) -> bytearray:
        """Give the node a copy of its bytes and return the old ones, which stay as they are."""
        old = self.buf
        self.buf = bytearray(old)
        self.q = memoryview(self.buf).cast("Q")
        return old


def filled_buffer(vbn: int) -> bytearray:
    """A pointer block whose 256 fields all hold ``vbn`` (HOLE or ZERO_POINTER), with no CRC and no
    birth.
    """
    if vbn == 0:
        return bytearray(BLOCK_BYTES)
    fields = np.zeros(FIELDS_PER_BLOCK, dtype=FIELD_DTYPE)
    fields["vbn"] = vbn
    return bytearray(fields.tobytes())


# What a lookup answers for a level-1 block that does not exist, because a field above it is a hole
# or a zero pointer.
HOLES = Node(None, 1, 0, filled_buffer(0), 0, 0)
ZEROS = Node(None, 1, 0, filled_buffer(ZERO_POINTER), 0, 0)


class Hold:
    """Keeps nodes in memory that a waiting operation needs together, until it has taken its step
    (``with cache.hold() as hold``).
    """

    __slots__ = ("_cache", "_nodes")

    def __init__(self, cache: "NodeCache") -> None:
        self._cache = cache
        self._nodes: list[Node] = []

    def keep(self, node: Node) -> None:
        """Keep this one, too. HOLES and ZEROS are always there."""
        if node.tree is not None:
            node.holds += 1
            self._cache.held += 1
            self._nodes.append(node)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for node in self._nodes:
            node.holds -= 1
        self._cache.held -= len(self._nodes)
        self._nodes.clear()


class NodeCache:
    """Keeps about ``size_bytes`` of nodes, by second chance: what was used since the last sweep
    stays, dirty and held nodes always do.

    One step may take it above the limit by what it loads; the next turn of the event loop brings it
    back. ``held`` counts what Holds keep.
    """

    __slots__ = ("_evicting", "_looks_due", "_queue", "held", "nodes_max")

    def __init__(self, size_bytes: int) -> None:
        self.nodes_max = max(CACHE_NODES_MIN, size_bytes // NODE_BYTES)
        self.held = 0
        self._queue: deque[Node] = deque()
        self._evicting = False
        self._looks_due = 0

    def __len__(self) -> int:
        return len(self._queue)

    def hold(self) -> Hold:
        """What keeps nodes from being evicted while an operation waits."""
        return Hold(self)

    def add(self, node: Node) -> None:
        """Take in a node that its tree has just listed. Evicts nothing within this step."""
        self._queue.append(node)
        if len(self._queue) > self.nodes_max:
            self._evict_soon(LOOKS_A_NODE)

    def trim(self) -> None:
        """Many nodes have become clean: what is above the limit may go now."""
        if len(self._queue) > self.nodes_max:
            self._evict_soon(2 * len(self._queue))

    def _evict_soon(self, looks: int) -> None:
        self._looks_due += looks
        if not self._evicting:
            self._evicting = True
            asyncio.get_running_loop().call_soon(self._evict)

    def _evict(self) -> None:
        """Look at some of the oldest nodes: bounded work a turn, and no more in all than was asked
        for, so that a cache full of dirty nodes costs no stall.
        """
        queue = self._queue
        looks = min(self._looks_due, LOOKS_A_TURN)
        self._looks_due -= looks
        while looks and len(queue) > self.nodes_max:
            looks -= 1
            node = queue.popleft()
            tree = node.tree
            if tree is None or tree.nodes[node.level].get(node.index) is not node:
                continue  # cut off from its tree meanwhile
            if node.referenced or node.epoch != CLEAN or node.holds:
                node.referenced = False
                queue.append(node)
                continue
            del tree.nodes[node.level][node.index]
        if self._looks_due and len(queue) > self.nodes_max:
            asyncio.get_running_loop().call_soon(self._evict)
        else:
            self._evicting, self._looks_due = False, 0
