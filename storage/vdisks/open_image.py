"""An open image: one vdisk or snapshot that somebody reads or writes; what it is, who uses it, and
how that ends. How it is read and written stands in storage.vdisks.volume.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple
from uuid import UUID

from storage.errors import DeviceFull, OutOfRange, VolumeClosed, as_storage_error
from storage.images.image import Image
from storage.layout import (
    BLOCK_BYTES,
    KIND_SNAPSHOT,
    KIND_VDISK,
    SPLIT_FLAG_COUNTED,
    SPLIT_RUNNING,
)
from storage.state.host_room import HostRoom
from storage.vdisks.counters import Counters


class VolumeUsage(NamedTuple):
    """Bytes that a volume's own blocks take in the pool, and bytes still free there for data."""

    used_bytes: int
    available_bytes: int


class SplitState(NamedTuple):
    """Blocks still read from the backing store (None: not counted), the same when the split began,
    whether it is running.
    """

    holes_remaining_blocks: int | None
    holes_total_blocks: int | None
    running: bool


class OpenImage:
    """``counters`` are the image's, and stay when this goes. ``labels`` name the sessions that use
    it.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_host_room",
        "_tasks",
        "_unused",
        "counters",
        "image",
        "labels",
        "name",
        "state",
    )

    def __init__(
        self,
        image: Image,
        name: str,
        host_room: HostRoom,
        counters: Counters,
        unused: Callable[[], None],
    ) -> None:
        self.image = image
        self.state = image.state
        self.name = name
        self.counters = counters
        self.labels: set[str] = set()
        self._host_room = host_room
        # Called when nobody reads a snapshot any more: it may be waiting for that to be deleted.
        self._unused = unused
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def uuid(self) -> UUID:
        """Identity for life."""
        return self.image.uuid

    @property
    def size_bytes(self) -> int:
        """Size now, in bytes."""
        return self.image.limit_bytes

    @property
    def read_only(self) -> bool:
        """True for snapshots, and for every volume of a pool that stopped taking writes."""
        return self.image.kind != KIND_VDISK or self.state.read_only_reason is not None

    def usage(self) -> "VolumeUsage":
        """What the volume takes up in the pool, and what is left for data there, or on its host if
        that has less.
        """
        image = self.image
        return VolumeUsage(
            image.used_blocks * BLOCK_BYTES,
            self._host_room.available_bytes(image.allocator.available_bytes),
        )

    def split_state(self) -> "SplitState | None":
        """How far a clone is from standing on its own; None where there is no backing store."""
        image = self.image
        if image.backing is None:
            return None
        if image.watcher is None:
            return SplitState(None, None, False)
        split = image.split
        remaining = split.holes_remaining if split.flags & SPLIT_FLAG_COUNTED else None
        return SplitState(remaining, split.holes_total or None, split.state == SPLIT_RUNNING)

    def attach(self, label: str) -> None:
        """A session uses the volume now; it cannot be deleted meanwhile."""
        self.labels.add(label)

    def detach(self, label: str) -> None:
        """The session has ended."""
        self.labels.discard(label)
        if not self.labels and self.image.kind == KIND_SNAPSHOT:
            self._unused()

    def close(self) -> None:
        """The image was deleted, or the pool is closing: refuse whatever comes."""
        self._closed = True

    def reopen(self) -> None:
        """The image stays after all."""
        self._closed = False

    async def drain(self) -> None:
        """Wait for everything that is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # --- For reading and writing ------------------------------------------------------------------

    def check_range(self, offset_bytes: int, length_bytes: int) -> None:
        """Raise OutOfRange for a range that is not within the volume, VolumeClosed when the volume
        is gone.
        """
        if offset_bytes + length_bytes > self.image.limit_bytes or self._closed:
            self.refuse(offset_bytes, length_bytes)

    def refuse(self, offset_bytes: int, length_bytes: int) -> None:
        """Say why a command on this range cannot be. Raises VolumeClosed, OutOfRange."""
        if self._closed:
            raise VolumeClosed(f"{self.name} is no longer there")
        raise OutOfRange(
            f"{self.name}: bytes {offset_bytes} to {offset_bytes + length_bytes} do not lie within"
            f" its {self.image.limit_bytes} bytes"
        )

    def check_still_there(self, offset_bytes: int, length_bytes: int) -> None:
        """After a wait: of an image that was deleted meanwhile, what was found may be what reclaim
        has left of it. Raises VolumeClosed.
        """
        if self._closed and self.image.kind not in {KIND_VDISK, KIND_SNAPSHOT}:
            self.refuse(offset_bytes, length_bytes)

    def count_read(self, length_bytes: int) -> None:
        """A read was answered."""
        counters = self.counters
        counters.reads += 1
        counters.read_bytes += length_bytes
        self.state.operations += 1

    def failure(self, error: Exception) -> Exception:
        """What a write that failed is answered with. A host without room is noted in the state of
        the pool.
        """
        if isinstance(error, DeviceFull):
            self._host_room.met(error)
        return as_storage_error(error)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Have a Task do what has to wait; ``drain`` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
