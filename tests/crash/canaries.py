"""Planted bugs: each is a patch of the store, switched on by a test only, that the suite must find
(issue point 9).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from storage.allocation.write_allocator import WriteAllocator
from storage.consistency.consistency_point import ConsistencyPoints
from storage.consistency.replay import Replay
from storage.data import write_path
from storage.epoch.log_queue import LogQueue
from storage.layout import ZERO_POINTER
from storage.split import copying
from tests.crash.recording import done


class _SkipsFirstSync:
    """A device whose first sync does nothing."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._skipped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def sync(self) -> Any:
        if self._skipped:
            return self._inner.sync()
        self._skipped = True
        return done()


def superblock_before_data_sync(stack: ExitStack) -> None:
    """The sync between the state and the superblock that names it is left out."""
    original = ConsistencyPoints._write_superblock

    async def planted(self: ConsistencyPoints, *arguments: Any) -> None:
        state = self._state
        real = state.device
        state.device = _SkipsFirstSync(real)
        try:
            await original(self, *arguments)
        finally:
            state.device = real

    stack.enter_context(mock.patch.object(ConsistencyPoints, "_write_superblock", planted))


def early_reuse_of_freed_block(stack: ExitStack) -> None:
    """A block that a write lets go of is handed to the next write, before any consistency point
    without it is durable.
    """
    pockets: dict[int, list[int]] = {}
    reused: set[int] = set()
    original_install, original_take, original_init = (
        write_path.install,
        WriteAllocator.take,
        WriteAllocator.__init__,
    )

    def init(self: WriteAllocator, *arguments: Any) -> None:
        original_init(self, *arguments)
        pockets[id(self)] = []
        reused.clear()

    def take(
        self: WriteAllocator, count: int, borrowed: bool = False
    ) -> list[tuple[int, int]] | None:
        if count == 1 and pockets[id(self)]:
            vbn = pockets[id(self)].pop()
            reused.add(vbn)
            return [(vbn, 1)]
        return original_take(self, count, borrowed)

    def install(
        image: Any, epoch: Any, nodes: Any, targets: Any, extents: list[tuple[int, int]]
    ) -> None:
        original_install(image, epoch, nodes, targets, extents)
        for extent in [extent for extent in extents if extent[0] in reused]:
            # Its bit is set in the map already.
            reused.discard(extent[0])
            epoch.ledger.allocated.remove(extent)
        if (
            epoch.ledger.freed
            and len(targets) == 1
            and targets[0][1] != write_path.ZERO_CRC
            and (epoch.ledger.freed[-1], 1) not in epoch.ledger.allocated
        ):
            pockets[id(image.allocator)].append(epoch.ledger.freed.pop())

    stack.enter_context(mock.patch.object(WriteAllocator, "__init__", init))
    stack.enter_context(mock.patch.object(WriteAllocator, "take", take))
    stack.enter_context(mock.patch.object(write_path, "install", install))


def trimmed_block_becomes_a_hole(stack: ExitStack) -> None:
    """An UNMAP leaves holes, through which the backing store's data comes back."""
    stack.enter_context(mock.patch("storage.data.trim.ZERO_POINTER", 0))


def split_without_compare_and_set(stack: ExitStack) -> None:
    """A copy goes over what a client wrote while it was made."""
    unpatched = copying.install_copy

    async def planted(clone: Any, holes: Any, extents: Any) -> int:
        node = await clone.editor.make_writable(holes.index)
        fields = node.fields()
        for slot in holes.slots[fields["vbn"][holes.slots] != 0].tolist():
            if fields["vbn"][slot] > ZERO_POINTER:
                clone.state.epoch.ledger.freed.append(int(fields["vbn"][slot]))
                clone.used_blocks -= 1
            fields["vbn"][slot] = 0
        return await unpatched(clone, holes, extents)

    stack.enter_context(mock.patch.object(copying, "install_copy", planted))


def replay_ignores_a_bad_crc(stack: ExitStack) -> None:
    """A record whose data did not reach the device is applied all the same."""

    async def planted(self: Replay, record: Any) -> list[Any]:
        return []

    stack.enter_context(mock.patch.object(Replay, "_damaged_entries", planted))


def atomic_write_in_two_records(stack: ExitStack) -> None:
    """A record takes what it has room for, though a write is cut by that."""

    def planted(self: LogQueue, room: int, room_max: int) -> list[Any]:
        taken = self.entries[:room]
        del self.entries[:room]
        return taken

    stack.enter_context(mock.patch.object(LogQueue, "take", planted))


Canary = Callable[[ExitStack], None]
CANARIES: tuple[Canary, ...] = (
    superblock_before_data_sync,
    early_reuse_of_freed_block,
    trimmed_block_becomes_a_hole,
    split_without_compare_and_set,
    replay_ignores_a_bad_crc,
    atomic_write_in_two_records,
)


@contextmanager
def planted(canary: Canary) -> Iterator[None]:
    with ExitStack() as stack:
        canary(stack)
        yield
