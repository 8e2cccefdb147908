"""Writes the frozen nodes of an epoch, bottom-up, and fills in the CRC32C of each in the field that
points to it.

A node that was changed again after the freeze is written as it was then (``DirtySet.saved``). Its
parent's field exists twice in that case, in the frozen parent and in the live one; each gets the
CRC32C if it names this very location.
"""

import asyncio

from storage.checksum import crc32c
from storage.device import Device
from storage.epoch.dirty_set import DirtySet
from storage.epoch.epoch import Epoch
from storage.errors import DeviceFailed, DeviceFull
from storage.fields import set_crc
from storage.layout import BLOCK_BYTES, FIELDS_SHIFT, TREE_LEVELS_MAX
from storage.slicer import Slicer
from storage.state.host_room import HostRoom
from storage.tree.node import CLEAN, ListsNodes, Node

# One call to the device writes at most this many blocks: 1 MiB.
RUN_BLOCKS_MAX = 256
Place = tuple[ListsNodes, int, int]
# Neighbouring blocks, and where they go (byte offset).
Run = tuple[list[bytearray], int]


def frozen_state(dirty: DirtySet, node: Node) -> tuple[bytearray, int]:
    """Bytes and VBN of a node as of the freeze."""
    saved = dirty.saved.get(node)
    return (saved[0], saved[1]) if saved is not None else (node.buf, node.vbn)


class NodeWriter:
    """Writes the dirty nodes of an epoch, and empties their list. ``root_crcs`` then has the
    CRC32C of each root that was written, by VBN.
    """

    __slots__ = (
        "_device",
        "_dirty",
        "_host_room",
        "_number",
        "_slicer",
        "root_crcs",
    )

    def __init__(self, device: Device, host_room: HostRoom, epoch: Epoch, slicer: Slicer) -> None:
        self._device = device
        self._host_room = host_room
        self._dirty = epoch.dirty
        self._number = epoch.number
        self._slicer = slicer
        self.root_crcs: dict[int, int] = {}

    async def write_dirty(self) -> None:
        """Write all dirty nodes: the CRC32Cs level by level, bottom-up, then all blocks in the
        order of their VBNs. Raises DeviceFailed.

        Nodes of different levels are neighbours on the device, for a path to a leaf gets its VBNs
        one after the other.
        """
        nodes = self._dirty.nodes
        self._dirty.nodes = {}
        frozen: dict[Place, Node] = {}
        levels: list[list[Node]] = [[] for _ in range(TREE_LEVELS_MAX + 1)]
        for node in nodes:
            assert node.tree is not None
            frozen[node.tree, node.level, node.index] = node
            levels[node.level].append(node)
            await self._slicer.breathe()
        blocks: list[tuple[int, bytearray]] = []
        for level in levels:
            for node in level:
                buf, vbn = frozen_state(self._dirty, node)
                self._settle_crc(node, vbn, crc32c(buf), frozen)
                blocks.append((vbn, buf))
                await self._slicer.breathe()
        await self.write_blocks(blocks)
        for node in nodes:
            if node.epoch == self._number:
                node.epoch = CLEAN
            self._dirty.saved.pop(node, None)
            await self._slicer.breathe()

    def _settle_crc(self, node: Node, vbn: int, crc: int, frozen: dict[Place, Node]) -> None:
        tree = node.tree
        assert tree is not None
        above = node.level + 1
        index = node.index >> FIELDS_SHIFT
        frozen_parent = frozen.get((tree, above, index))
        if frozen_parent is not None:
            buf, _ = frozen_state(self._dirty, frozen_parent)
            set_crc(memoryview(buf).cast("Q"), node.index, vbn, crc)
        else:
            self.root_crcs[vbn] = crc
        tree.enter_crc(node.level, node.index, vbn, crc)

    async def write_blocks(self, blocks: list[tuple[int, bytearray]]) -> None:
        """Write (VBN, bytes) pairs, contiguous ones together. Raises DeviceFailed, PoolReadOnly,
        HostStaysFull.
        """
        blocks.sort(key=lambda block: block[0])
        refused: list[Run] = []
        pending: list[tuple[Run, asyncio.Future[None]]] = []
        failure: BaseException | None = None
        try:
            await self._submit(blocks, pending, refused)
        except DeviceFailed as error:
            # Those under way are waited for all the same; what failed first is what is told.
            failure = error
        outcomes = await asyncio.gather(*(future for _, future in pending), return_exceptions=True)
        for (run, _), outcome in zip(pending, outcomes, strict=True):
            if isinstance(outcome, DeviceFull):
                refused.append(run)
            else:
                failure = failure or outcome
        if failure is not None:
            raise failure
        for run in refused:  # not all at once: the host will have room for them one after the other
            await self._host_room.put(*run)

    async def _submit(
        self,
        blocks: list[tuple[int, bytearray]],
        pending: list[tuple[Run, asyncio.Future[None]]],
        refused: list[Run],
    ) -> None:
        """Begin to write them; ``refused`` are those for which the host has no room."""
        device = self._device
        start = 0
        for at in range(1, len(blocks) + 1):
            if (
                at < len(blocks)
                and blocks[at][0] == blocks[at - 1][0] + 1
                and at - start < RUN_BLOCKS_MAX
            ):
                continue
            run = [buf for _, buf in blocks[start:at]], blocks[start][0] * BLOCK_BYTES
            try:
                if not device.try_writev(*run, len(run[0]) * BLOCK_BYTES):
                    pending.append((run, device.writev(*run)))
            except DeviceFull:
                refused.append(run)
            start = at
            await self._slicer.breathe()
