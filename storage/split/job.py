"""One split under way: counts the holes, replaces them level-1 block by level-1 block, and releases
the association (design section 5).

Invariants:
- ``cursor`` and ``holes_remaining`` change in the same step as the fields, so they agree in every
  consistency point: after a crash the split goes on at its cursor.
- Below the cursor there are no holes left to replace. The cursor only grows; a recount does not
  move it.
- ``holes_remaining`` is exact while SPLIT_FLAG_COUNTED is set: clients that fill a hole tell the
  job (``hole_filled``). Where that cannot be said at once (a trim over a range of holes), the flag
  goes, and the holes are counted again.
- When the last level-1 block is done no hole is left, whatever the count says: only then is the
  association released.
"""

import asyncio
from time import perf_counter
from typing import Protocol

from storage.data.backing import next_index
from storage.data.long_write import PIECE_BYTES
from storage.data.read_path import locate
from storage.data.write_path import Extents
from storage.errors import StorageError
from storage.images.image import Image
from storage.layout import (
    BLOCK_BYTES,
    FIELDS_PER_BLOCK,
    FIELDS_SHIFT,
    SPLIT_FLAG_COUNTED,
    SPLIT_MODE_SHARE,
    SPLIT_PAUSED,
    SPLIT_RUNNING,
)
from storage.slicer import Slicer
from storage.split import copying
from storage.split.loading import Holes, holes_at
from storage.split.progress import Progress
from storage.state.point_requests import PointRequests

# Level-1 blocks that one message copies: several when idle, so that reads and writes overlap; one
# under load, to be met seldom.
BLOCKS_IDLE = 8
BLOCKS_LOADED = 1
# One message counts or shares at most this long before others get their turn.
MESSAGE_SECONDS = 0.002
# After so many blocks (512 MiB) a consistency point is asked for: what a crash costs a split is
# what it did since the last one.
BLOCKS_PER_POINT = 131072
# While clients trim ranges of holes all the time, counting again must not take all the time from
# splitting.
RECOUNT_SECONDS = 5.0


Copy = tuple[Holes, "asyncio.Task[Extents]", bytearray]


