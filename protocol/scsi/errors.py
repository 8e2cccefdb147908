"""Errors of the SCSI layer. Each is a status to put on the wire, never a reason to end
the session.
"""

import errno
from dataclasses import replace
from typing import Final

from protocol.scsi import sense
from protocol.scsi.limits import SECTOR_SHIFT
from protocol.scsi.sense import Sense

STATUS_GOOD: Final = 0x00
STATUS_CHECK_CONDITION: Final = 0x02
STATUS_RESERVATION_CONFLICT: Final = 0x18


class ScsiError(Exception):
    """Root: a command that ends with another status than GOOD."""

    status: int = STATUS_CHECK_CONDITION


class CheckCondition(ScsiError):
    """The command ends with CHECK CONDITION and this sense data."""

    def __init__(self, cause: Sense) -> None:
        super().__init__(f"sense {cause.key:X}/{cause.asc:02X}/{cause.ascq:02X}")
        self.sense = cause


class ReservationConflict(ScsiError):
    """Another initiator's reservation forbids the command (SPC-4 5.12.1)."""

    status = STATUS_RESERVATION_CONFLICT


_BY_ERRNO: Final = {
    errno.ENOSPC: sense.SPACE_ALLOCATION_FAILED,
    errno.EROFS: sense.WRITE_PROTECTED,
    errno.EINVAL: sense.LBA_OUT_OF_RANGE,
    errno.ESHUTDOWN: sense.NOT_READY_CAUSE_NOT_REPORTABLE,
}


def sense_of(error: Exception, writing: bool) -> Sense:
    """The sense data for what a `BlockVolume` (or a command's own continuation) reported, by its
    ``errno``.
    """
    if isinstance(error, CheckCondition):
        return error.sense
    number = getattr(error, "errno", None)
    if number == errno.EIO:
        return sense.WRITE_ERROR if writing else _unrecovered(getattr(error, "offset_bytes", None))
    return _BY_ERRNO.get(number or 0, sense.INTERNAL_TARGET_FAILURE)


def _unrecovered(offset_bytes: int | None) -> Sense:
    """UNRECOVERED READ ERROR with the first LBA that could not be read as information (SBC-3
    4.18.1), where that is known.
    """
    lba = None if offset_bytes is None else offset_bytes >> SECTOR_SHIFT
    return replace(sense.UNRECOVERED_READ_ERROR, information=lba)
