"""Replay: after a crash, apply what the intent log holds beyond the last consistency point.

Nothing is written before the whole log was read and verified, and the consistency point that
follows writes only where neither the old state nor any applied record lies. So a crash during
replay leaves everything as it was, and replay can be repeated.

The rule (docs/on-disk-format.md, "Reading it after a crash"). Every record that is whole is used,
wherever others are missing. Those up to the highest ``durable_sequence`` that any of them states
must be there, with their data: what is not is damage. A block of data that does not verify gets its
pointer all the same, so that reading it is an error and not old data, and is reported. A record
that is missing leaves the pool read-only, for nobody knows for certain what it changed; the blocks
that it seems to name read as errors. Above that sequence anything may be missing, for no flush was
answered: the log ends before a record that is missing, or whose predecessor has fewer entries than
it states (it was written again, longer, and that was lost), and a write of which a block does not
verify is left out whole. So is what was written later to one of its blocks (the parts of the block
that it did not cover are those of the write that is left out, which would be there in part), until
a trim of that block. All others are applied.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

from storage.allocation.write_allocator import WriteAllocator
from storage.checksum import crc32c
from storage.data.trim import trim_blocks
from storage.data.write_path import indexes_of, install, nodes_of, plan_for
from storage.epoch.log_queue import LogEntry as Entry
from storage.errors import BlockDamaged, DeviceFailed, StorageError
from storage.images.catalogue import Catalogue
from storage.images.image import Image
from storage.layout import BLOCK_BYTES, HOLE, LOG_FIRST_VBN, ZERO_POINTER
from storage.log.findings import Findings, Place, places
from storage.log.ring import READ_BLOCKS, Missing, Record, Ring, read_ring, read_singly
from storage.slicer import Slicer
from storage.state.pool_state import PoolState
from storage.superblock.superblock import Superblock
from storage.tree.attempt import when_possible

# Data writes installed in one step.
STEP_ENTRIES = 256
# Places named in one event, and records told of one by one.
NAMED_MAX = 64


@dataclass
class Replayed:
    """Outcome: where the log goes on, and what was done. ``moved``: not where the superblock says,
    so a new one must be written first.
    """

    head_block: int
    next_sequence: int
    moved: bool
    records: int
    entries: int


class Replay:
    """Replays the log of one pool, while nobody else works on it."""

    def __init__(
        self,
        state: PoolState,
        superblock: Superblock,
        catalogue: Catalogue,
        allocator: WriteAllocator,
    ) -> None:
        self._state = state
        self._allocator = allocator
        self._superblock = superblock
        self._catalogue = catalogue
        self._slicer = Slicer()
        self._findings = Findings()
        self._durable = 0
        # Entries of each record to apply, by sequence.
        self._counts: dict[int, int] = {}
        # Above that: whether a record was missing, and the blocks (image, FBN) whose newest write
        # was left out.
        self._ended = False
        self._without: set[tuple[int, int]] = set()
        self._first_free = LOG_FIRST_VBN + superblock.log_blocks

    async def run(self) -> Replayed:
        """Apply the log. Raises PoolRefused (a log that cannot be); damage that leaves the rest
        usable is reported and survived.
        """
        superblock = self._superblock
        ring = await read_ring(self._state.device, superblock)
        records = ring.records_from(superblock.log_head_sequence)
        missing = ring.missing(superblock.log_head_block, superblock.log_head_sequence, records)
        self._durable = max((record.durable_sequence for record in records), default=0)
        records += await self._mend(ring, missing)
        records.sort(key=attrgetter("sequence"))
        applied = [
            record
            for record in records
            if record.entries and record.cp_number > superblock.cp_number
        ]
        self._counts = {record.sequence: len(record.entries) for record in applied}
        lost = [one for one in missing if self._is_needed(one, records)]
        parts: list[Record | Missing] = [*applied, *lost]
        for part in sorted(parts, key=attrgetter("sequence")):
            if isinstance(part, Record):
                await self._take(part)
            else:
                self._take_lost(part, ring)
        entries = self._findings.to_apply()
        for run in runs(entries):
            if run[0][3] >= self._first_free:
                self._allocator.adopt(run[0][3], len(run))
        await self._apply(entries)
        self._report_unreadable(ring, missing)
        self._report()
        return self._outcome(ring, records, missing, len(applied), len(entries))

    def _outcome(
        self, ring: Ring, records: list[Record], missing: list[Missing], applied: int, entries: int
    ) -> Replayed:
        superblock = self._superblock
        parts: list[Record | Missing] = [*records, *missing]
        last = max(parts, key=attrgetter("sequence"), default=None)
        blocks = last.blocks if isinstance(last, Record) else 1
        head_block = (
            superblock.log_head_block if last is None else (last.block + blocks) % ring.blocks
        )
        next_sequence = superblock.log_head_sequence if last is None else last.sequence + 1
        # A jump in the sequence: nothing left of a torn tail can ever be taken for a successor,
        # also where the tail is all that there is.
        moved = last is not None or bool(ring.unreadable)
        return Replayed(
            head_block, next_sequence + (ring.blocks if moved else 0), moved, applied, entries
        )

    async def _mend(self, ring: Ring, missing: list[Missing]) -> list[Record]:
        """Take out of ``missing`` the records in which a single bit was flipped, if they were
        durable and all of their data verify.
        """
        mended: list[Record] = []
        for one in [one for one in missing if one.sequence <= self._durable and not one.unreadable]:
            record = ring.mended(one)
            if record is not None and not await self._damaged_entries(record):
                mended.append(record)
                missing.remove(one)
                self._state.on_event(
                    "log.record_mended", sequence=one.sequence, vbn=LOG_FIRST_VBN + one.block
                )
        return mended

    # --- What is there, and what is not -----------------------------------------------------------

    def _is_needed(self, missing: Missing, records: list[Record]) -> bool:
        """Whether a missing record may belong to a consistency point that the superblock has not
        reached: those in the ring only grow.
        """
        after = next((record for record in records if record.sequence > missing.sequence), None)
        return after is None or after.cp_number > self._superblock.cp_number

    async def _take(self, record: Record) -> None:
        """Take up a whole record: all of it, or what verifies of it where nobody was told that it
        is durable.
        """
        beyond = next(
            (vbn for _, _, _, vbn, _ in record.entries if vbn >= self._superblock.size_blocks), None
        )
        if beyond is not None:
            self._state.fail(
                f"record {record.sequence} of the intent log names VBN {beyond}, beyond the pool:"
                " run `cleaved check`"
            )
            return
        findings, first = self._findings, len(self._findings.entries)
        findings.entries += record.entries
        bad = set(await self._damaged_entries(record))
        if record.sequence <= self._durable:
            findings.damaged.update(first + position for position in bad)
            return
        if self._counts.get(record.sequence - 1, record.previous) < record.previous - 1:
            findings.torn_records.add(record.sequence - 1)
            self._ended = True
        position = 0
        while position < len(record.entries):
            unit = record.unit(position)
            if self._leave_out([record.entries[at] for at in unit], any(at in bad for at in unit)):
                findings.torn_data.add(record.sequence)
                findings.left_out.update(first + at for at in unit)
            position = unit.stop

    def _leave_out(self, write: list[Entry], bad: bool) -> bool:
        """Whether a write that was not durable is left out: it is not whole, or over one that is
        not there, or behind the log's end.
        """
        blocks = {(number, fbn) for number, _, fbn, vbn, _ in write if vbn > ZERO_POINTER}
        if bad or self._ended or blocks & self._without:
            self._without |= blocks
            return True
        for number, _, fbn, vbn, count in write if self._without else ():
            if vbn == ZERO_POINTER and count <= len(self._without):
                self._without.difference_update([(number, at) for at in range(fbn, fbn + count)])
            elif vbn == ZERO_POINTER:
                self._without = {
                    key
                    for key in self._without
                    if key[0] != number or not fbn <= key[1] < fbn + count
                }
        return False

    def _take_lost(self, missing: Missing, ring: Ring) -> None:
        """Take up what a missing record may have said: to be named, and to read as errors if it may
        have been durable.
        """
        findings, damaged_vbn = self._findings, LOG_FIRST_VBN + missing.block
        missing.claims = [entry for entry in missing.claims if self._is_plausible(entry)]
        if missing.sequence > self._durable and not self._may_be_durable(missing, ring):
            if not missing.unreadable or not missing.at_end:
                findings.torn_records.add(missing.sequence)
            self._ended = True
            findings.left_out.update(findings.add(claim) for claim in missing.claims)
            return
        findings.lost.append(missing)
        crc = crc32c(ring.block_bytes(missing.block)) ^ 1
        for number, _, fbn, vbn, count in missing.claims:
            if count == 1:
                # Such a block points at the damaged record, with another CRC32C than that has:
                # reading it is an error.
                findings.damaged.add(findings.add((number, crc, fbn, damaged_vbn, 1)))
            else:
                findings.left_out.add(findings.add((number, 0, fbn, vbn, count)))

    @staticmethod
    def _may_be_durable(missing: Missing, ring: Ring) -> bool:
        """Whether behind the end of the log not even the mark of an answered flush can be read."""
        return (
            missing.at_end
            and missing.unreadable
            and (missing.block + 1) % ring.blocks in ring.unreadable
        )

    def _is_plausible(self, entry: Entry) -> bool:
        """Whether an entry of a record that is not whole can be what was written there."""
        number, _, fbn, vbn, count = entry
        image = None if self._catalogue.is_damaged(number) else self._catalogue.find(number)
        if image is None or not count or fbn + count > image.size_blocks:
            return False
        return vbn == ZERO_POINTER or (
            count == 1 and self._first_free <= vbn < self._superblock.size_blocks
        )

    async def _damaged_entries(self, record: Record) -> list[int]:
        """Positions of the entries whose block of data cannot be read, or does not have the CRC32C
        that the record gives.
        """
        bad: list[int] = []
        positions = [at for at, entry in enumerate(record.entries) if entry[3] > ZERO_POINTER]
        buffer = memoryview(bytearray(min(len(record.entries), READ_BLOCKS) * BLOCK_BYTES))
        done = 0
        for run in runs(record.entries):
            data = buffer[: len(run) * BLOCK_BYTES]
            await self._read(data, run[0][3])
            for position, start in zip(
                positions[done : done + len(run)], range(0, len(data), BLOCK_BYTES), strict=True
            ):
                if crc32c(data[start : start + BLOCK_BYTES]) != record.entries[position][1]:
                    bad.append(position)
            done += len(run)
            await self._slicer.breathe()
        return bad

    async def _read(self, data: memoryview, vbn: int) -> None:
        """Read neighbouring blocks; in place of those that cannot be read there are zeros, which no
        entry of data has the CRC32C of.
        """
        device = self._state.device
        try:
            if not device.try_readv((data,), vbn * BLOCK_BYTES):
                await device.readv((data,), vbn * BLOCK_BYTES)
        except StorageError:
            await read_singly(device, data, vbn)

    # --- Saying it --------------------------------------------------------------------------------

    def _report_unreadable(self, ring: Ring, missing: list[Missing]) -> None:
        """Tell of blocks of the ring that cannot be read, and whether changes may have lain in them
        that nobody can name.
        """
        if ring.unreadable:
            vbns = [LOG_FIRST_VBN + block for block in sorted(ring.unreadable)]
            self._state.on_event(
                "log.unreadable", vbns=vbns[:NAMED_MAX], blocks=len(vbns),
                changes_may_be_missing=any(one.unreadable for one in missing),
                after_cp=self._superblock.cp_number,
            )  # fmt: skip

    def _report(self) -> None:
        """Tell of everything that was not found as it was written, by vdisk and offset."""
        findings = self._findings
        damaged, left_out = findings.missing()
        for place in damaged:
            self._state.on_event("block.damaged", **self._words(place), vbn=place[3], durable=True)
        torn = findings.torn_records | findings.torn_data
        if torn:
            self._state.on_event(
                "log.torn_tail", sequence=min(torn), records_missing=len(findings.torn_records),
                blocks_missing=sum(count for _, _, count, _ in left_out),
                missing=[self._words(place) for place in left_out[:NAMED_MAX]],
            )  # fmt: skip
        for lost in findings.lost[:NAMED_MAX]:
            self._report_lost(lost)

    def _report_lost(self, lost: Missing) -> None:
        named = [self._words(place) for place in places(sorted(lost.claims, key=itemgetter(0, 2)))]
        vbn = LOG_FIRST_VBN + lost.block
        self._state.on_event(
            "log.record_damaged", sequence=lost.sequence, vbn=vbn, may_be_missing=named
        )
        what = "cannot be read" if lost.unreadable else "is damaged"
        known = (
            f"those of {len(named)} places that it seems to name (`log.record_damaged`)"
            if named
            else "which of them, nobody can say"
        )
        self._state.fail(
            f"record {lost.sequence} of the intent log (VBN {vbn}) {what}: acknowledged writes may"
            f" be lost, {known}. Copy what can be read, and restore the rest from a backup"
        )

    def _words(self, place: Place) -> dict[str, Any]:
        number, fbn, count, _ = place
        image = None if self._catalogue.is_damaged(number) else self._catalogue.find(number)
        label = image.label if image is not None else f"image {number}"
        return {
            "image": label,
            "offset_bytes": fbn * BLOCK_BYTES,
            "length_bytes": count * BLOCK_BYTES,
        }

    # --- Applying ---------------------------------------------------------------------------------

    async def _apply(self, entries: list[Entry]) -> None:
        """Install in the order of the log; neighbours that write data to one image go together."""
        start = 0
        for at in range(1, len(entries) + 1):
            together = (
                at < len(entries)
                and self._joins(entries[at - 1], entries[at])
                and at - start < STEP_ENTRIES
            )
            if not together:
                await self._apply_or_say(entries[start:at])
                start = at

    async def _apply_or_say(self, entries: list[Entry]) -> None:
        """Apply one step. Where a pointer block above it cannot be read, all below it reads as
        errors: the rest goes on, read-only.
        """
        try:
            try:
                await self._apply_step(entries)
            except DeviceFailed:
                await self._apply_step(entries)  # it may have passed
        except (BlockDamaged, DeviceFailed) as error:
            place = self._words((entries[0][0], entries[0][2], 1, HOLE))
            self._state.fail(
                f"changes of {place['image']} from byte {place['offset_bytes']} on are in the"
                f" intent log and cannot be applied: {error}; copy what can be read, and restore"
                " the rest from a backup"
            )

    @staticmethod
    def _joins(one: Entry, other: Entry) -> bool:
        return one[0] == other[0] and one[3] > ZERO_POINTER and other[3] > ZERO_POINTER

    async def _apply_step(self, entries: list[Entry]) -> None:
        number, _, fbn, vbn, count = entries[0]
        if self._catalogue.is_damaged(number):
            # Without changes there is no consistency point, so the log keeps what it has until the
            # entry can be read.
            self._state.fail(
                f"the intent log holds writes of image {number}, whose table entry cannot be read:"
                " restore a copy of the pool"
            )
            return
        image = self._catalogue.find(number)
        if image is None:
            self._state.on_event("log.unknown_image", image=number, entries=len(entries))
            for _, _, _, orphan, _ in entries:
                if orphan > ZERO_POINTER:
                    self._allocator.give_back([(orphan, 1)])
        elif vbn == ZERO_POINTER:
            await trim_blocks(image, fbn, count)
        elif max(entry[2] for entry in entries) >= image.size_blocks:
            self._state.fail(
                f"the intent log holds writes beyond the end of {image.label}: run `cleaved check`"
            )
        else:
            await self._install(image, entries)

    async def _install(self, image: Image, entries: list[Entry]) -> None:
        targets = [(fbn, crc) for _, crc, fbn, _, _ in entries]
        indexes = indexes_of(targets)
        plan = await when_possible(self._state, lambda: plan_for(image, self._state.epoch, indexes))
        image.editor.carry_out(plan)
        install(
            image,
            self._state.epoch,
            nodes_of(image, indexes),
            targets,
            [(run[0][3], len(run)) for run in runs(entries)],
        )


def runs(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """The entries that write data, those whose blocks are neighbours on the device together, at
    most READ_BLOCKS.
    """
    start, following = 0, 0
    for at, (_, _, _, vbn, _) in enumerate(entries):
        if vbn != following or at - start == READ_BLOCKS:
            if at > start:
                yield entries[start:at]
            start = at
        if vbn <= ZERO_POINTER:
            start = at + 1
        following = vbn + 1
    if start < len(entries):
        yield entries[start:]
