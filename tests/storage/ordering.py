"""A device that holds the pool to the order of its writes, in every storage test
(tests/storage/conftest.py).

1. No superblock names a block that was not synced before it: from each new superblock, what its
   consistency point wrote is walked.
2. What the last durable consistency point reaches, or the one that is becoming durable, is not
   written over and not discarded: so a freed block is not used again before the consistency point
   that frees it is durable.
3. A copy of the superblock is written only while the other one is whole, synced, and as new as the
   durable consistency point.
4. A flush is acknowledged only when every write that was complete at its call has been synced
   since.

It shares nothing with the store but the format. What it finds is kept in ``violations``, since the
pool may survive the exception.
"""

import os
from asyncio import Future
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from storage import layout
from storage.check.superblock import Superblock, parse_superblock
from storage.device import Buffer, Device
from tests.storage.devices import MemoryDevice, WrappedDevice, buffers_length

BLOCK_BYTES = layout.BLOCK_BYTES
# Within a table entry (layout.IMAGE_HEAD): the root field, and the number of levels behind it.
ROOT_FIELD_OFFSET = 32
LEVELS_OFFSET = ROOT_FIELD_OFFSET + layout.FIELD_BYTES


class View:
    """What one superblock says: its number, and the bits of its active map by region."""

    def __init__(self, number: int, regions: dict[int, bytes]) -> None:
        self.number = number
        self.regions = regions

    def uses(self, vbn: int) -> bool:
        bits = self.regions.get(vbn // layout.REGION_BLOCKS)
        within = vbn % layout.REGION_BLOCKS
        return bits is not None and bool(bits[within >> 3] >> (within & 7) & 1)


class OrderingChecker(WrappedDevice):
    """Passes everything on, and looks at the order."""

    violations: ClassVar[list[str]] = []

    def __init__(self, inner: Device) -> None:
        super().__init__(inner)
        self._writes = 0
        # VBN -> number of the last write to it that no sync has covered; and the numbers of those
        # that are complete.
        self.unsynced: dict[int, int] = {}
        self._complete: set[int] = set()
        self._first_free: int = layout.LOG_FIRST_VBN
        self._durable = View(0, {})
        self._pending: tuple[View, int] | None = None
        self._read_present()

    # --- What the device holds --------------------------------------------------------------------

    def peek(self, vbn: int) -> bytes:
        """A block as it is on the innermost device, without its knowing."""
        device: Any = self.inner
        while isinstance(device, WrappedDevice):
            device = device.inner
        if isinstance(device, MemoryDevice):
            block = bytearray(BLOCK_BYTES)
            device._read([block], vbn * BLOCK_BYTES)
            return bytes(block)
        if hasattr(device, "pages"):
            return bytes(device.pages.get(vbn, layout.ZERO_BLOCK))
        return os.pread(device._descriptor, BLOCK_BYTES, vbn * BLOCK_BYTES)

    def _read_present(self) -> None:
        if self.size_bytes < 2 * BLOCK_BYTES:
            return
        found = [
            one
            for one in (parse_superblock(self.peek(vbn)) for vbn in layout.SUPERBLOCK_VBNS)
            if one is not None
        ]
        if found:
            newest = max(found, key=lambda one: one.cp)
            self._first_free = layout.VBN(layout.LOG_FIRST_VBN + newest.log_blocks)
            self._durable = View(newest.cp, dict(self._regions(newest, None)))

    def _regions(self, superblock: Superblock, birth: int | None) -> Iterator[tuple[int, bytes]]:
        """The active map's blocks, or those of one birth."""
        root = superblock.roots[layout.ACTIVE_MAP]
        if root.vbn > layout.ZERO_POINTER and birth in (None, root.birth):
            yield from self._map_blocks(root.vbn, root.levels, 0, birth)

    def _map_blocks(
        self, vbn: int, level: int, index: int, birth: int | None
    ) -> Iterator[tuple[int, bytes]]:
        block = self.peek(vbn)
        if not level:
            yield index, block
            return
        for slot, child, born in fields_of(block):
            if birth in (None, born):
                yield from self._map_blocks(
                    child, level - 1, index << layout.FIELDS_SHIFT | slot, birth
                )

    # --- Writes -----------------------------------------------------------------------------------

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        number = self._submitted(buffers, offset_bytes, length_bytes)
        if not self.inner.try_writev(buffers, offset_bytes, length_bytes):
            return False  # the write comes again by ``writev``
        self._complete.add(number)
        return True

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> Future[None]:
        number = self._submitted(buffers, offset_bytes, buffers_length(buffers))
        future = self.inner.writev(buffers, offset_bytes)
        when_done(future, lambda: self._complete.add(number))
        return future

    def discard(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        self._may_change(offset_bytes // BLOCK_BYTES, length_bytes // BLOCK_BYTES, "discarded")
        return self.inner.discard(offset_bytes, length_bytes)

    def _submitted(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> int:
        self._writes += 1
        first, count = offset_bytes // BLOCK_BYTES, length_bytes // BLOCK_BYTES
        if first in layout.SUPERBLOCK_VBNS:
            self._superblock_written(first, b"".join(buffers), self._writes)
        else:
            self._may_change(first, count, "written over")
        for vbn in range(first, first + count):
            self.unsynced[vbn] = self._writes
        return self._writes

    def _may_change(self, first: int, count: int, how: str) -> None:
        views = [self._durable] if self._pending is None else [self._durable, self._pending[0]]
        for vbn in range(max(first, self._first_free), first + count):
            for view in views:
                if view.uses(vbn):
                    self._violated(
                        f"VBN {vbn}, which consistency point {view.number} uses, is {how} while"
                        " that may still be needed"
                    )

    def _superblock_written(self, vbn: int, block: bytes, number: int) -> None:
        parsed = parse_superblock(block)
        if parsed is None:
            self._violated("what is written over a superblock is none")
            return
        other = parse_superblock(self.peek(1 - vbn))
        if self._durable.number and (
            other is None or other.cp < self._durable.number or 1 - vbn in self.unsynced
        ):
            self._violated(
                f"the superblock at VBN {vbn} is written while the other copy is not good"
            )
            return
        if parsed.cp <= self._durable.number:
            return  # the other copy of a durable one
        self._first_free = layout.VBN(layout.LOG_FIRST_VBN + parsed.log_blocks)
        for written, what in self._written_by(parsed):
            if written in self.unsynced:
                self._violated(
                    f"superblock {parsed.cp} is written before {what} at VBN {written} was synced"
                )
                return
        regions = self._durable.regions | dict(self._regions(parsed, parsed.cp))
        self._pending = View(parsed.cp, regions), number

    # --- What a consistency point wrote -----------------------------------------------------------

    def _written_by(self, superblock: Superblock) -> Iterator[tuple[int, str]]:
        """(VBN, what it is) of every block of this consistency point that the
        superblock reaches.
        """
        birth = superblock.cp
        for metafile, root in enumerate(superblock.roots):
            if root.vbn > layout.ZERO_POINTER and root.birth == birth:
                yield from self._below(
                    root.vbn,
                    root.levels,
                    birth,
                    layout.METAFILE_NAMES[metafile],
                    metafile == layout.VDISK_TABLE,
                )

    def _below(
        self, vbn: int, level: int, birth: int, what: str, table: bool
    ) -> Iterator[tuple[int, str]]:
        yield vbn, f"a block of level {level} of {what}"
        if vbn in self.unsynced or (level <= 0 and not table):
            return
        block = self.peek(vbn)
        if level > 0:
            for _, child, born in fields_of(block):
                if born == birth:
                    yield from self._below(child, level - 1, birth, what, table)
            return
        root, _, born = layout.FIELD.unpack_from(block, ROOT_FIELD_OFFSET)
        if root > layout.ZERO_POINTER and born == birth:
            levels = int.from_bytes(block[LEVELS_OFFSET : LEVELS_OFFSET + 4], "little")
            yield from self._below(root, levels, birth, "an image", False)

    # --- Syncs ------------------------------------------------------------------------------------

    def sync(self) -> Future[None]:
        covered = set(self._complete)
        future = self.inner.sync()

        def ended() -> None:
            if not future.cancelled() and future.exception() is None:
                self._synced(covered)

        when_done(future, ended)
        return future

    def _synced(self, covered: set[int]) -> None:
        self.unsynced = {
            vbn: number for vbn, number in self.unsynced.items() if number not in covered
        }
        self._complete -= covered
        if self._pending is not None and self._pending[1] in covered:
            self._durable, self._pending = self._pending[0], None

    def complete_unsynced(self) -> set[int]:
        """Numbers of the writes that are complete and not covered by a sync yet."""
        return set(self._complete)

    def acknowledged(self, complete_at_call: set[int]) -> None:
        """A flush is acknowledged: what was complete at its call must have been synced."""
        left = sorted(vbn for vbn, number in self.unsynced.items() if number in complete_at_call)
        if left:
            # Not raised: this runs in a completion, and whoever waits for that must not wait for
            # ever.
            OrderingChecker.violations.append(
                f"a flush is acknowledged, and VBN {left[0]} and {len(left) - 1} others were not"
                " synced"
            )

    def _violated(self, what: str) -> None:
        OrderingChecker.violations.append(what)
        raise AssertionError(what)


def when_done(future: Future[None], follow: Callable[[], object]) -> None:
    """Call ``follow`` before anybody who awaits the Future goes on: at once if it is done, for then
    an await does not wait.
    """
    if future.done():
        follow()
    else:
        future.add_done_callback(lambda _: follow())


def fields_of(block: bytes) -> Iterator[tuple[int, int, int]]:
    """(slot, VBN, birth) of each field that is set."""
    words = np.frombuffer(block, dtype="<u8")
    for slot in np.flatnonzero(words[::2] > layout.ZERO_POINTER).tolist():
        yield slot, int(words[slot * 2]), int(words[slot * 2 + 1] >> np.uint64(32))
