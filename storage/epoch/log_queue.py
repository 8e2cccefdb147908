"""The log queue of an epoch: its changes that no record of the intent log holds yet, in the order
in which they were made.
"""

from bisect import bisect_right

# Image number, CRC32C, FBN, VBN, run length: what the intent log says of one change
# (layout.RECORD_ENTRY).
LogEntry = tuple[int, int, int, int, int]


def follows(one: LogEntry, other: LogEntry) -> bool:
    """Whether two changes may be of one write: neighbours in one image."""
    return one[0] == other[0] and one[2] + one[4] == other[2]


class LogQueue:
    """``entries`` are the changes; ``cp_number`` is the number of their epoch.

    ``by_reference``: blocks were copied by reference, which the log cannot say, so a flush takes a
    consistency point.
    """

    __slots__ = ("_ends", "_taken", "by_reference", "cp_number", "entries")

    def __init__(self, cp_number: int) -> None:
        self.cp_number = cp_number
        self.entries: list[LogEntry] = []
        self.by_reference = False
        # How many changes were taken for records; and, counted like these, where whole writes end
        # that were not.
        self._taken = 0
        self._ends: list[int] = []

    def note_end(self) -> None:
        """What was changed so far are whole writes: a record may end here."""
        end = self._taken + len(self.entries)
        if self.entries and (not self._ends or self._ends[-1] != end):
            self._ends.append(end)

    def take(self, room: int, room_max: int) -> list[LogEntry]:
        """Take the first changes for a record that has room for so many more. None if a write would
        be cut that fits into an empty one.

        A write of up to ATOMIC_WRITE_BYTES_MAX (storage.layout) is there after a crash entirely
        or not at all, so one record holds it. Its changes lie between two ends, and are neighbours;
        what is longer than a record is no such write.
        """
        entries, ends = self.entries, self._ends
        count = len(entries)
        if count <= room:
            self.entries, self._ends = [], []
            self._taken += count
            return entries
        passed = bisect_right(ends, self._taken + room)
        end = ends[passed - 1] - self._taken if passed else 0
        count = next(
            (at for at in range(room, end, -1) if not follows(entries[at - 1], entries[at])), end
        )
        if not count and room == room_max:
            count = room
        taken = entries[:count]
        del entries[:count]
        self._taken += count
        del ends[: bisect_right(ends, self._taken)]
        return taken

    def drain(self) -> list[LogEntry]:
        """All changes that are left: a consistency point has made them durable."""
        entries, self.entries = self.entries, []
        return entries
