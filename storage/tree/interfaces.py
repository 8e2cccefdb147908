"""What trees ask of the rooms around them. None of those is imported here: each of them satisfies a
Protocol without knowing of it.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from storage.device import Device
from storage.tree.node import Hold, Node, NodeCache

# Brings what an attempt that answered None found missing (storage.tree.attempt).
Bring = Callable[[Hold], Awaitable[None]]


class Ledger(Protocol):
    """Where the blocks that an epoch takes and gives back are entered."""

    @property
    def allocated(self) -> list[tuple[int, int]]:
        """Extents (first VBN, length) that were taken."""

    @property
    def freed(self) -> list[int]:
        """VBNs that came free."""

    @property
    def added(self) -> list[npt.NDArray[np.uint64]]:
        """Data blocks that have one more reference."""

    def count_pointer(self, vbn: int, change: int) -> None:
        """Note ``change`` more references to a pointer block."""


class DirtyNodes(Protocol):
    """The nodes that a consistency point will write."""

    @property
    def nodes(self) -> dict[Node, None]:
        """All of them."""

    @property
    def saved(self) -> dict[Node, tuple[bytearray, int, int]]:
        """Bytes, VBN and birth as of the freeze, of those that were changed again since."""


class Epoch(Protocol):
    """The changes between two freezes."""

    @property
    def number(self) -> int:
        """The consistency point that will hold them."""

    @property
    def ledger(self) -> Ledger:
        """Which blocks."""

    @property
    def dirty(self) -> DirtyNodes:
        """Which nodes."""


class PoolState(Protocol):
    """The state of the pool, as far as looking up and waiting need it."""

    @property
    def device(self) -> Device:
        """Where the blocks are."""

    @property
    def cache(self) -> NodeCache:
        """What bounds the nodes in memory."""

    @property
    def epoch(self) -> Epoch:
        """The epoch that collects current changes."""

    @property
    def frozen(self) -> Epoch | None:
        """The epoch that a consistency point is writing."""

    missing: Bring | None

    @property
    def on_event(self) -> Callable[..., None]:
        """Where events go."""

    def take_missing(self) -> Bring:
        """What brings that for want of which an attempt has just answered None."""

    def check_writable(self) -> None:
        """Raise PoolReadOnly if the pool has stopped taking changes."""

    def begin_read(self) -> Any:
        """Pin every block that can be reached now."""

    def end_read(self, epoch: Any) -> None:
        """Unpin what that ``begin_read`` pinned."""


class Owner(Protocol):
    """Whose tree it is: an image, whose table entry names the root."""

    @property
    def being_reclaimed(self) -> bool:
        """Whether it was deleted, and its tree is being taken apart."""

    def is_promised(self, epoch: Epoch) -> bool:
        """Whether there is room already for its table entry in the consistency point of ``epoch``,
        the current one.
        """

    def touch(self) -> None:
        """Called before the root changes: the table entry has to be written."""


class Space(Protocol):
    """Where new locations for nodes come from."""

    def floor(self, epoch: Epoch, grows: bool) -> int:
        """What must be left free when nodes are taken in ``epoch``."""

    def nodes_at_hand(self, count: int, floor: int, entry: bool) -> bool:
        """Whether so many can be taken, with room for a table entry beside them if wanted. False:
        ``missing`` is what to wait for.
        """

    def take_node(self, ledger: Ledger) -> int:
        """One of those that ``nodes_at_hand`` has found."""


class ShareCounts(Protocol):
    """How many references a pointer block has beyond the first."""

    def try_count(self, vbn: int) -> int | None:
        """The current count. None: ``missing`` is what to wait for."""


class _NothingShared:
    """The share counts for trees whose blocks no other tree refers to."""

    def try_count(self, vbn: int) -> int | None:
        return 0


NOTHING_SHARED: ShareCounts = _NothingShared()
