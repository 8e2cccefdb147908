"""Reading a range piece by piece and checking it, for VERIFY, WRITE AND VERIFY, COMPARE AND WRITE
and ORWRITE.
"""

from collections.abc import Callable

from protocol.scsi import sense
from protocol.scsi.errors import CheckCondition
from protocol.scsi.limits import AT_ONCE_BYTES_MAX, PIECE_BYTES, SECTOR_BYTES
from protocol.scsi.logical_unit import LogicalUnit
from protocol.scsi.sense import MISCOMPARE, Sense
from protocol.volume import Buffer, Completion

Check = Callable[[int, Buffer], None]


class Comparison:
    """Compares pieces of a volume with the client's data, or each sector with the first one of the
    data.
    """

    __slots__ = ("_data", "_repeated")

    def __init__(self, data: Buffer, repeated: bool) -> None:
        self._data = memoryview(data)
        self._repeated = repeated

    def check(self, position: int, piece: Buffer) -> None:
        """Raise MISCOMPARE, with the offset of the first differing byte as information, where the
        piece differs.
        """
        if self._repeated:
            expected: Buffer = bytes(self._data[:SECTOR_BYTES]) * (len(piece) // SECTOR_BYTES)
        else:
            expected = self._data[position : position + len(piece)]
        if expected != piece:
            raise CheckCondition(miscompare_at(position + first_difference(expected, piece)))


def first_difference(left: Buffer, right: Buffer) -> int:
    """Index of the first byte in which two buffers of one length differ. Only called
    when they do.
    """
    low, high = 0, len(left)
    a, b = memoryview(left), memoryview(right)
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] != b[low:middle]:
            high = middle
        else:
            low = middle
    return low


def miscompare_at(offset_bytes: int) -> Sense:
    """MISCOMPARE DURING VERIFY OPERATION with the offset within the data-out buffer (SBC-3 5.3)."""
    return Sense(
        MISCOMPARE,
        sense.MISCOMPARE_DURING_VERIFY.asc,
        sense.MISCOMPARE_DURING_VERIFY.ascq,
        information=offset_bytes,
    )


class Scan:
    """Reads ``length_bytes`` in pieces, each in a turn of its own, giving each to ``check``; ends
    at the first error.
    """

    __slots__ = ("_check", "_done", "_length", "_offset", "_position", "_turns", "_volume")

    def __init__(
        self,
        unit: LogicalUnit,
        offset_bytes: int,
        length_bytes: int,
        check: Check | None,
        done: Completion,
    ) -> None:
        self._volume = unit.volume
        self._turns = unit.turns
        self._offset = offset_bytes
        self._length = length_bytes
        self._check = check
        self._done = done
        self._position = 0

    def start(self) -> None:
        """Begin. A short range is read at once, a longer one in turns."""
        if self._length <= AT_ONCE_BYTES_MAX:
            self._step()
        else:
            self._turns.take(self._step)

    def _step(self) -> None:
        """Read the next piece, at once or by way of the I/O threads."""
        at, size = self._offset + self._position, min(PIECE_BYTES, self._length - self._position)
        try:
            piece = self._volume.try_read(at, size)
        except Exception as error:  # noqa: BLE001 - whatever the volume raises carries an errno; the completion makes sense data of it
            self._done(error)
            return
        if piece is None:
            self._volume.read(at, size, self._arrived)
        else:
            self._arrived(piece, None)

    def _arrived(self, piece: Buffer | None, error: Exception | None) -> None:
        if error is None and piece is not None:
            try:
                self._look(piece)
            except CheckCondition as failed:
                error = failed
        if error is None and self._position < self._length:
            self._turns.take(self._step)
        else:
            self._done(error)

    def _look(self, piece: Buffer) -> None:
        if self._check is not None:
            self._check(self._position, piece)
        self._position += len(piece)
