"""Scrub: reads every block that is in use and compares its CRC32C, in the background, at a bounded
rate, and names what is damaged.

It goes image by image, level-1 block by level-1 block, and through the metafiles. Each message pins
what it reads (``begin_read``), so that nothing is reused under it, and nothing stays pinned between
messages. A block that several images share is read once, and is named for each of them if it is
damaged. What is written while the scrub runs may or may not be among what it reads.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from storage.checksum import crc32c
from storage.data.read_path import Location, runs
from storage.device import read_all
from storage.errors import BlockDamaged, StorageError
from storage.images.catalogue import Catalogue
from storage.layout import BLOCK_BYTES, FIELDS_SHIFT, ZERO_POINTER
from storage.state.pool_state import PoolState
from storage.tree.buffer_tree import BufferTree
from storage.tree.node import CLEAN, Node

# A disk has bandwidth to spare for this, and a pool of 1 TiB is through in five hours.
RATE_BYTES_DEFAULT = 64 << 20
# A device that is gone as a whole is damaged in millions of places; a person reads the first ones,
# and the count tells the rest.
DAMAGES_MAX = 1000
BIT = np.left_shift(np.uint8(1), np.arange(8, dtype=np.uint8))


class Scrub:
    """One scrub (a ``backdoor.handler.Work``). ``status`` is running, done, failed or cancelled;
    ``damages`` are dicts of where, offset_bytes, vbn and what.
    """

    rate_min_bytes = 0

    def __init__(
        self,
        state: PoolState,
        catalogue: Catalogue,
        metafiles: list[BufferTree],
        size_blocks: int,
        used_blocks: int,
        rate_max_bytes: int,
    ) -> None:
        self.rate_max_bytes = rate_max_bytes
        self.blocks_total = used_blocks
        self.blocks_verified = 0
        self.status = "running"
        self.damages: list[dict[str, Any]] = []
        self.damages_total = 0
        self._state = state
        self._catalogue = catalogue
        self._verified = np.zeros(-(-size_blocks // 8), dtype=np.uint8)
        self._damaged: set[int] = set()
        self._trees = self._all_trees(metafiles)
        self._tree: tuple[str, BufferTree, bool] | None = None
        self._next_index = 0

    def _all_trees(self, metafiles: list[BufferTree]) -> Iterator[tuple[str, BufferTree, bool]]:
        """(name, tree, whether it is a metafile) of all that there is; images that are gone when
        their turn comes are left out.
        """
        for tree in metafiles:
            yield tree.label, tree, True
        for number in [
            *self._catalogue.vdisks.values(),
            *(one for names in self._catalogue.snapshots.values() for one in names.values()),
        ]:
            image = self._catalogue.find(number)
            if image is not None and image.name:
                yield self._catalogue.full_name(image), image.tree, False

    def as_dict(self) -> dict[str, Any]:
        """State, progress and findings."""
        percent = (
            100.0
            if self.status == "done" or not self.blocks_total
            else min(99.9, 100.0 * self.blocks_verified / self.blocks_total)
        )
        return {
            "state": self.status,
            "percent": round(percent, 1),
            "bytes_verified": self.blocks_verified * BLOCK_BYTES,
            "bytes_total": self.blocks_total * BLOCK_BYTES,
            "rate_max_bytes": self.rate_max_bytes,
            "damages": self.damages,
            "damages_total": self.damages_total,
        }

    # --- Messages ---------------------------------------------------------------------------------

    async def message(self, idle: bool) -> int | None:
        """Verify what one level-1 block points to, and that block. Returns the bytes read, or None
        at the end.
        """
        if self.status != "running":
            return None
        if self._tree is None:
            self._tree, self._next_index = next(self._trees, None), 0
            if self._tree is None:
                self._end()
                return None
        where, tree, metafile = self._tree
        node = await self._find(where, tree, tree.levels, 0)
        if metafile and self._state.frozen is not None:
            # A consistency point is changing it: some of its blocks are not on the device yet. From
            # here on nothing waits.
            return 0
        if node is None:
            self._tree = None
            return 0
        self._next_index = node.index + 1
        return await self._verify(where, tree, node)

    def cancel(self) -> None:
        """Read nothing more; what was found so far stays to be shown."""
        self.status = "cancelled"

    def _end(self) -> None:
        self.status = "done"
        self._state.on_event(
            "scrub.done", blocks_verified=self.blocks_verified, damages=self.damages_total
        )

    async def failed(self, error: StorageError) -> None:
        """The device failed, or the like: what was found so far stays to be shown."""
        self.status = "failed"
        self._state.on_event("scrub.failed", error=str(error))

    async def _find(self, where: str, tree: BufferTree, level: int, at: int) -> Node | None:
        """The next level-1 block from the cursor on; damaged ones on the way are noted, with all
        that lies below them, and passed over.
        """
        if self._next_index >> FIELDS_SHIFT * (level - 1) > at:
            return None
        try:
            node = await tree.load(at, level)
        except BlockDamaged:
            self._note(
                where,
                at << FIELDS_SHIFT * level,
                0,
                f"pointer block of level {level}, and all below it",
            )
            self._next_index = (at + 1) << FIELDS_SHIFT * (level - 1)
            return None
        if node.tree is None or level == 1:
            return node if node.tree is not None else None
        low = max(0, (self._next_index >> FIELDS_SHIFT * (level - 2)) - (at << FIELDS_SHIFT))
        for slot in (np.flatnonzero(node.vbns()[low:] > ZERO_POINTER) + low).tolist():
            found = await self._find(where, tree, level - 1, at << FIELDS_SHIFT | slot)
            if found is not None:
                return found
        return None

    # --- One level-1 block ------------------------------------------------------------------------

    async def _verify(self, where: str, tree: BufferTree, node: Node) -> int:
        fields = node.fields()
        slots = np.flatnonzero(fields["vbn"] > ZERO_POINTER)
        vbns = fields["vbn"][slots].astype(np.int64)
        known = (self._verified[vbns >> 3] & BIT[vbns & 7]) != 0
        wanted = [
            (int(slot), int(fields["vbn"][slot]), int(fields["crc"][slot]))
            for slot in slots[~known].tolist()
        ]
        first = node.index << FIELDS_SHIFT
        for slot, vbn in zip(slots[known].tolist(), vbns[known].tolist(), strict=True):
            if vbn in self._damaged:
                self._note(where, first + slot, vbn, "data")
        checks = [(first + slot, vbn, crc, "data") for slot, vbn, crc in wanted]
        if node.epoch == CLEAN and not self._is_verified(node.vbn):
            checks.append((first, node.vbn, crc32c(node.buf), "pointer block of level 1"))
        return await self._read(where, sorted(checks, key=lambda check: check[1]))

    async def _read(self, where: str, checks: list[tuple[int, int, int, str]]) -> int:
        """Read the blocks, neighbours together, and compare."""
        locations: list[Location] = [(vbn, crc) for _, vbn, crc, _ in checks]
        data = memoryview(bytearray(len(checks) * BLOCK_BYTES))
        epoch = self._state.begin_read()
        try:
            await read_all(
                self._state.device,
                (
                    (data[at * BLOCK_BYTES : (at + length) * BLOCK_BYTES], vbn * BLOCK_BYTES)
                    for at, vbn, length in runs(locations)
                ),
            )
        finally:
            self._state.end_read(epoch)
        for position, (fbn, vbn, crc, what) in enumerate(checks):
            self._verified[vbn >> 3] |= BIT[vbn & 7]
            self.blocks_verified += 1
            if crc32c(data[position * BLOCK_BYTES : (position + 1) * BLOCK_BYTES]) != crc:
                self._damaged.add(vbn)
                self._note(where, fbn, vbn, what)
        return len(checks) * BLOCK_BYTES

    def _is_verified(self, vbn: int) -> bool:
        return bool(self._verified[vbn >> 3] >> (vbn & 7) & 1)

    def _note(self, where: str, fbn: int, vbn: int, what: str) -> None:
        damage = {"where": where, "offset_bytes": fbn * BLOCK_BYTES, "vbn": vbn, "what": what}
        self.damages_total += 1
        if len(self.damages) < DAMAGES_MAX:
            self.damages.append(damage)
            self._state.on_event("scrub.damaged", **damage)
