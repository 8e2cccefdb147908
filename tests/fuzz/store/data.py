"""What clients do: each command is begun, and judged when it is answered."""

from typing import TYPE_CHECKING, Any

from storage.errors import NotFound, OutOfRange, PoolFull
from tests.fuzz.store import plan as plans
from tests.fuzz.store.oracle import (
    ATOMIC_BLOCKS,
    BLOCK_BYTES,
    SECTOR_BYTES,
    SECTORS,
    ZEROS,
    Judge,
    Reading,
    Write,
    Wrong,
    content,
    mask_of,
)
from tests.fuzz.store.plan import Operation
from tests.fuzz.store.world import Disk

if TYPE_CHECKING:
    from tests.fuzz.store.session import Flight, Session

# Blocks of a write that is allocated, written and installed in one step: if it is refused, nothing
# was changed.
ONE_STEP_BLOCKS = 64


class Data:
    """Begins data commands of a session."""

    def __init__(self, session: "Session") -> None:
        self.session = session

    # --- Where ------------------------------------------------------------------------------------

    def volume(self, disk: Disk) -> Any:
        """What a session that is logged in holds; None where the name leads nowhere just now."""
        if disk.volume is None and not disk.gone:
            try:
                disk.volume = self.session.pool.volume(disk.full_name)
            except NotFound:
                if (
                    not disk.exclusive
                    and not disk.marked
                    and not (disk.origin is not None and disk.origin.exclusive)
                ):
                    raise Wrong(f"{disk.full_name} is not found") from None
        return disk.volume

    def vdisk(self, number: int) -> Disk | None:
        disks = list(self.session.world.vdisks.values())
        return disks[number % len(disks)] if disks else None

    def any_disk(self, number: int) -> Disk | None:
        world = self.session.world
        if world.snapshots and number & 3 == 0:
            return world.snapshots[(number >> 2) % len(world.snapshots)]
        return self.vdisk(number >> 2)

    def block(self, disk: Disk, number: int) -> int:
        plan, spots = self.session.plan, self.session.spots
        leaf = number % plan.leaves * plan.stride
        fbn: int = (leaf * 256 + spots[(number >> 12) % len(spots)]) % disk.size_blocks
        return fbn

    # --- Beginning --------------------------------------------------------------------------------

    def begin(self, operation: Operation) -> None:
        kind = operation.kind
        disk = (
            self.any_disk(operation.a)
            if kind in {plans.READ, plans.REPORT}
            else self.vdisk(operation.a)
        )
        if disk is None or self.volume(disk) is None:
            return
        fbn, c = self.block(disk, operation.b), operation.c
        match kind:
            case plans.READ | plans.COMPARE:
                self.read(disk, *self.sectors(disk, fbn, c), operation)
            case plans.FLUSH:
                self.flush(disk)
            case plans.UNMAP | plans.ZEROS:
                self.zero(kind, disk, fbn, c)
            case plans.COPY:
                self.copy(disk, operation)
            case plans.REPORT:
                self.report(disk, fbn, c)
            case plans.PARTIAL:
                start = fbn * SECTORS + c % SECTORS
                self.write(
                    kind, disk, start, min(1 + (c >> 3) % 20, disk.size_blocks * SECTORS - start), c
                )
            case _:
                blocks = {
                    plans.MULTI: 2 + c % 7,
                    plans.ATOMIC: 2 + c % 31,
                    plans.LONG: 33 + c % 300,
                    plans.FUA: 1 + c % 3,
                }.get(kind, 1)
                self.write(
                    kind, disk, fbn * SECTORS, min(blocks, disk.size_blocks - fbn) * SECTORS, c
                )

    @staticmethod
    def sectors(disk: Disk, fbn: int, c: int) -> tuple[int, int]:
        """First sector and number of sectors of a read: mostly one block."""
        if c & 3:
            return fbn * SECTORS, SECTORS
        start = fbn * SECTORS + (c >> 2) % SECTORS
        return start, min(
            1 + (c >> 5) % (400 if c & 64 else 40), disk.size_blocks * SECTORS - start
        )

    # --- Writing ----------------------------------------------------------------------------------

    def write(self, kind: str, disk: Disk, start: int, count: int, c: int) -> "Flight":
        session = self.session
        version = next(session.versions)
        fua = kind == plans.FUA or c >> 16 & 31 == 0
        flight = session.begin(
            kind,
            f"{disk.full_name} sectors {start}+{count} (write {version}){' FUA' if fua else ''}",
            disk,
        )
        data = bytes(count * SECTOR_BYTES) if c >> 8 & 31 == 0 else content(version, start, count)
        whole = not (start | count) % SECTORS
        write = Write(
            version, flight.start, f"{kind} {version}", whole and count <= ATOMIC_BLOCKS * SECTORS
        )
        disk.begin_write(write, parts_of(start, data))
        buffer = bytearray(data)
        volume = disk.volume

        def answered(error: Exception | None) -> None:
            if session.land(flight, error):
                outcome = (
                    "done"
                    if error is None
                    else self.outcome(flight, error, count <= ONE_STEP_BLOCKS * SECTORS)
                )
                disk.end_write(write, session.now(), outcome, fua and error is None)

        volume.write(start * SECTOR_BYTES, buffer, fua, session.guarded(answered))
        session.unsettled[volume] = None
        session.buffers.append(buffer)
        return flight

    def outcome(self, flight: "Flight", error: Exception, one_step: bool) -> str:
        """What a refusal says of the data."""
        self.session.judge(flight, error)
        return (
            "refused"
            if one_step and isinstance(error, PoolFull | OutOfRange) and not self.session.read_only
            else "unknown"
        )

    def zero(self, kind: str, disk: Disk, fbn: int, c: int) -> None:
        session, sectors = self.session, disk.size_blocks * SECTORS
        match c % 8:
            case 0:
                start, count = 0, sectors
            case 1:
                start, count = fbn // 256 * 256 * SECTORS, 256 * SECTORS * (1 + (c >> 3) % 5)
            case 2 | 3:
                start, count = fbn * SECTORS + (c >> 3) % SECTORS, 1 + (c >> 6) % 100
            case _:
                start, count = fbn * SECTORS, (1 + (c >> 3) % 40) * SECTORS
        count = min(count, sectors - start)
        version = next(session.versions)
        flight = session.begin(
            kind, f"{disk.full_name} sectors {start}+{count} (write {version})", disk
        )
        write = Write(version, flight.start, f"{kind} {version}")
        disk.begin_zero(write, start, start + count)
        fua = kind == plans.ZEROS and bool(c >> 12 & 1)

        def answered(error: Exception | None) -> None:
            if session.land(flight, error):
                if (
                    isinstance(error, PoolFull)
                    and not (start | count) % SECTORS
                    and not session.shared_ever
                ):
                    raise Wrong(
                        f"{kind} {flight.what} of whole blocks, nothing of which is shared, was"
                        f" refused: {error}"
                    )
                outcome = "done" if error is None else self.outcome(flight, error, False)
                disk.end_write(write, session.now(), outcome, fua and error is None)

        volume = disk.volume
        if kind == plans.UNMAP:
            volume.unmap(start * SECTOR_BYTES, count * SECTOR_BYTES, session.guarded(answered))
        else:
            volume.write_zeros(
                start * SECTOR_BYTES, count * SECTOR_BYTES, fua, session.guarded(answered)
            )

    def copy(self, disk: Disk, operation: Operation) -> None:
        session = self.session
        source = self.any_disk(operation.b)
        if source is None or self.volume(source) is None:
            return
        first, to = self.block(source, operation.c), self.block(disk, operation.c >> 5)
        count = min(
            1 + operation.c % (300 if operation.c & 1024 else 12),
            source.size_blocks - first,
            disk.size_blocks - to,
        )
        here, there = range(first, first + count), range(to, to + count)
        meets = any(
            (source is image and overlap(here, blocks))
            or (disk is origin and overlap(there, taken))
            for origin, taken, image, blocks in [*session.copies, (source, here, disk, there)]
        )
        if meets:
            return
        version = next(session.versions)
        flight = session.begin(
            plans.COPY,
            f"{source.full_name} {first} to {disk.full_name} {to}, {count} blocks (write"
            f" {version})",
            disk,
        )
        write = Write(version, flight.start, f"copy {version}")
        reading = source.begin_read(first, count, flight.start)
        disk.begin_copy(write, reading, to - first)
        entry = (source, here, disk, there)
        session.copies.append(entry)
        session.shared_ever = disk.use_unknown = True
        disturbed = source.disturbed

        def answered(error: Exception | None) -> None:
            if session.land(flight, error):
                session.copies.remove(entry)
                source.end_read(reading)
                gone = (
                    source.disturbed != disturbed
                    or source.exclusive
                    or source.marked
                    or source.gone
                )
                outcome = (
                    "done"
                    if error is None
                    else "unknown"
                    if gone
                    else self.outcome(flight, error, False)
                )
                disk.end_write(write, session.now(), outcome, error is None)

        disk.volume.copy_from(
            source.volume,
            first * BLOCK_BYTES,
            to * BLOCK_BYTES,
            count * BLOCK_BYTES,
            session.guarded(answered),
        )

    def flush(self, disk: Disk) -> None:
        session = self.session
        flight = session.begin(plans.FLUSH, disk.full_name, disk)

        def answered(error: Exception | None) -> None:
            if session.land(flight, error):
                if error is None:
                    disk.flushed(flight.start)
                else:
                    session.judge(flight, error)

        disk.volume.flush(session.guarded(answered))

    # --- Reading ----------------------------------------------------------------------------------

    def read(self, disk: Disk, start: int, count: int, operation: Operation) -> None:
        session = self.session
        flight = session.begin(operation.kind, f"{disk.full_name} sectors {start}+{count}", disk)
        first = start // SECTORS
        reading = disk.begin_read(first, -(-(start + count) // SECTORS) - first, flight.start)

        def answered(found: Any, error: Exception | None) -> None:
            if not session.land(flight, error):
                return
            disk.end_read(reading)
            if error is not None:
                session.judge(flight, error)
                return
            compare(disk, reading, flight, start, count, bytes(found))
            in_bounds = (
                start + count <= disk.size_blocks * SECTORS
            )  # the disk may have shrunk since the read began
            if (
                operation.kind == plans.COMPARE
                and in_bounds
                and not disk.is_snapshot
                and not session.closing
            ):
                self.write(plans.COMPARE, disk, start, count, operation.c | 1 << 8)
                session.settle()

        answered = session.guarded(answered)
        try:
            found = disk.volume.try_read(start * SECTOR_BYTES, count * SECTOR_BYTES)
        except Exception as error:
            answered(None, error)
            return
        if found is not None:
            answered(found, None)
        else:
            disk.volume.read(start * SECTOR_BYTES, count * SECTOR_BYTES, answered)

    def report(self, disk: Disk, fbn: int, c: int) -> None:
        session = self.session
        if c & 3 == 0:
            fbn, count = 0, disk.size_blocks
        else:
            count = min(1 + (c >> 2) % (3000 if c & 4 else 100), disk.size_blocks - fbn)
        flight = session.begin(plans.REPORT, f"{disk.full_name} blocks {fbn}+{count}", disk)
        reading = disk.begin_read(fbn, count, flight.start)

        def answered(runs: list[tuple[int, bool]] | None, error: Exception | None) -> None:
            if not session.land(flight, error):
                return
            disk.end_read(reading)
            if runs is None:
                assert error is not None
                session.judge(flight, error)
            else:
                judge_report(disk, reading, flight, runs)

        disk.volume.allocation(
            fbn * BLOCK_BYTES, count * BLOCK_BYTES, 1 + c % 50, session.guarded(answered)
        )


# --- Judging --------------------------------------------------------------------------------------


def compare(
    disk: Disk, reading: Reading, flight: "Flight", start: int, count: int, found: bytes
) -> None:
    """What a read found is what it might find."""
    if len(found) != count * SECTOR_BYTES:
        raise Wrong(f"{flight.kind} {flight.what} gave {len(found)} bytes")
    cells = reading.cells
    if (
        count == SECTORS
        and start % SECTORS == 0
        and not reading.during
        and cells.get(reading.first, ZEROS) == found
    ):
        return
    judge = Judge(disk, f"{flight.kind} {flight.start}")
    before = start % SECTORS * SECTOR_BYTES
    padded = bytes(before) + found + bytes(-(before + len(found)) % BLOCK_BYTES)
    for step in range(reading.count):
        fbn = reading.first + step
        block = padded[step * BLOCK_BYTES : (step + 1) * BLOCK_BYTES]
        if fbn not in reading.during and cells.get(fbn, ZEROS) == block:
            continue
        judge.block(fbn, reading.allowed(fbn), block, mask_of(fbn, start, start + count))
    judge.end()


def judge_report(
    disk: Disk, reading: Reading, flight: "Flight", runs: list[tuple[int, bool]]
) -> None:
    """No block is called deallocated that held data all the time."""
    at = reading.first
    total = sum(length for length, _ in runs) // BLOCK_BYTES
    if not runs or total > reading.count or any(length <= 0 for length, _ in runs):
        raise Wrong(f"report {flight.what} gave {runs[:5]}, of {total} blocks")
    free = []
    for length, allocated in runs:
        if not allocated:
            free.append((at, at + length // BLOCK_BYTES))
        at += length // BLOCK_BYTES
    judge = Judge(disk, f"report {flight.start}: called deallocated, while it")
    for fbn in reading.cells:
        if any(first <= fbn < end for first, end in free):
            judge.block(fbn, reading.allowed(fbn), ZEROS)


def overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def parts_of(start: int, data: bytes) -> list[tuple[int, int, bytes]]:
    """Block, mask, and the block with the written sectors in their places, of each block that a
    write touches.
    """
    fbn, before = divmod(start, SECTORS)
    if not before and len(data) == BLOCK_BYTES:
        return [(fbn, 0xFF, data)]
    end = start + len(data) // SECTOR_BYTES
    padded = (
        bytes(before * SECTOR_BYTES)
        + data
        + bytes(-(before * SECTOR_BYTES + len(data)) % BLOCK_BYTES)
    )
    return [
        (
            fbn + step,
            mask_of(fbn + step, start, end),
            padded[step * BLOCK_BYTES : (step + 1) * BLOCK_BYTES],
        )
        for step in range(len(padded) // BLOCK_BYTES)
    ]
