"""An image in memory: a vdisk, a snapshot, or what is left of a deleted one, with its buffer tree.

Invariant: ``touch`` is called before any attribute that the table entry holds is changed. So the
entry that a running consistency point writes is the one of its freeze, although the image goes on
changing.
"""

from typing import Protocol
from uuid import UUID

from storage.allocation.share_map import ShareMap
from storage.allocation.write_allocator import WriteAllocator
from storage.epoch.epoch import Epoch
from storage.errors import Conflict
from storage.images.record import ImageRecord, SplitRecord, encode
from storage.layout import BLOCK_BYTES, KIND_DELETED, KIND_SNAPSHOT, KIND_VDISK
from storage.state.pool_state import PoolState
from storage.tree.buffer_tree import BufferTree
from storage.tree.editor import TreeEditor
from storage.tree.interfaces import Epoch as AnyEpoch

KIND_FREE = 0  # the entry is to be cleared; never on disk


class HoleWatcher(Protocol):
    """Hears what clients do to the holes of a clone. Each call comes in the step of the change."""

    def hole_filled(self, fbn: int) -> None:
        """A hole gets a block of its own."""

    def holes_hidden(self) -> None:
        """Some holes become zero pointers, or take blocks by reference."""

    def abandon(self) -> None:
        """The clone is being deleted."""


class Image:
    """One image. ``backing`` is the snapshot behind a clone, visible through holes below
    ``backing_blocks``.
    """

    __slots__ = (
        "__weakref__", "_promised_in", "allocator", "backing", "backing_blocks", "busy",
        "created_cp", "created_ns", "editor", "flags", "kind", "limit_bytes", "name", "number",
        "origin", "share_map", "size_bytes", "split", "state", "tree", "used_blocks", "uuid",
        "watcher",
    )  # fmt: skip

    def __init__(
        self,
        state: PoolState,
        allocator: WriteAllocator,
        share_map: ShareMap,
        number: int,
        record: ImageRecord,
        backing: "Image | None",
    ) -> None:
        self.state = state
        self.allocator = allocator
        self.share_map = share_map
        self.number = number
        self.kind = record.kind
        self.name = record.name
        self.uuid = UUID(bytes=record.uuid)
        self.size_bytes = record.size_bytes
        # What clients may address: less than size_bytes while a shrink is under way.
        self.limit_bytes = record.size_bytes
        self.used_blocks = record.used_blocks
        self.created_ns = record.created_ns
        self.created_cp = record.created_cp
        self.origin = record.origin
        self.backing = backing
        self.backing_blocks = record.backing_blocks
        self.flags = record.flags
        self.split: SplitRecord = record.split
        # The split of the clone, while there is one: it must hear of every hole that goes.
        self.watcher: HoleWatcher | None = None
        # What is being done to the image and rules out other changes of it ("grow", "shrink",
        # "delete"), for messages.
        self.busy: str | None = None
        # The epoch whose consistency point has room for the entry, if it is the current one.
        self._promised_in: Epoch | None = None
        self.tree = BufferTree(state, self.label, record.levels, record.root, record.shared_cp)
        self.editor = TreeEditor(state, self.tree, allocator, share_map, self)

    @property
    def label(self) -> str:
        """The image in messages."""
        what = {KIND_VDISK: "vdisk", KIND_SNAPSHOT: "snapshot"}.get(self.kind, "deleted image")
        return f"{what} {self.name or self.number}"

    @property
    def size_blocks(self) -> int:
        """Size in blocks."""
        return self.size_bytes // BLOCK_BYTES

    @property
    def being_reclaimed(self) -> bool:
        """Whether this is what is left of a deleted image."""
        return self.kind == KIND_DELETED

    def is_promised(self, epoch: AnyEpoch) -> bool:
        """Whether it was touched in that epoch, the current one."""
        return self._promised_in is epoch

    def claim(self, what: str) -> None:
        """Begin a change that rules out others; ``busy`` is cleared at its end. Raises Conflict."""
        if self.busy is not None:
            raise Conflict(f"vdisk {self.name} is busy ({self.busy}): try again when that is done")
        self.busy = what

    def touch(self) -> None:
        """Call before a change: the entry goes into the next consistency point, and a frozen one
        keeps its state.
        """
        epoch = self.state.epoch
        if self._promised_in is epoch:
            return
        frozen = self.state.frozen
        if frozen is not None and frozen.dirty.images.get(self, ...) is None:
            frozen.dirty.images[self] = self.encode()
        self._promised_in = epoch
        epoch.dirty.images[self] = None
        self.allocator.promise()

    def revert(self, record: ImageRecord, backing: "Image | None") -> None:
        """Be again what the table says of it, the data apart.

        What a shrink took from clients stays out of their reach: it may be trimmed. And nothing is
        read through the holes of a clone that a split had released: since then a trim may have left
        some.
        """
        released = self.kind == record.kind and self.backing is None
        self.kind = record.kind
        self.name = record.name
        self.origin = record.origin
        self.size_bytes = record.size_bytes
        self.limit_bytes = min(self.limit_bytes, record.size_bytes)
        self.backing = backing
        self.backing_blocks = 0 if released else record.backing_blocks
        self.flags = record.flags
        self.split.state, self.split.reason = record.split.state, record.split.reason
        self.tree.label = self.label

    def encode(self) -> bytearray:
        """The current table entry (the root's CRC32C may still be missing: the consistency point
        adds it).
        """
        tree = self.tree
        return encode(
            ImageRecord(
                kind=self.kind,
                name=self.name,
                uuid=self.uuid.bytes,
                size_bytes=self.size_bytes,
                root=(tree.root_vbn, tree.root_crc, tree.root_birth),
                levels=tree.levels,
                shared_cp=tree.shared_cp,
                used_blocks=self.used_blocks,
                created_ns=self.created_ns,
                created_cp=self.created_cp,
                origin=self.origin,
                backing=self.backing.number if self.backing is not None else 0,
                backing_blocks=self.backing_blocks,
                flags=self.flags,
                split=self.split,
            )
        )
