"""The configuration metafile: what the daemon keeps in the pool beside the disks (targets, access
control, reservations).

To the store it is named sections of bytes, replaced whole and durably with a consistency point. On
disk: u64 length, then a msgpack map from section name to bytes, in the metafile's blocks one after
the other (layout.CONFIGURATION_HEAD).
"""

from functools import partial

import msgpack

from storage.allocation.write_allocator import WriteAllocator
from storage.epoch.epoch import Epoch
from storage.errors import BlockDamaged, RequestError
from storage.layout import (
    BLOCK_BYTES,
    CONFIGURATION_BYTES_MAX,
    CONFIGURATION_HEAD,
    FIELDS_PER_BLOCK,
    TREE_LEVELS_MAX,
    tree_levels,
)
from storage.slicer import Slicer
from storage.state.pool_state import PoolState
from storage.tree.attempt import when_possible
from storage.tree.editor import TreeEditor


class Configuration:
    """Holds all sections in memory; they are small (CONFIGURATION_BYTES_MAX in all)."""

    __slots__ = ("_allocator", "_durable", "_editor", "_sections", "_state", "_tree", "size_blocks")

    def __init__(self, state: PoolState, editor: TreeEditor, allocator: WriteAllocator) -> None:
        self._state = state
        self._editor = editor
        self._allocator = allocator
        self._tree = editor.tree
        self._sections: dict[str, bytes] = {}
        # As of the last consistency point.
        self._durable: dict[str, bytes] = {}
        # Length of the metafile: it grows, and what a shorter configuration leaves behind is not
        # read.
        self.size_blocks = 0

    async def load(self) -> None:
        """Read it at open. Raises BlockDamaged, DeviceFailed."""
        head = (await self._tree.load(0, 0)).buf
        (length,) = CONFIGURATION_HEAD.unpack_from(head)
        if not length:
            return
        if length > CONFIGURATION_BYTES_MAX:
            raise BlockDamaged(
                f"the configuration metafile claims {length} bytes: run `cleaved check`"
            )
        data = bytearray()
        for index in range(-(-(CONFIGURATION_HEAD.size + length) // BLOCK_BYTES)):
            data += (await self._tree.load(index, 0)).buf
        self._sections = self._durable = msgpack.unpackb(
            memoryview(data)[CONFIGURATION_HEAD.size : CONFIGURATION_HEAD.size + length]
        )

    def get(self, section: str) -> bytes:
        """A section, empty if it was never set."""
        return self._sections.get(section, b"")

    def replace(self, section: str, value: bytes) -> None:
        """Within a freeze: set a section. Raises RequestError when it is too large, PoolFull when
        the pool has no room for it.
        """
        sections = {**self._sections, section: value}
        packed = msgpack.packb(sections)
        if len(packed) > CONFIGURATION_BYTES_MAX:
            raise RequestError(
                f"the configuration would have {len(packed)} bytes, above"
                f" {CONFIGURATION_BYTES_MAX}: remove entries first"
            )
        epoch, allocator = self._state.epoch, self._allocator
        dirty = epoch.dirty
        promised = dirty.configuration[1] if dirty.configuration is not None else 0
        more = max(0, blocks_needed(len(packed)) - promised)
        allocator.check_room(blocks=more)
        allocator.promise(more)
        dirty.configuration = CONFIGURATION_HEAD.pack(len(packed)) + packed, promised + more
        epoch.when_durable.append(partial(self._is_durable, sections))
        self._sections = sections

    def _is_durable(self, sections: dict[str, bytes]) -> None:
        self._durable = sections

    def revert(self) -> None:
        """A consistency point failed: show what the last durable one holds."""
        self._sections = self._durable

    async def write(self, epoch: Epoch, slicer: Slicer) -> None:
        """Within a consistency point: put what the epoch holds into the metafile."""
        if epoch.dirty.configuration is None:
            return
        data, promised = epoch.dirty.configuration
        epoch.dirty.configuration = None
        blocks = -(-len(data) // BLOCK_BYTES)
        self.size_blocks = max(self.size_blocks, blocks)
        levels = tree_levels(blocks)
        await when_possible(self._state, lambda: self._editor.grow(levels, epoch))
        for index in range(blocks):
            node = await when_possible(self._state, partial(self._editor.writable, index, epoch, 0))
            node.buf[:] = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES].ljust(
                BLOCK_BYTES, b"\0"
            )
            await slicer.breathe()
        self._allocator.redeem(promised)


def blocks_needed(length_bytes: int) -> int:
    """Blocks that a configuration of that length takes at most: its own, and the pointer blocks
    above them.
    """
    blocks = -(-(CONFIGURATION_HEAD.size + length_bytes) // BLOCK_BYTES)
    return blocks + blocks // FIELDS_PER_BLOCK + TREE_LEVELS_MAX
