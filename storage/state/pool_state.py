"""What every room of the pool shares: the device, the current epoch, the cache, the maps, and
whether writes are still taken.

The event loop thread owns all of it (design section 3): everything between two awaits is atomic, so
there are no locks.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from storage.device import Device
from storage.epoch.epoch import Epoch
from storage.errors import PoolReadOnly, StorageError
from storage.layout import BLOCK_BYTES
from storage.state.host_room import HostRoom
from storage.tree.node import Hold, NodeCache

if TYPE_CHECKING:
    from storage.allocation.share_map import ShareMap
    from storage.allocation.write_allocator import WriteAllocator
    from storage.check import CheckReport

EventSink = Callable[..., None]


def no_events(event: str, **fields: Any) -> None:
    """The sink of a pool that nobody listens to."""


class PoolState:
    """The shared state of one open pool.

    ``epoch`` takes the changes of now; ``frozen`` is the one that a running consistency point
    writes, else None; ``retired`` are durable epochs whose freed blocks wait for older reads to
    end. ``operations`` counts client reads and writes, ever growing.
    """

    __slots__ = (
        "allocator",
        "cache",
        "checks",
        "device",
        "discarding",
        "epoch",
        "frozen",
        "missing",
        "on_event",
        "operations",
        "read_only_reason",
        "released",
        "retired",
        "room",
        "share_map",
        "wanted",
    )

    allocator: "WriteAllocator"
    share_map: "ShareMap"

    def __init__(self, device: Device, cp_number: int, cache_bytes: int) -> None:
        self.device = device
        self.room = HostRoom(self)
        self.epoch = Epoch(cp_number + 1)
        self.frozen: Epoch | None = None
        self.retired: deque[Epoch] = deque()
        # The task that gives freed runs back to the device, while there is one.
        self.discarding: asyncio.Task[None] | None = None
        # Set whenever freed blocks came back to the allocator.
        self.released = asyncio.Event()
        self.cache = NodeCache(cache_bytes)
        # Brings what an attempt that just answered None found missing (storage.tree.attempt).
        self.missing: Callable[[Hold], Awaitable[None]] | None = None
        # Live checks under way. They pin all blocks that were in use when they began, for as long
        # as they take.
        self.checks: set[asyncio.Task[CheckReport]] = set()
        self.read_only_reason: str | None = None
        self.operations = 0
        self.on_event: EventSink = no_events
        # Set by the consistency point: call it to ask for one soon.
        self.wanted: Callable[[], None] = lambda: None

    def take_missing(self) -> Callable[[Hold], Awaitable[None]]:
        """What brings that for want of which an attempt has just answered None."""
        bring, self.missing = self.missing, None
        assert bring is not None, "an attempt that answers None says what it waits for"
        return bring

    def fail(self, reason: str) -> None:
        """Stop taking changes, for good: nothing after this is acknowledged as durable (design
        section 4).
        """
        if self.read_only_reason is None:
            self.read_only_reason = reason
            self.on_event("pool.read_only", reason=reason)

    def check_writable(self) -> None:
        """Raise PoolReadOnly if the pool has stopped taking changes."""
        if self.read_only_reason is not None:
            raise PoolReadOnly(f"the pool is read-only: {self.read_only_reason}")

    def begin_read(self) -> Epoch:
        """Pin every block that can be reached now, until ``end_read`` is given the epoch that this
        returns.
        """
        epoch = self.epoch
        epoch.readers += 1
        return epoch

    def end_read(self, epoch: Epoch) -> None:
        """Let go of what ``begin_read`` pinned, and release the freed blocks that waited for it."""
        epoch.readers -= 1
        if not epoch.readers and self.retired:
            self.release_retired()

    def retire(self, epoch: Epoch) -> None:
        """The epoch is durable: what it freed waits only for older reads now.

        While a long one goes on, epochs without readers are put together, or what they hold would
        grow with every consistency point.
        """
        last = self.retired[-1] if len(self.retired) > 1 else None
        if last is not None and not last.readers and not epoch.readers:
            last.absorb(epoch)
        else:
            self.retired.append(epoch)
        self.release_retired()

    async def room_from_retired(self) -> None:
        """Wait until freed blocks come back that reads, or the device's discards, keep from that.
        Checks are ended, for they take long.
        """
        for task in self.checks:
            task.cancel()
        self.released.clear()
        await self.released.wait()

    def release_retired(self) -> None:
        """Hand the freed blocks of durable epochs back to the allocator, oldest first, as far as no
        reader is left.

        Long runs are given back to the device first; while it is at that, nothing is released.
        """
        retired = self.retired
        while retired and not retired[0].readers and self.discarding is None:
            epoch = retired[0]
            if epoch.discards:
                self.discarding = asyncio.get_running_loop().create_task(self._discard(epoch))
                return
            retired.popleft()
            self.allocator.release(epoch.held)
            self.released.set()

    async def _discard(self, epoch: Epoch) -> None:
        discards, epoch.discards = epoch.discards, []
        try:
            for first, length in discards:
                await self.device.discard(first * BLOCK_BYTES, length * BLOCK_BYTES)
        except StorageError as error:
            # Nothing is lost: that space only stays allocated on the device.
            self.on_event("device.discard_failed", error=str(error))
        finally:
            self.discarding = None
            self.release_retired()
            self.room.wake()
