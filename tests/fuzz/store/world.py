"""The oracle's list of vdisks and snapshots: names, what stands on what, and which of them somebody
is changing.
"""

from collections.abc import Iterator
from typing import Any

from tests.fuzz.store.oracle import Cell, Image

VDISKS = ("a", "b", "c", "d", "e", "f", "g", "h")
SNAPSHOTS = ("s", "t", "u", "v", "w")
DEPTH_MAX = 6


class Disk(Image):
    """A vdisk, or a snapshot (``origin`` is its vdisk then)."""

    def __init__(
        self,
        name: str,
        size_blocks: int,
        cells: dict[int, Cell] | None = None,
        origin: "Disk | None" = None,
        backing: "Disk | None" = None,
    ) -> None:
        super().__init__(name, size_blocks, cells)
        self.origin = origin
        self.backing = backing
        # A split was started: from then on the association may end at any time.
        self.splitting = False
        self.marked = False
        # Somebody resizes, renames or deletes it; so many others must not be met by that.
        self.exclusive = False
        self.shared = 0
        # Grows with every change that may refuse commands that are under way.
        self.disturbed = 0
        self.gone = False
        # What a session would hold.
        self.volume: Any = None
        # Its blocks may be in use though nobody wrote them, or not in use though somebody did.
        self.use_unknown = False

    @property
    def is_snapshot(self) -> bool:
        return self.origin is not None

    @property
    def full_name(self) -> str:
        return self.name if self.origin is None else f"{self.origin.name}@{self.name}"

    @property
    def depth(self) -> int:
        return 0 if self.backing is None else 1 + self.backing.depth

    def claim(self) -> bool:
        """Nobody else may change it; False if somebody does or relies on it."""
        if self.exclusive or self.shared:
            return False
        self.exclusive = True
        return True


class World:
    """All images."""

    def __init__(self) -> None:
        self.vdisks: dict[str, Disk] = {}
        self.snapshots: list[Disk] = []
        # Names that a command under way is giving.
        self.promised: set[str] = set()

    def all(self) -> list[Disk]:
        return [*self.vdisks.values(), *self.snapshots]

    def snapshots_of(self, disk: Disk) -> list[Disk]:
        return [snapshot for snapshot in self.snapshots if snapshot.origin is disk]

    def standing_on(self, snapshot: Disk) -> list[Disk]:
        """What may still read through it."""
        return [disk for disk in self.all() if disk.backing is snapshot]

    def surely_standing_on(self, snapshot: Disk) -> list[Disk]:
        return [
            disk for disk in self.standing_on(snapshot) if not disk.splitting and not disk.marked
        ]

    def free_name(self, number: int) -> str | None:
        names = [name for name in VDISKS if name not in self.vdisks and name not in self.promised]
        return names[number % len(names)] if names else None

    def forget(self, disk: Disk) -> None:
        disk.gone = True
        disk.disturbed += 1
        disk.volume = None
        if disk.is_snapshot:
            self.snapshots.remove(disk)
        else:
            del self.vdisks[disk.name]
        for other in self.standing_on(disk):
            other.backing = None

    def blocks(self) -> set[int]:
        """Blocks that any image has."""
        return {fbn for disk in self.all() for fbn in disk.cells}

    def sure_names(self) -> set[str]:
        """Names that every list must have just now."""
        return {
            disk.full_name
            for disk in self.all()
            if not disk.exclusive
            and not disk.marked
            and not (disk.origin is not None and disk.origin.exclusive)
        }

    def unsure(self) -> Iterator[Disk]:
        """Marked snapshots: they go as soon as nothing stands on them."""
        return (snapshot for snapshot in self.snapshots if snapshot.marked)
