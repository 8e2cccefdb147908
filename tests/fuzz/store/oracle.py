"""What every block of every image may hold, said without any of the store's code.

An image is a dict of blocks. A block that nobody is changing is its 4096 bytes; one that is being
changed, or whose last change may still be lost with the power, is a `History`: a base, and the
writes since. From the moments at which a write began and ended two rules follow:

- a value may be *read* unless a later write (begun after the value's own write had ended) was
  acknowledged;
- a value may be *found after a power loss* unless a later write was acknowledged as durable.

Moments are numbers of events, so no two are equal. All of it works block by block, with a bit a
sector; sectors are only looked at one by one where several values are possible.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

BLOCK_BYTES: Final = 4096
SECTOR_BYTES: Final = 512
# Blocks that one read of a comparison takes.
RUN_BLOCKS = 32
SECTORS: Final = 8
ALL: Final = 0xFF
ZEROS: Final = bytes(BLOCK_BYTES)
FOREVER: Final = 1 << 62
# Whole blocks up to here are read, and found after a crash, entirely or not at all
# (protocol.volume.ATOMIC_WRITE_BYTES_MAX).
ATOMIC_BLOCKS: Final = 32


class Wrong(AssertionError):
    """The store broke a promise."""


def content(version: int, lba: int, sectors: int) -> bytes:
    """Data for ``sectors`` sectors from ``lba`` on; each says the write that it is of, and its own
    address.
    """
    tags = np.empty((sectors, SECTOR_BYTES // 8), dtype="<u8")
    tags[:] = (np.arange(lba, lba + sectors, dtype="<u8") | np.uint64(version << 40))[:, None]
    return tags.tobytes()


def said_by(sector: bytes) -> str:
    """A sector in words."""
    tag = int.from_bytes(sector[:8], "little")
    if not tag:
        return "zeros" if not any(sector) else "garbage"
    return f"write {tag >> 40} for LBA {tag & (1 << 40) - 1}" + (
        "" if sector == sector[:8] * 64 else " (torn)"
    )


@dataclass(slots=True, eq=False)
class Write:
    """One change of data: a write, a trim, a copy. ``version`` names it."""

    version: int
    start: int
    what: str = ""
    atomic: bool = False
    end: int = FOREVER
    acknowledged: bool = False
    durable: bool = False
    # Where it is listed as a possible value.
    entered: "list[tuple[int, Value]]" = field(default_factory=list)


# A value that sectors may have: the write that it is of, a bit for each of its sectors, the block
# with those sectors in their places.
Value = tuple[Write, int, bytes]
# What all had before anything happened.
FIRST: Final = Write(0, -1, "the first", end=-1, acknowledged=True, durable=True)


class History:
    """A block with several possible values."""

    __slots__ = ("values",)

    def __init__(self, base: bytes) -> None:
        self.values: list[Value] = [(FIRST, ALL, base)]

    def add(self, write: Write, mask: int, data: bytes) -> None:
        self.values.append((write, mask, data))

    def remove(self, write: Write) -> None:
        self.values = [value for value in self.values if value[0] is not write]

    def allowed(self, crashed: bool = False) -> list[Value]:
        """What may be read now; or after a loss of power now."""
        found = []
        for value in self.values:
            write, mask, _ = value
            for later, covered, _ in self.values:
                if (later.durable if crashed else later.acknowledged) and later.start > write.end:
                    mask &= ~covered
            if mask:
                found.append((write, mask, value[2]))
        return found

    def settled(self) -> bytes | None:
        """The block's bytes, if only one value is possible for each sector, whatever happens;
        forgets what is not possible any more.
        """
        self.values = self.allowed(crashed=True)
        seen = 0
        for write, mask, _ in self.values:
            if write.end == FOREVER or seen & mask:
                return None
            seen |= mask
        return merged(self.values)


def merged(values: list[Value]) -> bytes:
    """A block made of values, the later over the earlier."""
    if len(values) == 1 and values[0][1] == ALL:
        return values[0][2]
    block = bytearray(BLOCK_BYTES)
    for _, mask, data in values:
        for sector in range(SECTORS):
            if mask >> sector & 1:
                block[sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES] = data[
                    sector * SECTOR_BYTES : (sector + 1) * SECTOR_BYTES
                ]
    return bytes(block)


# A snapshot that was taken while writes were under way has lists of values; what is found first is
# what it holds for ever.
Cell = bytes | History | list[Value]


def values_of(cell: Cell, crashed: bool = False) -> list[Value]:
    if isinstance(cell, bytes):
        return [(FIRST, ALL, cell)]
    return cell.allowed(crashed) if isinstance(cell, History) else cell


@dataclass(slots=True, eq=False)
class Moment:
    """When a group of snapshots was taken: the bounds move closer with everything that is found in
    them.
    """

    earliest: int
    latest: int = FOREVER
    # The writes that say so.
    after: str = ""
    before: str = ""


@dataclass(slots=True, eq=False)
class Reading:
    """A read, an allocation report or the source of a copy that is under way: what it may find."""

    first: int
    count: int
    start: int
    cells: dict[int, Cell]
    during: dict[int, list[Value]] = field(default_factory=dict)
    copy: "tuple[Image, int, Write] | None" = None

    def allowed(self, fbn: int) -> list[Value]:
        return [*values_of(self.cells.get(fbn, ZEROS)), *self.during.get(fbn, ())]


@dataclass(slots=True, eq=False)
class Taking:
    """A snapshot that is being made of one image."""

    cells: dict[int, Cell]
    moment: Moment
    size_blocks: int
    during: list[tuple[int, Value]] = field(default_factory=list)


class Image:
    """A vdisk or a snapshot. Blocks that are not listed are zeros."""

    def __init__(self, name: str, size_blocks: int, cells: dict[int, Cell] | None = None) -> None:
        self.name = name
        self.size_blocks = size_blocks
        self.cells: dict[int, Cell] = cells if cells is not None else {}
        self.unsettled: set[int] = set()
        self.readings: list[Reading] = []
        self.takings: list[Taking] = []
        # Trims that are under way: first block, end, the write. A block that is listed meanwhile
        # must hear of them.
        self.zeroings: list[tuple[int, int, Write]] = []
        self.under_way: list[Write] = []
        self.undurable: list[Write] = []
        self.moment: Moment | None = None

    # --- Reading ----------------------------------------------------------------------------------

    def begin_read(self, first: int, count: int, now: int) -> Reading:
        cells = self.cells
        if count <= 64:
            found = {fbn: cells[fbn] for fbn in range(first, first + count) if fbn in cells}
        else:
            found = {fbn: cell for fbn, cell in cells.items() if first <= fbn < first + count}
        for fbn in self.unsettled.intersection(found):
            cell = found[fbn]
            if isinstance(cell, History):
                found[fbn] = cell.allowed()
        reading = Reading(first, count, now, found)
        self.readings.append(reading)
        return reading

    def end_read(self, reading: Reading) -> None:
        self.readings.remove(reading)

    # --- Writing ----------------------------------------------------------------------------------

    def begin_write(self, write: Write, parts: list[tuple[int, int, bytes]]) -> None:
        """``parts``: block, mask, data."""
        self.under_way.append(write)
        for fbn, mask, data in parts:
            self.enter(fbn, (write, mask, data))

    def begin_copy(self, write: Write, reading: Reading, shift: int) -> None:
        """Blocks become what another image's are found to hold, ``shift`` blocks further on."""
        self.under_way.append(write)
        reading.copy = (self, shift, write)
        for fbn in range(reading.first, reading.first + reading.count):
            for _, mask, data in reading.allowed(fbn):
                self.enter(fbn + shift, (write, mask, data))

    def begin_zero(self, write: Write, start: int, end: int) -> None:
        """Zeros for sectors [start, end): of blocks that are listed, and of those that will be
        while it is under way.
        """
        first, last = start // SECTORS, -(-end // SECTORS)
        zeroing = (start, end, write)
        self.zeroings.append(zeroing)
        self.under_way.append(write)
        touched = (
            range(first, last)
            if last - first <= len(self.cells)
            else [fbn for fbn in self.cells if first <= fbn < last]
        )
        for fbn in [fbn for fbn in touched if fbn in self.cells]:
            self.enter(fbn, (write, mask_of(fbn, start, end), ZEROS))
        for reading in self.readings:
            if (
                reading.copy is None
                or reading.first >= last
                or first >= reading.first + reading.count
            ):
                continue
            for fbn in reading.cells:  # a copy under way may find zeros now
                if first <= fbn < last:
                    self._copied(reading, fbn, (write, mask_of(fbn, start, end), ZEROS))

    def enter(self, fbn: int, value: Value) -> None:
        """One more possible value of a block, for all who look at it."""
        write = value[0]
        cell = self.cells.get(fbn, ZEROS)
        if isinstance(cell, bytes):
            cell = History(cell)
            self.cells[fbn] = cell
            self.unsettled.add(fbn)
            for start, end, zeroing in self.zeroings:
                mask = mask_of(fbn, start, end)
                if mask and zeroing is not write:
                    self._list(fbn, cell, (zeroing, mask, ZEROS))
        assert isinstance(cell, History), "a snapshot is not written"
        self._list(fbn, cell, value)

    def _list(self, fbn: int, cell: History, value: Value) -> None:
        cell.add(*value)
        value[0].entered.append((fbn, value))
        for reading in self.readings:
            if reading.first <= fbn < reading.first + reading.count:
                reading.during.setdefault(fbn, []).append(value)
                if reading.copy is not None:
                    self._copied(reading, fbn, value)
        for taking in self.takings:
            taking.during.append((fbn, value))

    @staticmethod
    def _copied(reading: Reading, fbn: int, value: Value) -> None:
        assert reading.copy is not None
        to, shift, write = reading.copy
        to.enter(fbn + shift, (write, value[1], value[2]))

    def end_write(self, write: Write, now: int, outcome: str, durable: bool = False) -> None:
        """``outcome``: ``done``; ``refused`` (nothing was changed); ``unknown`` (each sector may be
        old or new).
        """
        write.end = now
        self.under_way.remove(write)
        self.zeroings = [entry for entry in self.zeroings if entry[2] is not write]
        if outcome == "refused":
            for fbn in blocks_of(write):
                cell = self.cells.get(fbn)
                if isinstance(cell, History):
                    cell.remove(write)
                    self._settle(fbn, cell)
        elif outcome == "done":
            write.acknowledged = True
            if durable:
                write.durable = True
                self._settle_blocks(write)
            else:
                self.undurable.append(write)

    def flushed(self, before: int) -> None:
        """What was complete before that moment is durable."""
        left = []
        for write in self.undurable:
            if write.end > before:
                left.append(write)
            else:
                write.durable = True
        done, self.undurable = self.undurable, left
        for write in done:
            if write.durable:
                self._settle_blocks(write)

    def _settle_blocks(self, write: Write) -> None:
        for fbn in blocks_of(write):
            cell = self.cells.get(fbn)
            if isinstance(cell, History):
                self._settle(fbn, cell)
        write.entered = []

    def _settle(self, fbn: int, cell: History) -> None:
        block = cell.settled()
        if block is not None:
            self.set(fbn, block)

    def set(self, fbn: int, block: bytes) -> None:
        """Only this is possible from now on."""
        self.unsettled.discard(fbn)
        if block == ZEROS:
            self.cells.pop(fbn, None)
        else:
            self.cells[fbn] = block

    # --- Size -------------------------------------------------------------------------------------

    def resized(self, size_blocks: int, cut: Write | None = None) -> None:
        """What lies beyond a smaller end is gone; writes that are under way may have been there
        before, or come when it has grown again.
        """
        if size_blocks < self.size_blocks:
            for fbn in [fbn for fbn in self.cells if fbn >= size_blocks]:
                del self.cells[fbn]
                self.unsettled.discard(fbn)
            for write in self.under_way:
                entered, write.entered = write.entered, []
                for fbn, value in entered:
                    if fbn < size_blocks:
                        write.entered.append((fbn, value))
                    else:
                        self.enter(fbn, value)
                        if cut is not None:
                            self.enter(fbn, (cut, ALL, ZEROS))
        self.size_blocks = size_blocks

    # --- Snapshots --------------------------------------------------------------------------------

    def begin_taking(self, moment: Moment) -> Taking:
        cells = dict(self.cells)
        for fbn in self.unsettled:
            cell = cells[fbn]
            if isinstance(cell, History):
                cells[fbn] = cell.allowed()
        taking = Taking(cells, moment, self.size_blocks)
        self.takings.append(taking)
        return taking

    def stop_taking(self, taking: Taking) -> None:
        if taking in self.takings:
            self.takings.remove(taking)

    def take_over(self, origin: "Image", taking: Taking) -> None:
        """This is the snapshot that was taken."""
        origin.stop_taking(taking)
        self.moment = taking.moment
        self.cells = taking.cells
        for fbn, value in taking.during:
            self.cells[fbn] = [*values_of(self.cells.get(fbn, ZEROS)), value]
        self.unsettled = {fbn for fbn, cell in self.cells.items() if not isinstance(cell, bytes)}

    def forget_beyond(self) -> None:
        """What writes might have brought beyond the end, had it grown again."""
        for fbn in [fbn for fbn in self.unsettled if fbn >= self.size_blocks]:
            self.set(fbn, ZEROS)

    def crashed(self, now: int, power: bool) -> None:
        """The process is gone, or the power: what was under way ends, and nothing of it was
        acknowledged.
        """
        for write in self.under_way:
            write.end = now
        self.under_way, self.zeroings, self.readings, self.takings, self.undurable = (
            [],
            [],
            [],
            [],
            [],
        )
        for fbn in self.unsettled:
            cell = self.cells[fbn]
            if isinstance(cell, History):
                self.cells[fbn] = cell.allowed(crashed=power)


