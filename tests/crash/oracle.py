"""What a pool must hold after a power loss, said without any of the store's code: images are dicts
of sectors, a snapshot is a copy.

For each sector the model keeps the last durable value and every one written since: after a power
loss any of them may be there, and nothing else. A change of the table that is not acknowledged yet
gives two *worlds*, before it and after it; the pool must be one of them, whole.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

SECTOR_BYTES = 512
SECTORS_PER_BLOCK = 8
BLOCK_BYTES = SECTOR_BYTES * SECTORS_PER_BLOCK
ZEROS = bytes(SECTOR_BYTES)
ZEROS_ONLY = (ZEROS,)
TAG = b"cleaved-test-data"

# Oldest first: the durable value, then those written since.
Allowed = tuple[bytes, ...]


def sector(vdisk: str, lba: int, version: int) -> bytes:
    """Data that names the vdisk, its address and the write it comes from, so that no sector can
    stand in for another.
    """
    return (
        b"%s %s lba %d version %d " % (TAG, vdisk.encode(), lba, version)
        + bytes([65 + version % 26]) * 400
        + ZEROS
    )


def data(vdisk: str, lba: int, count: int, version: int) -> bytes:
    return b"".join(sector(vdisk, at, version)[:SECTOR_BYTES] for at in range(lba, lba + count))


@dataclass
class Disk:
    """A vdisk or a snapshot. Sectors that are not listed are zeros, durably."""

    size_blocks: int
    sectors: dict[int, Allowed] = field(default_factory=dict)
    # Writes that are there entirely or not at all, and not known to be durable yet: first sector,
    # content.
    atomic: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, lba: int, content: bytes) -> None:
        for step in range(len(content) // SECTOR_BYTES):
            new = content[step * SECTOR_BYTES : (step + 1) * SECTOR_BYTES]
            self.sectors[lba + step] = (*self.sectors.get(lba + step, ZEROS_ONLY), new)

    def write_atomic(self, lba: int, content: bytes) -> None:
        self.write(lba, content)
        self.atomic.append((lba, content))

    def durable(self) -> None:
        """Everything written so far has been acknowledged as durable."""
        self.atomic = []
        self.sectors = {lba: allowed[-1:] for lba, allowed in self.sectors.items()}

    def durable_range(self, lba: int, count: int) -> None:
        for at in range(lba, lba + count):
            self.sectors[at] = self.sectors[at][-1:]

    def copy(self) -> "Disk":
        return Disk(self.size_blocks, dict(self.sectors), list(self.atomic))

    def resized(self, size_blocks: int) -> "Disk":
        end = size_blocks * SECTORS_PER_BLOCK
        return Disk(
            size_blocks, {lba: allowed for lba, allowed in self.sectors.items() if lba < end}
        )

    def read(self, fbn: int) -> bytes:
        """The block as clients read it now."""
        first = fbn * SECTORS_PER_BLOCK
        return b"".join(
            self.sectors.get(lba, ZEROS_ONLY)[-1] for lba in range(first, first + SECTORS_PER_BLOCK)
        )


Disks = dict[str, Disk]


@dataclass
class Model:
    """All images by name (``VDISK``, ``VDISK@SNAPSHOT``). ``after`` is the world of the change of
    the table that is under way.
    """

    disks: Disks = field(default_factory=dict)
    after: Disks | None = None
    version: int = 0

    def all_durable(self) -> None:
        for disk in self.disks.values():
            disk.durable()

    def begin(self) -> Disks:
        """Begin a change of the table: returns the world after it, to be changed. It is a
        consistency point, so all in it is durable.
        """
        assert self.after is None
        self.after = {name: disk.copy() for name, disk in self.disks.items()}
        for disk in self.after.values():
            disk.durable()
        return self.after

    def acknowledged(self) -> None:
        """The change of the table was made."""
        assert self.after is not None
        self.disks, self.after = self.after, None

    def refused(self) -> None:
        self.after = None

    def next_data(self, vdisk: str, lba: int, count: int) -> bytes:
        self.version += 1
        return data(vdisk, lba, count, self.version)

    def expectation(self) -> "Expectation":
        worlds = [self.disks] if self.after is None else [self.disks, self.after]
        return Expectation([World(disks) for disks in worlds])


Block = bytes | tuple[Allowed, ...]


class World:
    """One way in which the pool may be found. ``blocks[name][fbn]`` is what the block holds, or for
    each sector what it may hold.
    """

    def __init__(self, disks: Mapping[str, Disk]) -> None:
        self.sizes = {name: disk.size_blocks for name, disk in disks.items()}
        # Every address that any image ever used is looked at in every image: that is how one
        # image's data would show in another.
        addresses = {lba // SECTORS_PER_BLOCK for disk in disks.values() for lba in disk.sectors}
        self.blocks = {name: expected_blocks(disk, addresses) for name, disk in disks.items()}
        self.atomic = {
            name: [Atomic(disk, lba, content) for lba, content in disk.atomic]
            for name, disk in disks.items()
            if disk.atomic
        }

    def key(self) -> int:
        """Two worlds of the same key expect the same."""
        blocks = sorted(
            (name, size, tuple(sorted(self.blocks[name].items(), key=first)))
            for name, size in self.sizes.items()
        )
        return hash(
            (
                tuple(blocks),
                tuple(
                    (name, *(one.new for one in writes))
                    for name, writes in sorted(self.atomic.items())
                ),
            )
        )


class Atomic:
    """A write of which no part may be found beside what it replaced. ``new`` and ``older`` are by
    sector, as (sector, content).
    """

    def __init__(self, disk: Disk, lba: int, content: bytes) -> None:
        sectors = range(lba, lba + len(content) // SECTOR_BYTES)
        self.new = tuple(
            (at, content[(at - lba) * SECTOR_BYTES : (at - lba + 1) * SECTOR_BYTES])
            for at in sectors
        )
        # What a later write put there says nothing of this one, and zeros may be both.
        self._older = {at: only_before(disk.sectors[at], new) for at, new in self.new}

    def blocks(self) -> list[int]:
        return sorted({at // SECTORS_PER_BLOCK for at, _ in self.new})

    def torn(self, found: Mapping[int, bytes]) -> str | None:
        """``found`` are the blocks that it covers. None if it is there as a whole, or
        not at all.
        """
        shown = {
            at: found[at // SECTORS_PER_BLOCK][at % SECTORS_PER_BLOCK * SECTOR_BYTES :][
                :SECTOR_BYTES
            ]
            for at, _ in self.new
        }
        there = [at for at, new in self.new if shown[at] == new]
        missing = [at for at, older in self._older.items() if shown[at] in older]
        if there and missing:
            return (
                f"of an atomic write sector {there[0]} is there, and sector {missing[0]} holds"
                f" {brief(shown[missing[0]])}"
            )
        return None


def only_before(allowed: Allowed, new: bytes) -> set[bytes]:
    """What a sector can only hold if ``new`` is not there yet."""
    at = allowed.index(new) if new in allowed else 0
    return set(allowed[:at]) - set(allowed[at:])


def first(pair: tuple[int, Block]) -> int:
    return pair[0]


def expected_blocks(disk: Disk, addresses: Iterable[int]) -> dict[int, Block]:
    near = {fbn + step for fbn in addresses for step in (0, 1)} | {0, disk.size_blocks - 1}
    blocks: dict[int, Block] = {}
    for fbn in near:
        if fbn >= disk.size_blocks:
            continue
        lba = fbn * SECTORS_PER_BLOCK
        allowed = tuple(
            disk.sectors.get(at, ZEROS_ONLY) for at in range(lba, lba + SECTORS_PER_BLOCK)
        )
        blocks[fbn] = (
            b"".join(one[0] for one in allowed)
            if all(len(one) == 1 for one in allowed)
            else allowed
        )
    return blocks


class Expectation:
    """What may be found after a power loss at one moment."""

    def __init__(self, worlds: list[World]) -> None:
        self.worlds = worlds
        self.key = hash(tuple(world.key() for world in worlds))


def differs(expected: Block, found: bytes) -> str | None:
    """None if the block holds what it may; else what is wrong, in words."""
    if expected == found:
        return None
    if isinstance(expected, bytes):
        expected = tuple(
            (expected[at : at + SECTOR_BYTES],) for at in range(0, BLOCK_BYTES, SECTOR_BYTES)
        )
    for at, allowed in enumerate(expected):
        there = found[at * SECTOR_BYTES : (at + 1) * SECTOR_BYTES]
        if there not in allowed:
            return f"sector {at} holds {brief(there)}, allowed: {', '.join(map(brief, allowed))}"
    return None


def brief(content: bytes) -> str:
    return (
        "zeros"
        if content == ZEROS
        else content[:64]
        .split(b"  ")[0]
        .rstrip(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ\0")
        .decode(errors="replace")
        .strip()
    )


def after_kill(disk: Disk, fbn: int, found: bytes) -> str:
    """What a block holds after the death of the process, which loses nothing: ``newest``;
    ``older``, which only what was not flushed may be, and only where something rotted; or
    ``wrong``.
    """
    if found == disk.read(fbn):
        return "newest"
    lba = fbn * SECTORS_PER_BLOCK
    allowed = tuple(disk.sectors.get(at, ZEROS_ONLY) for at in range(lba, lba + SECTORS_PER_BLOCK))
    return "wrong" if differs(allowed, found) is not None else "older"


def flushed(disk: Disk, fbn: int) -> bool:
    """Whether all that was written to the block was acknowledged as durable."""
    first = fbn * SECTORS_PER_BLOCK
    return all(
        len(disk.sectors.get(lba, ZEROS_ONLY)) == 1
        for lba in range(first, first + SECTORS_PER_BLOCK)
    )


def places_named(content: bytes) -> set[tuple[str, int, int]]:
    """(vdisk, block, version) of each sector of test data in a block."""
    found = set()
    for at in range(0, BLOCK_BYTES, SECTOR_BYTES):
        if content[at:].startswith(TAG):
            vdisk, _, lba, _, version = content[at + len(TAG) + 1 :].split(b" ", 5)[:5]
            found.add((vdisk.decode(), int(lba) // SECTORS_PER_BLOCK, int(version)))
    return found