class SplitJob:
    """The work behind one clone's split: a ``backdoor.handler.Work``, and the clone's
    ``HoleWatcher``. The image's ``split`` record holds all that lasts.
    """

    def __init__(
        self,
        image: Image,
        requests: PointRequests,
        buffers: copying.CopyBuffers,
        owner: "Owner",
    ) -> None:
        self.image = image
        self._requests = requests
        self.record = image.split
        self.progress = Progress()
        self.gone = False
        self._buffers = buffers
        self._owner = owner
        self._count_at = 0
        self._counting = not self.counted
        self._since_point = 0
        self._recounted_at = 0.0
        # Whether something happened during the count that makes it worthless.
        self._spoiled = False
        # Set fields below each level-2 block of the backing store, as counted: a whole one can be
        # shared without walking it again.
        self._level2_holes: dict[int, int] = {}

    @property
    def rate_min_bytes(self) -> int:
        """Guaranteed rate under load, bytes a second; 0 = the default."""
        return self.record.rate_min_bytes

    @property
    def rate_max_bytes(self) -> int:
        """Ceiling, bytes a second; 0 = none."""
        return self.record.rate_max_bytes

    @property
    def counted(self) -> bool:
        """Whether ``holes_total`` and ``holes_remaining`` are exact."""
        return bool(self.record.flags & SPLIT_FLAG_COUNTED)

    def abandon(self) -> None:
        """The clone is being deleted, or the split has ended: the next message ends the work."""
        self.gone = True
        if self.image.watcher is self:
            self.image.watcher = None
        self._owner.gone(self)

    # --- What clients do meanwhile ----------------------------------------------------------------

    def hole_filled(self, fbn: int) -> None:
        """A client wrote to a hole of the clone (called in the step that installs its block)."""
        image = self.image
        if (
            fbn >= image.backing_blocks
            or (self._counting and fbn >> FIELDS_SHIFT >= self._count_at)
            or image.backing is None
        ):
            return
        try:
            behind = locate(image.backing, fbn)
        except StorageError:
            # Damage behind the clone must not fail a write that hides it, least of all half-way.
            behind = None
        if behind is None:
            self.holes_hidden()
        elif behind[0]:
            self.record.holes_remaining = max(0, self.record.holes_remaining - 1)

    def holes_hidden(self) -> None:
        """A client trimmed holes: how many of them counted is not known at once."""
        self.image.touch()
        self.record.flags &= ~SPLIT_FLAG_COUNTED
        self._spoiled = True

    # --- Messages ---------------------------------------------------------------------------------

    async def message(self, idle: bool) -> int | None:
        """Count, copy or share a little more. Returns the bytes moved, or None when the work has
        ended.
        """
        if self.gone or self.record.state != SPLIT_RUNNING:
            return None
        if (
            not self.counted
            and not self._counting
            and perf_counter() - self._recounted_at > RECOUNT_SECONDS
        ):
            self._counting, self._count_at = True, self.record.cursor
        if self._counting:
            await self._count_some()
            return 0
        if self.record.mode == SPLIT_MODE_SHARE:
            return await self._share_some()
        return await self._copy_some(BLOCKS_IDLE if idle else BLOCKS_LOADED)

    async def failed(self, error: StorageError) -> None:
        """The last message raised ``error``."""
        if not self.gone:
            await self._owner.stopped(self, error)

    # --- Counting ---------------------------------------------------------------------------------

    async def _count_some(self) -> None:
        """Go on counting. What was counted is kept exact by ``hole_filled`` from then on."""
        record, until = self.record, perf_counter() + MESSAGE_SECONDS
        if self._count_at <= record.cursor:
            self._begin_count()
        while perf_counter() < until:
            index = await next_index(self.image, self._count_at)
            if index is None:
                self._end_count()
                return
            holes = await holes_at(self.image, index)
            self.image.touch()
            self._count_at = index + 1
            record.holes_remaining += len(holes)
            self._level2_holes[index >> FIELDS_SHIFT] = self._level2_holes.get(
                index >> FIELDS_SHIFT, 0
            ) + len(holes)

    def _begin_count(self) -> None:
        self._count_at = self.record.cursor
        self._level2_holes = {}
        self.image.touch()
        self.record.holes_remaining = 0
        self._spoiled = False

    def _end_count(self) -> None:
        self.image.touch()
        self._counting = False
        self._recounted_at = perf_counter()
        record = self.record
        if not self._spoiled:
            # Only now: a consistency point may have come in the middle, and a crash after it.
            record.flags |= SPLIT_FLAG_COUNTED
        done = record.blocks_copied + record.blocks_shared
        record.holes_total = record.holes_remaining + done

    # --- Copying ----------------------------------------------------------------------------------

    async def _copy_some(self, blocks: int) -> int | None:
        """Copy the next few level-1 blocks; the next is read while the ones before it
        are written.
        """
        started: list[Copy] = []
        try:
            following = await self._start_copies(blocks, started)
            moved = await self._install_all(started)
        except Exception:
            await self._discard(started)
            raise
        except asyncio.CancelledError:
            # What they took stays claimed until the pool is closed, which is what cancels: the
            # device may still be writing there.
            for _, writing, _ in started:
                writing.cancel()
            await asyncio.gather(*(writing for _, writing, _ in started), return_exceptions=True)
            raise
        if self.gone or self.record.state != SPLIT_RUNNING:
            return None
        if following is None:
            await self._owner.release(self)
            return None
        self.image.touch()
        self.record.cursor = max(self.record.cursor, following)
        return moved * BLOCK_BYTES

    async def _start_copies(self, blocks: int, started: list[Copy]) -> int | None:
        """Read up to ``blocks`` level-1 blocks' worth, and begin to write it. Returns the index to
        go on from, None at the end.
        """
        index: int | None = self.record.cursor
        slicer = Slicer()
        piece = copying.COPY_BYTES_MAX if blocks > BLOCKS_LOADED else PIECE_BYTES
        while index is not None and len(started) < blocks:
            index = await next_index(self.image, index)
            if index is not None:
                holes = await holes_at(self.image, index)
                index += 1
                if len(holes):
                    buffer = self._buffers.take()
                    data = await copying.read_behind(self.image, holes, buffer)
                    started.append(
                        (
                            holes,
                            asyncio.create_task(copying.write_copy(self.image, data, piece)),
                            buffer,
                        )
                    )
                await slicer.breathe()
        return index

    async def _install_all(self, started: list[Copy]) -> int:
        """Install the copies in the order of their level-1 blocks; returns how many blocks were
        written.
        """
        moved = 0
        while started and not self.gone:
            holes, writing, buffer = started[0]
            extents = await writing
            self._buffers.give_back(buffer)
            installed = await copying.install_copy(self.image, holes, extents)
            del started[0]
            self._replaced(installed)
            self.record.blocks_copied += installed
            self.record.cursor = max(self.record.cursor, holes.index + 1)
            moved += len(holes)
        await self._discard(started)
        return moved

    async def _discard(self, started: list[Copy]) -> None:
        """Give back what copies took that will not be installed."""
        for extents in await asyncio.gather(
            *(writing for _, writing, _ in started), return_exceptions=True
        ):
            if not isinstance(extents, BaseException):
                self.image.allocator.give_back(extents)

    def _replaced(self, holes: int) -> None:
        self._since_point += holes
        if self._since_point >= BLOCKS_PER_POINT:
            self._since_point = 0
            self._requests.want()
        self.image.touch()
        self.record.holes_remaining = max(0, self.record.holes_remaining - holes)
        self.progress.add(holes)

    # --- Sharing ----------------------------------------------------------------------------------

    async def _share_some(self) -> int | None:
        """Share the next level-1 blocks, whole level-2 blocks where nothing stands in the way."""
        until, shared = perf_counter() + MESSAGE_SECONDS, 0
        while perf_counter() < until and not self.gone:
            index = await next_index(self.image, self.record.cursor)
            if index is None:
                await self._owner.release(self)
                return None
            done, following = await self._share_at(index)
            shared += done
            self._replaced(done)
            self.record.blocks_shared += done
            self.record.cursor = following
        return shared * BLOCK_BYTES

    async def _share_at(self, index: int) -> tuple[int, int]:
        """Share what begins at level-1 block ``index``. Returns the holes replaced, and where to go
        on.
        """
        image = self.image
        counted = self._level2_holes.get(index // FIELDS_PER_BLOCK)
        if not index % FIELDS_PER_BLOCK and counted and self.counted:
            holes = await copying.share_block(image, index >> FIELDS_SHIFT, 2, counted)
            if holes:
                return holes, index + FIELDS_PER_BLOCK
        holes = await copying.share_block(image, index, 1, None)
        return holes or await copying.share_fields(image, index), index + 1

    # --- Showing ----------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """``counting`` or ``splitting``."""
        return (
            "counting"
            if self._counting and self.record.state in (SPLIT_RUNNING, SPLIT_PAUSED)
            else "splitting"
        )


class Owner(Protocol):
    """What a job tells the service that started it."""

    async def release(self, job: SplitJob) -> None:
        """No hole is left: end the association."""

    async def stopped(self, job: SplitJob, error: StorageError) -> None:
        """A message failed."""

    def gone(self, job: SplitJob) -> None:
        """It does nothing any more."""
