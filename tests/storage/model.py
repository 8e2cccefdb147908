"""What a pool promises, as plainly as it can be said: each image is a dict of sectors, and a
snapshot is a copy of one.

The model knows nothing of blocks, trees or sharing. What it does know is durability: for each
sector that was written and not yet made durable it keeps every content that a crash may leave, and
after a crash it takes over what the pool is found to hold, if that is allowed.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

SECTOR_BYTES = 512
SECTORS_PER_BLOCK = 8
BLOCK_BYTES = SECTOR_BYTES * SECTORS_PER_BLOCK
ZEROS = bytes(SECTOR_BYTES)

Sectors = dict[int, bytes]


def pattern(vdisk: int, lba: int, count: int, version: int) -> bytes:
    """Data for ``count`` sectors from ``lba`` on: every sector names the vdisk, its own address and
    the write it comes from.
    """
    return b"".join(
        struct.pack("<QQQQ", vdisk + 1, lba + step, version, 0x5EC7).ljust(SECTOR_BYTES, b"\x5a")
        for step in range(count)
    )


@dataclass
class Image:
    """A vdisk or a snapshot. Sectors that are not listed are zeros."""

    number: int
    size_blocks: int
    sectors: Sectors = field(default_factory=dict)
    # Contents that a sector may also have after a crash.
    at_risk: dict[int, set[bytes]] = field(default_factory=dict)
    # Blocks that were ever written or trimmed, here or in what this came from: those worth reading
    # back.
    touched: set[int] = field(default_factory=set)
    backing: str | None = None
    sessions: int = 0

    @property
    def size_sectors(self) -> int:
        return self.size_blocks * SECTORS_PER_BLOCK

    def write(self, lba: int, data: bytes) -> None:
        """Replace sectors; until ``durable`` a crash may bring back any of the contents since the
        last time.
        """
        for step in range(len(data) // SECTOR_BYTES):
            sector = data[step * SECTOR_BYTES : (step + 1) * SECTOR_BYTES]
            old = self.sectors.get(lba + step, ZEROS)
            self.at_risk.setdefault(lba + step, set()).add(old)
            self._set(lba + step, sector)
        self.touch(lba, len(data) // SECTOR_BYTES)

    def zero(self, lba: int, count: int) -> None:
        """Make sectors zeros. Of those that are zeros already nothing needs to be kept, so the
        range may be as large as the image.
        """
        for sector in [
            sector for sector in {*self.sectors, *self.at_risk} if lba <= sector < lba + count
        ]:
            self.at_risk.setdefault(sector, set()).add(self.sectors.get(sector, ZEROS))
            self._set(sector, ZEROS)
        # The edges are where a trim goes wrong.
        self.touch(lba, 1)
        self.touch(lba + count - 1, 1)

    def _set(self, lba: int, sector: bytes) -> None:
        if sector == ZEROS:
            self.sectors.pop(lba, None)
        else:
            self.sectors[lba] = sector

    def touch(self, lba: int, count: int) -> None:
        self.touched.update(
            range(lba // SECTORS_PER_BLOCK, (lba + count - 1) // SECTORS_PER_BLOCK + 1)
        )

    def durable(self) -> None:
        self.at_risk.clear()

    def durable_range(self, lba: int, count: int) -> None:
        for sector in range(lba, lba + count):
            self.at_risk.pop(sector, None)

    def read(self, lba: int, count: int) -> bytes:
        return b"".join(self.sectors.get(sector, ZEROS) for sector in range(lba, lba + count))

    def resize(self, size_blocks: int) -> None:
        self.size_blocks = size_blocks
        self.sectors = {
            lba: sector for lba, sector in self.sectors.items() if lba < self.size_sectors
        }
        self.touched.add(size_blocks - 1)

    def copy(self, number: int) -> "Image":
        return Image(number, self.size_blocks, dict(self.sectors), touched=set(self.touched))

    def blocks_to_read(self) -> list[int]:
        """Blocks to compare with the pool: all that were touched, their neighbours, and
        the ends.
        """
        near = {fbn + step for fbn in self.touched for step in (-1, 0, 1)} | {
            0,
            self.size_blocks - 1,
        }
        return sorted(fbn for fbn in near if 0 <= fbn < self.size_blocks)

    def take_over(self, fbn: int, found: bytes) -> None:
        """After a crash: the block is found like this, which must be allowed; from now on it is
        what the block holds.
        """
        for step in range(SECTORS_PER_BLOCK):
            lba = fbn * SECTORS_PER_BLOCK + step
            sector = found[step * SECTOR_BYTES : (step + 1) * SECTOR_BYTES]
            allowed = {self.sectors.get(lba, ZEROS), *self.at_risk.get(lba, ())}
            assert sector in allowed, (
                f"sector {lba} of image {self.number} holds {sector[:32]!r}, allowed were"
                f" {[one[:32] for one in allowed]}"
            )
            self._set(lba, sector)


@dataclass
class PoolModel:
    """All images by the names under which the pool knows them. ``version`` numbers the writes."""

    images: dict[str, Image] = field(default_factory=dict)
    version: int = 0
    next_number: int = 0

    def number(self) -> int:
        self.next_number += 1
        return self.next_number

    def vdisks(self) -> list[str]:
        return sorted(name for name in self.images if "@" not in name)

    def snapshots(self) -> list[str]:
        return sorted(name for name in self.images if "@" in name)

    def snapshots_of(self, vdisk: str) -> list[str]:
        return sorted(name for name in self.images if name.startswith(f"{vdisk}@"))

    def clones_of(self, snapshot: str) -> list[str]:
        """What stands on a snapshot: clones, and snapshots of clones."""
        return sorted(name for name, image in self.images.items() if image.backing == snapshot)

    def data(self, vdisk: str, lba: int, count: int) -> bytes:
        """Fresh data for a write, unlike that of any other."""
        self.version += 1
        return pattern(self.images[vdisk].number, lba, count, self.version)

    def all_durable(self) -> None:
        """A consistency point was taken."""
        for image in self.images.values():
            image.durable()

    def create(self, name: str, size_blocks: int) -> None:
        self.images[name] = Image(self.number(), size_blocks)

    def snapshot(self, vdisk: str, name: str) -> None:
        origin = self.images[vdisk]
        made = self.images[f"{vdisk}@{name}"] = origin.copy(self.number())
        made.backing = origin.backing

    def clone(self, snapshot: str, name: str) -> None:
        made = self.images[name] = self.images[snapshot].copy(self.number())
        made.backing = snapshot

    def rename(self, old: str, new: str) -> None:
        for name in [name for name in self.images if name == old or name.startswith(f"{old}@")]:
            self.images[new + name.removeprefix(old)] = self.images.pop(name)
        for image in self.images.values():
            if image.backing is not None and image.backing.startswith(f"{old}@"):
                image.backing = new + image.backing.removeprefix(old)

    def delete(self, name: str) -> None:
        del self.images[name]

    def lbas(self) -> Iterator[tuple[str, int]]:
        for name, image in self.images.items():
            yield from ((name, lba) for lba in image.sectors)
