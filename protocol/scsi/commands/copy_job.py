"""One EXTENDED COPY under way: its segments one after the other, by reference where the volumes
can, else piece by piece.

The copy manager has no state but this object and its `CopyProgress`. Each change passes the gate of
the unit that it changes (`Gate.enter_outside`), so that a COMPARE AND WRITE there stays one
operation, and is settled at once. Each piece has a turn of the event loop of its own.
"""

import errno
from dataclasses import dataclass, replace
from typing import Final

from protocol.scsi import sense
from protocol.scsi.errors import CheckCondition, sense_of
from protocol.scsi.limits import PHYSICAL_BLOCK_SECTORS, PIECE_BYTES, SECTOR_BYTES
from protocol.scsi.logical_unit import CopyProgress, LogicalUnit
from protocol.volume import Buffer, Completion, CopiesByReference

_BLOCK_BYTES: Final = PHYSICAL_BLOCK_SECTORS * SECTOR_BYTES


@dataclass(frozen=True, slots=True)
class Segment:
    """A copy of ``length_bytes`` from ``source`` to ``destination``. Both ranges have been checked.

    ``count``: how many segments of the client's list this is.
    """

    source: LogicalUnit
    source_offset: int
    destination: LogicalUnit
    offset: int
    length_bytes: int
    count: int = 1


def joined(segments: list[Segment]) -> list[Segment]:
    """The same copies in as few segments as possible: a descriptor holds at most 32 MiB, and each
    copy by reference has to be made durable.

    Segments within one unit are not joined: one may read what the one before it wrote.
    """
    found: list[Segment] = []
    for following in segments:
        last = found[-1] if found else None
        if last is not None and _continues(last, following):
            found[-1] = replace(
                last, length_bytes=last.length_bytes + following.length_bytes, count=last.count + 1
            )
        else:
            found.append(following)
    return found


def _continues(last: Segment, following: Segment) -> bool:
    units = (
        last.source is following.source
        and last.destination is following.destination
        and last.source is not last.destination
    )
    size = last.length_bytes
    return (
        units
        and last.source_offset + size == following.source_offset
        and last.offset + size == following.offset
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is copied in one step; the positions count from the beginning of the segment."""

    start: int
    size: int
    by_reference: bool


def _cut_up(start: int, end: int) -> list[_Piece]:
    return [_Piece(at, min(PIECE_BYTES, end - at), False) for at in range(start, end, PIECE_BYTES)]


def pieces_of(segment: Segment, by_reference: bool) -> list[_Piece]:
    """The steps of one segment: aligned whole blocks as one step, the rest (or everything) in
    pieces.

    Where a range overlaps its copy at a higher address, the last piece comes first, so that nothing
    is overwritten before it is read.
    """
    length = segment.length_bytes
    shift = segment.offset - segment.source_offset
    same = segment.source is segment.destination
    overlapping = same and abs(shift) < length
    head = min(length, -segment.offset % _BLOCK_BYTES)
    whole = (length - head) // _BLOCK_BYTES * _BLOCK_BYTES
    if by_reference and whole and not overlapping and shift % _BLOCK_BYTES == 0:
        return [*_cut_up(0, head), _Piece(head, whole, True), *_cut_up(head + whole, length)]
    pieces = _cut_up(0, length)
    return pieces[::-1] if overlapping and shift > 0 else pieces


class CopyJob:
    """Carries out the segments; ``done`` is called once, with the first error or None."""

    __slots__ = ("_done", "_pieces", "_progress", "_segments")

    def __init__(self, segments: list[Segment], progress: CopyProgress, done: Completion) -> None:
        self._segments = joined(segments)[::-1]
        self._progress = progress
        self._done = done
        self._pieces: list[_Piece] = []

    def run(self) -> None:
        """Wait for the turn of the next piece, or end."""
        while self._segments and self._segments[-1].length_bytes == 0:
            self._segment_ended()
        if self._segments:
            self._segments[-1].destination.turns.take(self._begin_piece)
        else:
            self._end(None)

    def _begin_piece(self) -> None:
        segment = self._segments[-1]
        if not self._pieces:
            self._pieces = pieces_of(
                segment, isinstance(segment.destination.volume, CopiesByReference)
            )[::-1]
        segment.destination.gate.enter_outside(self._copy_piece)

    def _copy_piece(self) -> None:
        """It is this piece's turn at the gate of the destination."""
        segment, piece = self._segments[-1], self._pieces[-1]
        if segment.destination.sanitization is not None or segment.destination.write_protected:
            # Since the command was checked.
            self._ended(CheckCondition(sense.THIRD_PARTY_DEVICE_FAILURE))
            return
        target, source = segment.destination.volume, segment.source.volume
        source.settle()  # writes that came before the copy
        target.settle()
        start, at = segment.source_offset + piece.start, segment.offset + piece.start
        if piece.by_reference and isinstance(target, CopiesByReference):
            target.copy_from(
                source, start, at, piece.size, segment.destination.durably(self._ended)
            )
            return
        try:
            data = source.try_read(start, piece.size)
        except Exception as error:  # noqa: BLE001 - whatever the volume raises carries an errno, from which sense data are made
            self._ended(error)
            return
        if data is None:
            source.read(start, piece.size, self._arrived)
        else:
            self._arrived(data, None)

    def _arrived(self, data: Buffer | None, error: Exception | None) -> None:
        if error is not None or data is None:
            self._ended(error or OSError(errno.EIO, "no data"))
            return
        segment = self._segments[-1]
        volume = segment.destination.volume
        volume.write(
            segment.offset + self._pieces[-1].start,
            data,
            not segment.destination.write_cache,
            self._written,
        )
        volume.settle()

    def _written(self, error: Exception | None) -> None:
        self._ended(None if error is None else CheckCondition(sense_of(error, writing=True)))

    def _ended(self, error: Exception | None) -> None:
        """A piece was copied, or not."""
        segment = self._segments[-1]
        segment.destination.gate.leave_outside()
        piece = self._pieces.pop()
        if error is None:
            self._progress.copied_bytes += piece.size
            if not self._pieces:
                self._segment_ended()
        elif piece.by_reference and getattr(error, "errno", None) == errno.EOPNOTSUPP:
            self._pieces += _cut_up(piece.start, piece.start + piece.size)[::-1]
        else:
            self._end(error)
            return
        self.run()

    def _segment_ended(self) -> None:
        self._progress.segments += self._segments.pop().count

    def _end(self, error: Exception | None) -> None:
        self._progress.running = False
        self._progress.failed = error is not None
        self._done(error)
