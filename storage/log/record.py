"""One record of the intent log: a block that lists up to ENTRIES_PER_RECORD changes of one epoch
(layout.RECORD_HEAD, RECORD_ENTRY).

The newest record is *open*: entries are added to it, and its block is written again, as long as no
sync has been asked for since it was begun. So a record that anybody may count on as durable is
never written over.

A record without entries is a *durable mark*: written after a sync, without one of its own, it says
that what lies before it is durable. It stays open, so the changes that follow go into it.
"""

from storage.checksum import crc32c
from storage.epoch.log_queue import LogEntry
from storage.layout import (
    BLOCK_BYTES,
    ENTRIES_PER_RECORD,
    LOG_FIRST_VBN,
    RECORD_CRC_OFFSET,
    RECORD_ENTRY,
    RECORD_HEAD,
    RECORD_MAGIC,
    RECORD_TAIL,
)

TAIL_OFFSET = BLOCK_BYTES - RECORD_TAIL.size
ENDS_BYTES = RECORD_TAIL.size - 1


class LogRecord:
    """A record in the making. ``block`` is its place in the ring, ``cp_number`` the epoch whose
    changes it lists.
    """

    __slots__ = (
        "_count",
        "_durable_sequence",
        "_ends",
        "_pool",
        "_previous",
        "block",
        "buf",
        "cp_number",
        "sequence",
    )

    def __init__(
        self,
        block: int,
        sequence: int,
        cp_number: int,
        durable_sequence: int,
        pool_uuid: bytes,
        previous: "LogRecord | None" = None,
    ) -> None:
        self.block = block
        self.sequence = sequence
        self.cp_number = cp_number
        self._durable_sequence = durable_sequence
        self._pool = pool_uuid[:8]
        self._count = 0
        self._ends = 0
        # How many entries the record before has, and 1 more: its last writing may get lost with the
        # power, and this one not.
        self._previous = 0 if previous is None else previous.entries + 1
        self.buf = bytearray(BLOCK_BYTES)

    @property
    def offset_bytes(self) -> int:
        """Where the record lies on the device."""
        return (LOG_FIRST_VBN + self.block) * BLOCK_BYTES

    @property
    def room(self) -> int:
        """How many more entries it can take."""
        return ENTRIES_PER_RECORD - self._count

    @property
    def entries(self) -> int:
        """How many it has."""
        return self._count

    @property
    def empty(self) -> bool:
        """Whether it lists no change: a durable mark."""
        return not self._count

    def add(self, entries: list[LogEntry]) -> None:
        """Append entries, no more than there is room for, and make the record whole again. No write
        goes on past the last of them.
        """
        buf, at = self.buf, RECORD_HEAD.size + self._count * RECORD_ENTRY.size
        pack_into = RECORD_ENTRY.pack_into
        for entry in entries:
            pack_into(buf, at, *entry)
            at += RECORD_ENTRY.size
        self._count += len(entries)
        self._ends |= 1 << self._count - 1
        self._seal()

    def say_durable(self, sequence: int) -> None:
        """State that every record up to ``sequence`` is durable with its data, and make the record
        whole again.
        """
        self._durable_sequence = sequence
        self._seal()

    def _seal(self) -> None:
        buf = self.buf
        RECORD_TAIL.pack_into(
            buf, TAIL_OFFSET, self._ends.to_bytes(ENDS_BYTES, "little"), self._previous
        )
        RECORD_HEAD.pack_into(
            buf,
            0,
            RECORD_MAGIC,
            0,
            self.sequence,
            self.cp_number,
            self._durable_sequence,
            self._pool,
            self._count,
            1,
        )
        buf[RECORD_CRC_OFFSET : RECORD_CRC_OFFSET + 4] = crc32c(buf).to_bytes(4, "little")