def blocks_of(write: Write) -> list[int]:
    """Blocks in which it is listed, each once."""
    return list(dict.fromkeys(fbn for fbn, _ in write.entered))


def mask_of(fbn: int, start: int, end: int) -> int:
    """The sectors of a block that lie in sectors [start, end)."""
    low, high = max(0, start - fbn * SECTORS), min(SECTORS, end - fbn * SECTORS)
    return (1 << high) - (1 << low) if low < high else 0


# --- Judging --------------------------------------------------------------------------------------


class Judge:
    """Looks at the blocks that one read, or one look at a whole image, has found."""

    def __init__(self, image: Image, what: str) -> None:
        self.image = image
        self.what = what
        # Of writes that must be seen entirely or not at all: where they were seen, and where
        # something older was.
        self._seen: dict[Write, int] = {}
        self._missed: dict[Write, int] = {}

    def block(self, fbn: int, values: list[Value], found: bytes, mask: int = ALL) -> None:
        """``found``: the block, of which the sectors in ``mask`` count."""
        if len(values) == 1 and values[0][2] == found:
            return
        for sector in range(SECTORS):
            if mask >> sector & 1:
                at = slice(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)
                self._sector(
                    fbn * SECTORS + sector,
                    [value for value in values if value[1] >> sector & 1],
                    found[at],
                    at,
                )

    def _sector(self, lba: int, values: list[Value], found: bytes, at: slice) -> None:
        matching = [value for value in values if value[2][at] == found]
        if not matching:
            allowed = ", ".join(
                f"{said_by(value[2][at])} ({value[0].what or value[0].version})" for value in values
            )
            raise Wrong(
                f"{self.what}: LBA {lba} of {self.image.name} holds {said_by(found)}; allowed:"
                f" {allowed}"
            )
        if len(values) == 1 or len(matching) > 1:
            return
        seen = matching[0][0]
        self._moment(lba, seen, values)
        for value in values:
            write = value[0]
            if write is seen:
                self._seen[write] = lba
            elif write.start > seen.end:
                self._missed[write] = lba

    def _moment(self, lba: int, seen: Write, values: list[Value]) -> None:
        moment = self.image.moment
        if moment is None:
            return
        if seen.start > moment.earliest:
            moment.earliest, moment.after = (
                seen.start,
                f"{seen.what} at LBA {lba} of {self.image.name}",
            )
        for write, _, _ in values:
            if write.acknowledged and write.start > seen.end and write.end < moment.latest:
                moment.latest, moment.before = (
                    write.end,
                    f"{write.what} at LBA {lba} of {self.image.name}",
                )
        if moment.earliest > moment.latest:
            raise Wrong(
                f"{self.what}: it holds {moment.after}, but not {moment.before}, acknowledged"
                " before that began"
            )

    def end(self) -> None:
        for write, lba in self._seen.items():
            if write.atomic and write in self._missed:
                raise Wrong(
                    f"{self.what}: {write.what} on {self.image.name} is there at LBA {lba} and not"
                    f" at LBA {self._missed[write]}"
                )


def runs_of(fbns: list[int]) -> list[tuple[int, int]]:
    """First block and length of runs of neighbours, none longer than RUN_BLOCKS."""
    runs: list[tuple[int, int]] = []
    for fbn in fbns:
        if runs and runs[-1][0] + runs[-1][1] == fbn and runs[-1][1] < RUN_BLOCKS:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((fbn, 1))
    return runs
