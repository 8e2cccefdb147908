"""An epoch: everything that changes between two freezes, which one consistency point then makes
durable.

It is composed of three parts, which have no business with each other: the blocks that it took and
gave back (``ledger``), its changes that the intent log does not hold yet (``unlogged``), and what
its consistency point has to write (``dirty``). ``number`` is that consistency point's; it only
grows, by one each time.
"""

from collections.abc import Callable

from storage.epoch.dirty_set import DirtySet
from storage.epoch.ledger import AllocationLedger
from storage.epoch.log_queue import LogQueue


class Epoch:
    """``readers`` counts the reads that began in it and wait for a device thread."""

    __slots__ = ("dirty", "ledger", "number", "readers", "unlogged", "when_durable")

    def __init__(self, number: int) -> None:
        self.number = number
        self.ledger = AllocationLedger()
        self.unlogged = LogQueue(number)
        self.dirty = DirtySet()
        self.readers = 0
        # What must not begin before the changes that it follows from are durable: taking a deleted
        # image apart, say.
        self.when_durable: list[Callable[[], None]] = []

    @property
    def changed(self) -> bool:
        """Whether a consistency point of this epoch would write anything but a superblock."""
        return self.dirty.changed or self.ledger.changed

    @property
    def frees(self) -> bool:
        """Whether blocks may come free with this epoch, or by what begins when it is durable."""
        return bool(self.ledger.freed_estimate or self.ledger.held or self.when_durable)
