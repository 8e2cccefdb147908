"""Nodes: 4096-byte blocks of a buffer tree held in memory, and the cache that bounds how many.

A node is *clean* (``epoch`` is None: the device holds the same bytes at ``vbn``), *dirty* (``epoch`` is the current epoch) or
*frozen* (``epoch`` is the one that the running consistency point writes; a change copies the bytes first). Only clean nodes
are evicted. Level 0 nodes are blocks of metafiles; data blocks of vdisks are never nodes.
"""

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from storage.layout import BLOCK_BYTES, FIELDS_PER_BLOCK, ZERO_POINTER

if TYPE_CHECKING:
    from storage.consistency.epoch import Epoch
    from storage.tree.buffer_tree import BufferTree

FIELD_DTYPE = np.dtype([("vbn", "<u8"), ("crc", "<u4"), ("birth", "<u4")])

# What a node costs beside its 4096 bytes: the object, its memoryview, its place in two dicts and a queue (measured: 0.5 KiB).
NODE_OVERHEAD_BYTES = 512
NODE_BYTES = BLOCK_BYTES + NODE_OVERHEAD_BYTES
# Fewer than this many nodes would thrash on a single deep tree's path.
CACHE_NODES_MIN = 256


class Node:
    """One block of a buffer tree in memory. ``q`` is the block as 512 u64: VBN of field i at 2i, CRC32C and birth at 2i+1."""

    __slots__ = ("birth", "buf", "epoch", "index", "level", "q", "referenced", "tree", "vbn")

    def __init__(self, tree: "BufferTree | None", level: int, index: int, buf: bytearray, vbn: int, birth: int) -> None:
        self.tree = tree
        self.level = level
        self.index = index
        self.buf = buf
        self.q = memoryview(buf).cast("Q")
        self.vbn = vbn
        self.birth = birth
        self.epoch: Epoch | None = None
        self.referenced = True

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
    """A pointer block whose 256 fields all hold ``vbn`` (HOLE or ZERO_POINTER), with no CRC and no birth."""
    if vbn == 0:
        return bytearray(BLOCK_BYTES)
    fields = np.zeros(FIELDS_PER_BLOCK, dtype=FIELD_DTYPE)
    fields["vbn"] = vbn
    return bytearray(fields.tobytes())


# What a lookup answers for a level-1 block that does not exist, because a field above it is a hole or a zero pointer.
HOLES = Node(None, 1, 0, filled_buffer(0), 0, 0)
ZEROS = Node(None, 1, 0, filled_buffer(ZERO_POINTER), 0, 0)


class NodeCache:
    """Keeps at most ``size_bytes`` of nodes, by second chance: what was used since the last sweep stays, dirty nodes always do."""

    __slots__ = ("_queue", "nodes_max")

    def __init__(self, size_bytes: int) -> None:
        self.nodes_max = max(CACHE_NODES_MIN, size_bytes // NODE_BYTES)
        self._queue: deque[Node] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, node: Node) -> None:
        """Take in a node that its tree has just listed, and evict others when over the limit."""
        self._queue.append(node)
        if len(self._queue) > self.nodes_max:
            self._evict()

    def _evict(self) -> None:
        """Look at a few of the oldest nodes: bounded work a call, so that a cache full of dirty nodes costs no stall.

        More than one may go, so that a cache that grew while all was dirty comes back to its limit.
        """
        queue = self._queue
        for _ in range(8):
            if len(queue) <= self.nodes_max:
                return
            node = queue.popleft()
            tree = node.tree
            if tree is None or tree.nodes[node.level].get(node.index) is not node:
                continue  # cut off from its tree meanwhile
            if node.referenced or node.epoch is not None:
                node.referenced = False
                queue.append(node)
                continue
            del tree.nodes[node.level][node.index]
