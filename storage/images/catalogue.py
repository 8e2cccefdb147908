"""The catalogue: which images there are, by number and by name, and which depends on which.

Of most images only the bytes of the table entry are kept (trailing zeros cut off: about 150 bytes),
so that a hundred thousand vdisks fit; an Image object is made when somebody works with one, and
lives as long as anybody refers to it.
"""

import heapq
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple
from weakref import WeakValueDictionary

from storage.allocation.share_map import ShareMap
from storage.allocation.write_allocator import WriteAllocator
from storage.errors import BlockDamaged, Conflict, NotFound
from storage.images.image import Image
from storage.images.record import ImageRecord, decode
from storage.images.vdisk_names import VdiskNames
from storage.layout import (
    IMAGE_FLAG_DELETE_AFTER_SPLIT,
    IMAGE_SPLIT_OFFSET,
    IMAGE_UUID_OFFSET,
    KIND_DELETED,
    KIND_SNAPSHOT,
    KIND_VDISK,
    SPLIT_NONE,
)
from storage.state.pool_state import PoolState


class Releasing(NamedTuple):
    """The snapshot that stood behind a clone until its split ended: number, full name, and how many
    blocks of it were visible.
    """

    number: int
    name: str
    backing_blocks: int


class Catalogue:
    """All images of a pool.

    ``vdisks`` maps names to numbers; ``snapshots`` and ``clones`` map the number of a vdisk or
    snapshot to its snapshots or clones.
    """

    __slots__ = (
        "_allocator",
        "_damaged",
        "_entries",
        "_free_numbers",
        "_live",
        "_next_number",
        "_share_map",
        "_state",
        "clones",
        "deleted",
        "releasing",
        "snapshots",
        "vdisks",
    )

    def __init__(self, state: PoolState, allocator: WriteAllocator, share_map: ShareMap) -> None:
        self._state = state
        self._allocator = allocator
        self._share_map = share_map
        self._entries: dict[int, bytes] = {}
        self._live: WeakValueDictionary[int, Image] = WeakValueDictionary()
        self._free_numbers: list[int] = []
        self._damaged: set[int] = set()
        self._next_number = 1
        self.vdisks = VdiskNames()
        self.snapshots: dict[int, dict[str, int]] = {}
        self.clones: dict[int, set[int]] = {}
        self.deleted: set[int] = set()
        # Clones whose association has ended in a consistency point that is not durable yet: a
        # crash would bring it back, so lists show it.
        self.releasing: dict[int, Releasing] = {}

    def __len__(self) -> int:
        return len(self._entries)

    # --- Taking in --------------------------------------------------------------------------------

    def read_entry(self, number: int, block: bytes) -> None:
        """List an entry read at open. ``numbers_known`` must follow the last one."""
        record = decode(block)
        if record is None:
            return
        self._entries[number] = bytes(block).rstrip(b"\0")
        self._index(number, record.kind, record.name, record.origin, record.backing)

    def read_damaged(self, number: int) -> None:
        """Keep the number of an entry that cannot be read: nothing must be written over it."""
        self._damaged.add(number)

    def numbers_known(self) -> None:
        """All entries were read: from now on numbers can be given to new images."""
        taken = self._entries.keys() | self._damaged
        self._next_number = max(taken, default=0) + 1
        self._free_numbers = [
            number for number in range(1, self._next_number) if number not in taken
        ]

    def _index(self, number: int, kind: int, name: str, origin: int, backing: int) -> None:
        if kind == KIND_VDISK:
            self.vdisks.add(name, number)
        elif kind == KIND_SNAPSHOT:
            self.snapshots.setdefault(origin, {})[name] = number
        elif kind == KIND_DELETED:
            self.deleted.add(number)
        if backing:
            self.clones.setdefault(backing, set()).add(number)

    def add(self, record: ImageRecord) -> Image:
        """A new image, from now on listed, and written with the next consistency point."""
        number = heapq.heappop(self._free_numbers) if self._free_numbers else self._next_number
        self._next_number = max(self._next_number, number + 1)
        backing = self.image(record.backing) if record.backing else None
        image = self._live[number] = self._made(number, record, backing)
        self._entries[number] = b""  # the consistency point fills it in
        self._index(number, record.kind, record.name, record.origin, record.backing)
        image.touch()
        return image

    def _made(self, number: int, record: ImageRecord, backing: Image | None) -> Image:
        return Image(self._state, self._allocator, self._share_map, number, record, backing)

    def entry_written(self, number: int, block: bytes | bytearray | None) -> None:
        """A consistency point has put this entry on disk; None: it was cleared, and the number is
        free again.
        """
        if block is None:
            del self._entries[number]
            self._live.pop(number, None)
            heapq.heappush(self._free_numbers, number)
        else:
            self._entries[number] = bytes(block).rstrip(b"\0")

    def revert(self, numbers: Iterable[int]) -> None:
        """The consistency point of these images' changes failed: list them as the last durable one
        has them, or not at all. Their epochs keep them in memory.

        Nobody was told that a change of the table was made that is not durable. The trees stay as
        they are in memory: clients may have been told of writes that only the intent log holds, and
        go on reading them.
        """
        touched = [self._live[number] for number in numbers]
        for image in touched:
            self._unlist(image)
        for image in touched:
            record = decode(self._entries[image.number])
            if record is None:
                del self._entries[image.number]
                self._live.pop(image.number, None)
            else:
                image.revert(record, self.image(record.backing) if record.backing else None)
                self._index(image.number, record.kind, record.name, record.origin, record.backing)

    # --- Changing what depends on what ------------------------------------------------------------

    def rename(self, image: Image, name: str) -> None:
        """Give a vdisk another name; one that differs in case alone is another name, too."""
        self.check_free(name, image.name)
        image.touch()
        self.vdisks.remove(image.name)
        image.name = name
        image.tree.label = image.label
        self.vdisks.add(name, image.number)

    def mark_deleted(self, image: Image) -> None:
        """Take away its name and its backing store; the tree is left for the background reclaim."""
        image.touch()
        self._unlist(image)
        image.backing = None
        image.backing_blocks = 0
        image.kind, image.name, image.origin = KIND_DELETED, "", 0
        image.tree.label = image.label
        self.deleted.add(image.number)

    def release_backing(self, image: Image) -> Image | None:
        """End a clone's association; returns the snapshot that was behind it. The caller tells
        ``is_released`` when that is durable.
        """
        backing = image.backing
        if backing is None:
            return None
        self.releasing[image.number] = Releasing(
            backing.number, self.full_name(backing), image.backing_blocks
        )
        image.touch()
        self._unlist_clone(image, backing)
        image.backing = None
        image.backing_blocks = 0
        return backing

    def is_released(self, image: Image) -> None:
        """The end of an association is durable, or will never be."""
        self.releasing.pop(image.number, None)

    def _unlist(self, image: Image) -> None:
        """Take away its name, and its place among the clones of what is behind it."""
        if image.kind == KIND_VDISK:
            self.vdisks.remove(image.name)
        elif image.kind == KIND_SNAPSHOT:
            names = self.snapshots[image.origin]
            del names[image.name]
            if not names:
                del self.snapshots[image.origin]
        elif image.kind == KIND_DELETED:
            self.deleted.discard(image.number)
        if image.backing is not None:
            self._unlist_clone(image, image.backing)

    def _unlist_clone(self, image: Image, backing: Image) -> None:
        clones = self.clones[backing.number]
        clones.discard(image.number)
        if not clones:
            del self.clones[backing.number]

    # --- Finding ----------------------------------------------------------------------------------

    def image(self, number: int) -> Image:
        """The image of that number, made from its entry if it is not in memory. Raises
        BlockDamaged if its entry could not be read.
        """
        image = self._live.get(number)
        if image is not None:
            return image
        # It and what stands behind it, as far as that is not in memory either.
        chain: list[tuple[int, ImageRecord]] = []
        while number and number not in self._live:
            self._check_readable(number)
            record = decode(self._entries[number])
            assert record is not None, "an image without an entry is always in memory"
            chain.append((number, record))
            number = record.backing
        behind = self._live.get(number)
        for number, record in reversed(chain):
            behind = image = self._live[number] = self._made(number, record, behind)
        assert image is not None
        return image

    def _check_readable(self, number: int) -> None:
        if number in self._damaged:
            raise BlockDamaged(
                f"the table entry of image {number} is damaged: restore the pool from a copy to get"
                " at what stands on it"
            )
        if number not in self._entries:
            raise NotFound(f"there is no image {number} any more: list again")

    def is_damaged(self, number: int) -> bool:
        """Whether there is an image of that number, but its entry could not be read."""
        return number in self._damaged

    def find(self, number: int) -> Image | None:
        """The image of that number, or None where there is none."""
        return self.image(number) if number in self._entries else None

    def vdisk(self, name: str) -> Image:
        """The vdisk of that name. Raises NotFound."""
        number = self.vdisks.get(name)
        if number is None:
            alike = ", ".join(self.vdisks.alike(name))
            raise NotFound(
                f"there is no vdisk {name}{f', but {alike}' if alike else ''}: `cleavectl vdisk ls`"
                " shows those there are"
            )
        return self.image(number)

    def snapshot_names(self, vdisk: str) -> list[str]:
        """Names of the snapshots of a vdisk, sorted. Raises NotFound."""
        return sorted(self.snapshots.get(self.vdisk(vdisk).number, ()))

    def snapshot(self, vdisk: str, name: str) -> Image:
        """The snapshot ``vdisk@name``. Raises NotFound."""
        number = self.snapshots.get(self.vdisk(vdisk).number, {}).get(name)
        if number is None:
            raise NotFound(
                f"there is no snapshot {vdisk}@{name}: `cleavectl snapshot ls {vdisk}` shows those"
                " there are"
            )
        return self.image(number)

    def check_free(self, name: str, renamed: str | None = None) -> None:
        """Raise Conflict if a vdisk other than ``renamed`` has that name, or one that differs in
        case alone.
        """
        if name in self.vdisks:
            raise Conflict(f"a vdisk {name} exists already: choose another name")
        alike = [found for found in self.vdisks.alike(name) if found != renamed]
        if alike:
            raise Conflict(
                f"a vdisk {alike[0]} exists already, and iSCSI names have no case: {name} would be"
                " the same target; choose another name"
            )

    def full_name(self, image: Image) -> str:
        """``VDISK`` or ``VDISK@SNAPSHOT``."""
        return self.full_name_of(image.number)

    def full_name_of(self, number: int, record: ImageRecord | None = None) -> str:
        """The same by number."""
        if number in self._damaged:
            return f"(damaged image {number})"
        record = record or self.record(number)
        if record.kind == KIND_SNAPSHOT and record.origin in self._damaged:
            return f"(damaged image {record.origin})@{record.name}"
        return (
            f"{self.record(record.origin).name}@{record.name}"
            if record.kind == KIND_SNAPSHOT
            else record.name
        )

    def backing_name(self, number: int, record: ImageRecord | None = None) -> str | None:
        """The full name of the snapshot behind a clone, until its release is durable."""
        releasing = self.releasing.get(number)
        if releasing is not None:
            return releasing.name
        record = record or self.record(number)
        return self.full_name_of(record.backing) if record.backing else None

    def clone_names(self, number: int) -> list[str]:
        """The full names of the clones of a snapshot, until their release is durable."""
        clones = self.clones.get(number, set()) | {
            clone for clone, releasing in self.releasing.items() if releasing.number == number
        }
        return [self.full_name_of(clone) for clone in sorted(clones)]

    def find_record(self, number: int) -> ImageRecord | None:
        """``record``, or None where there is no such image any more."""
        return self.record(number) if number in self._entries else None

    def record(self, number: int) -> ImageRecord:
        """What the table currently says of an image, without making an Image of it. Raises
        NotFound, BlockDamaged.
        """
        image = self._live.get(number)
        if image is None:
            self._check_readable(number)
        record = decode(image.encode() if image is not None else self._entries[number])
        assert record is not None
        return record

    def split_state(self, number: int) -> int:
        """State of a vdisk's split, straight from the entry (layout.SPLIT_...)."""
        entry = self._entries[number]
        return entry[IMAGE_SPLIT_OFFSET] if len(entry) > IMAGE_SPLIT_OFFSET else SPLIT_NONE

    def marked_snapshots(self) -> list[int]:
        """Numbers of the snapshots that are to be deleted as soon as no clone stands on them, and
        on which none stands.
        """
        return [
            number
            for number in self.numbers(KIND_SNAPSHOT)
            if number not in self.clones
            and self.record(number).flags & IMAGE_FLAG_DELETE_AFTER_SPLIT
        ]

    def names_of_clones(self, image: Image) -> list[str]:
        """Full names of what stands on this snapshot, sorted."""
        return sorted(
            self.full_name(self.image(number)) for number in self.clones.get(image.number, ())
        )

    def names_of_uuids(self, wanted: Collection[bytes]) -> dict[bytes, str]:
        """Names of the vdisks of these UUIDs, as far as there are any: straight from the entries,
        of which there may be very many.
        """
        found: dict[bytes, str] = {}
        for name, number in self.vdisks.items():
            # One that is not written yet is in memory.
            uuid = (
                self._entries[number][IMAGE_UUID_OFFSET : IMAGE_UUID_OFFSET + 16]
                or self._live[number].uuid.bytes
            )
            if uuid in wanted:
                found[uuid] = name
        return found

    def numbers(self, kind: int) -> Iterator[int]:
        """Numbers of all images of a kind."""
        if kind == KIND_VDISK:
            yield from self.vdisks.values()
        elif kind == KIND_SNAPSHOT:
            for names in self.snapshots.values():
                yield from names.values()
        else:
            yield from self.deleted
