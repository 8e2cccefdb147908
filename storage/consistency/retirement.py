"""The retirement of epochs: what a durable one freed waits for reads that began before, and for the
device to have long runs back, before it can be used again.
"""

import asyncio
from collections import deque

from storage.allocation.write_allocator import WriteAllocator
from storage.check import CheckReport
from storage.epoch.epoch import Epoch
from storage.errors import StorageError
from storage.layout import BLOCK_BYTES
from storage.state.host_room import HostRoom
from storage.state.pool_state import PoolState


class Retired:
    """``epochs`` are durable, oldest first, and their freed blocks are not released yet.

    ``checks`` are live checks under way. They pin all blocks that were in use when they began, for
    as long as they take.
    """

    __slots__ = ("_released", "checks", "epochs")

    def __init__(self) -> None:
        self.epochs: deque[Epoch] = deque()
        self.checks: set[asyncio.Task[CheckReport]] = set()
        self._released = asyncio.Event()

    async def wait_for_room(self) -> None:
        """Wait until freed blocks come back that reads, or the device's discards, keep from that.
        Checks are ended, for they take long.
        """
        for task in self.checks:
            task.cancel()
        self._released.clear()
        await self._released.wait()

    def note_release(self) -> None:
        """Freed blocks came back to the allocator."""
        self._released.set()


class Retirement:
    """Releases what retired epochs hold as soon as that may be used again."""

    __slots__ = ("_allocator", "_discarding", "_host_room", "_retired", "_state")

    def __init__(
        self, state: PoolState, host_room: HostRoom, allocator: WriteAllocator, retired: Retired
    ) -> None:
        self._state = state
        self._host_room = host_room
        self._allocator = allocator
        self._retired = retired
        # Gives freed runs back to the device, while there are some.
        self._discarding: asyncio.Task[None] | None = None
        state.unpinned.listen(self._release)

    def retire(self, epoch: Epoch) -> None:
        """The epoch is durable: what it freed waits only for older reads now.

        While a long one goes on, epochs without readers are put together, or what they hold would
        grow with every consistency point.
        """
        epochs = self._retired.epochs
        last = epochs[-1] if len(epochs) > 1 else None
        if last is not None and not last.readers and not epoch.readers:
            last.ledger.absorb(epoch.ledger)
        else:
            epochs.append(epoch)
        self._release()

    def _release(self) -> None:
        """Hand the freed blocks of durable epochs back to the allocator, oldest first, as far as no
        reader is left.

        Long runs are given back to the device first; while it is at that, nothing is released.
        """
        epochs = self._retired.epochs
        while epochs and not epochs[0].readers and self._discarding is None:
            ledger = epochs[0].ledger
            if ledger.discards:
                discards, ledger.discards = ledger.discards, []
                self._discarding = asyncio.get_running_loop().create_task(self._discard(discards))
                return
            epochs.popleft()
            self._allocator.release(ledger.held)
            self._retired.note_release()

    async def _discard(self, runs: list[tuple[int, int]]) -> None:
        try:
            for first, length in runs:
                await self._state.device.discard(first * BLOCK_BYTES, length * BLOCK_BYTES)
        except StorageError as error:
            # Nothing is lost: that space only stays allocated on the device.
            self._state.on_event("device.discard_failed", error=str(error))
        finally:
            self._discarding = None
            self._release()
            self._host_room.wake()

    async def finish(self) -> None:
        """Wait until the device has back what it was to have."""
        while self._discarding is not None:
            await self._discarding
