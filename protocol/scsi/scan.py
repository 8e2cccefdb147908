"""Reading a range piece by piece and looking at it: what VERIFY, WRITE AND VERIFY and COMPARE AND WRITE share."""

from collections.abc import Callable

from protocol.scsi import sense
from protocol.scsi.errors import CheckCondition
from protocol.scsi.limits import PIECE_BYTES, SECTOR_BYTES
from protocol.scsi.sense import MISCOMPARE, Sense
from protocol.volume import BlockVolume, Buffer, Completion

Check = Callable[[int, Buffer], None]


class Comparison:
    """Compares pieces of a volume with the client's data, or with one sector of it again and again."""

    __slots__ = ("_data", "_repeated")

    def __init__(self, data: Buffer, repeated: bool) -> None:
        self._data = memoryview(data)
        self._repeated = repeated

    def check(self, position: int, piece: Buffer) -> None:
        """Raise MISCOMPARE, with the offset of the first differing byte as information, where the piece differs."""
        if self._repeated:
            expected: Buffer = bytes(self._data[:SECTOR_BYTES]) * (len(piece) // SECTOR_BYTES)
        else:
            expected = self._data[position : position + len(piece)]
        if expected != piece:
            raise CheckCondition(miscompare_at(position + first_difference(expected, piece)))


def first_difference(left: Buffer, right: Buffer) -> int:
    """Index of the first byte in which two buffers of one length differ. Only called when they do."""
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
    return Sense(MISCOMPARE, sense.MISCOMPARE_DURING_VERIFY.asc, sense.MISCOMPARE_DURING_VERIFY.ascq, information=offset_bytes)


class Scan:
    """Reads ``length_bytes`` in pieces through the I/O threads, giving each to ``check``; ends at the first error."""

    __slots__ = ("_check", "_done", "_length", "_offset", "_position", "_volume")

    def __init__(self, volume: BlockVolume, offset_bytes: int, length_bytes: int, check: Check | None, done: Completion) -> None:
        self._volume = volume
        self._offset = offset_bytes
        self._length = length_bytes
        self._check = check
        self._done = done
        self._position = 0

    def start(self) -> None:
        """Read the pieces that are at hand in a loop, and wait for the first that is not."""
        while self._position < self._length:
            size = min(PIECE_BYTES, self._length - self._position)
            try:
                piece = self._volume.try_read(self._offset + self._position, size)
                if piece is None:
                    self._volume.read(self._offset + self._position, size, self._arrived)
                    return
                self._look(piece)
            except Exception as error:  # noqa: BLE001 - whatever the volume raises carries an errno; the completion makes sense data of it
                self._done(error)
                return
        self._done(None)

    def _look(self, piece: Buffer) -> None:
        if self._check is not None:
            self._check(self._position, piece)
        self._position += len(piece)

    def _arrived(self, piece: Buffer | None, error: Exception | None) -> None:
        if error is None and piece is not None:
            try:
                self._look(piece)
            except CheckCondition as failed:
                error = failed
        if error is not None:
            self._done(error)
            return
        self.start()
