"""What replay found of the log's changes, in their order: which to apply, and which are missing, by
image and block.
"""

from storage.epoch.log_queue import LogEntry
from storage.log.ring import Missing

# Image number, first FBN, blocks, VBN of the first.
Place = tuple[int, int, int, int]


class Findings:
    """``entries`` are all changes. Positions in ``damaged`` are applied and read as errors; those
    in ``left_out`` are not applied.
    """

    def __init__(self) -> None:
        self.entries: list[LogEntry] = []
        self.damaged: set[int] = set()
        self.left_out: set[int] = set()
        # Sequence numbers of records that nobody was told to be durable: of those that are not
        # whole, and of those whose data are not.
        self.torn_records: set[int] = set()
        self.torn_data: set[int] = set()
        # Records that are missing and may have been durable.
        self.lost: list[Missing] = []

    def add(self, entry: LogEntry) -> int:
        """Take up one more change; returns its position."""
        self.entries.append(entry)
        return len(self.entries) - 1

    def to_apply(self) -> list[LogEntry]:
        """The changes that replay makes, in their order."""
        if not self.left_out:
            return self.entries
        return [entry for at, entry in enumerate(self.entries) if at not in self.left_out]

    def missing(self) -> tuple[list[Place], list[Place]]:
        """What was damaged and what was left out, neighbours together. What was changed again later
        is not missing.
        """
        unsettled: dict[tuple[int, int], int] = {}
        for at, (number, _, fbn, _, count) in enumerate(
            self.entries if self.damaged or self.left_out else ()
        ):
            if at in self.damaged:
                unsettled[number, fbn] = at
            elif at in self.left_out:
                unsettled.setdefault(
                    (number, fbn), at
                )  # damage stays damage under what was not applied
            elif count <= len(unsettled):
                for here in range(fbn, fbn + count):
                    unsettled.pop((number, here), None)
            else:
                gone = [
                    key for key in unsettled if key[0] == number and fbn <= key[1] < fbn + count
                ]
                for key in gone:
                    del unsettled[key]
        positions = [unsettled[key] for key in sorted(unsettled)]
        return self._places([at for at in positions if at in self.damaged]), self._places(
            [at for at in positions if at in self.left_out]
        )

    def _places(self, positions: list[int]) -> list[Place]:
        return places([self.entries[at] for at in positions])


def places(entries: list[LogEntry]) -> list[Place]:
    """Where these changes lie, neighbours together; ``entries`` ascend."""
    found: list[Place] = []
    for number, _, fbn, vbn, count in entries:
        if found and found[-1][0] == number and found[-1][1] + found[-1][2] == fbn:
            found[-1] = (number, found[-1][1], found[-1][2] + count, found[-1][3])
        else:
            found.append((number, fbn, count, vbn))
    return found
