"""What every room of the pool shares: the device, the current epoch, the cache, and whether writes
are still taken.

The event loop thread owns all of it (design section 3): everything between two awaits is atomic, so
there are no locks.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from storage.device import Device
from storage.epoch.epoch import Epoch
from storage.errors import PoolReadOnly
from storage.state.signal import Signal
from storage.tree.node import Hold, NodeCache

EventSink = Callable[..., None]


def no_events(event: str, **fields: Any) -> None:
    """The sink of a pool that nobody listens to."""


class PoolState:
    """The shared state of one open pool.

    ``epoch`` collects current changes; ``frozen`` is the one that a running consistency point
    writes, else None. ``operations`` counts client reads and writes, ever growing. ``unpinned`` is
    sent when the last reader of an epoch has ended.
    """

    __slots__ = (
        "cache",
        "device",
        "epoch",
        "frozen",
        "missing",
        "on_event",
        "operations",
        "read_only_reason",
        "unpinned",
    )

    def __init__(
        self, device: Device, cp_number: int, cache_bytes: int, on_event: EventSink = no_events
    ) -> None:
        self.device = device
        self.epoch = Epoch(cp_number + 1)
        self.frozen: Epoch | None = None
        self.cache = NodeCache(cache_bytes)
        # Brings what an attempt that just answered None found missing (storage.tree.attempt).
        self.missing: Callable[[Hold], Awaitable[None]] | None = None
        self.read_only_reason: str | None = None
        self.operations = 0
        self.on_event = on_event
        self.unpinned = Signal()

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
        """Unpin what ``begin_read`` pinned: freed blocks may have waited for it."""
        epoch.readers -= 1
        if not epoch.readers:
            self.unpinned.send()
