"""The shape of one entry of the command table, and helpers that every handler shares."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from protocol.scsi import sense
from protocol.scsi.errors import CheckCondition
from protocol.scsi.limits import SECTOR_SHIFT
from protocol.scsi.logical_unit import LogicalUnit, Nexus, UnitNexus
from protocol.scsi.plan import Plan, Reply


@dataclass(slots=True)
class Request:
    """One command as it reaches its handler. ``mapped`` is None where the LUN names no logical
    unit.
    """

    nexus: Nexus
    lun: int
    mapped: UnitNexus | None
    cdb: bytes

    @property
    def unit(self) -> LogicalUnit:
        """The logical unit; the dispatcher lets only commands marked ``any_lun`` come
        without one.
        """
        assert self.mapped is not None
        return self.mapped.unit


Handler = Callable[[Request], Plan]


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the command table.

    ``usage`` has a set bit wherever the command evaluates one, operation code included (SPC-4
    6.35.3, CDB USAGE DATA); a set bit outside it is INVALID FIELD IN CDB, so the table is at once
    the report and the check. Another's reservation forbids ``writes``, and ``reserved`` commands
    like them; some kinds forbid every command that ``needs_medium``. RESERVE(6) by another forbids
    all but ``any_lun`` and ``despite_exclusion`` ones; a sanitize operation all but ``any_lun`` and
    ``despite_sanitize`` ones, and one that failed leaves ``after_failed_sanitize`` ones besides.
    """

    name: str
    usage: bytes
    handler: Handler
    service_action: int | None = None
    any_lun: bool = False
    despite_attention: bool = False
    reserved: bool = False
    despite_exclusion: bool = False
    needs_medium: bool = False
    writes: bool = False
    despite_sanitize: bool = False
    after_failed_sanitize: bool = False
    mask: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", int.from_bytes(b"\xff" + self.usage[1:], "big"))

    @property
    def opcode(self) -> int:
        """Operation code: the first byte."""
        return self.usage[0]

    @property
    def cdb_bytes(self) -> int:
        """Length of the CDB."""
        return len(self.usage)

    def check_reserved(self, cdb: bytes) -> None:
        """Raise INVALID FIELD IN CDB, with a pointer to the bit, where a bit is set that the
        command does not evaluate.
        """
        stray = int.from_bytes(cdb[: len(self.usage)], "big") & ~self.mask
        if stray:
            bit = stray.bit_length() - 1
            raise CheckCondition(
                sense.invalid_field_in_cdb(len(self.usage) - 1 - bit // 8, bit % 8)
            )


def usage(text: str) -> bytes:
    """CDB usage data from hexadecimal text."""
    return bytes.fromhex(text)


def cut(data: bytes, allocation_bytes: int) -> Reply:
    """A reply of at most the allocation length."""
    return Reply(data[:allocation_bytes])


NO_DATA: Final = Reply()


def check_range(unit: LogicalUnit, lba: int, sectors: int) -> tuple[int, int]:
    """Offset and length in bytes of a range of sectors; LBA OUT OF RANGE where it passes the end.

    A length of zero is no error, but its LBA must lie on the disk (SBC-3 5.11: iscsi clients test
    for it), the end included.
    """
    total = unit.sectors
    if lba > total or sectors > total - lba or (sectors == 0 and lba == total):
        raise CheckCondition(sense.LBA_OUT_OF_RANGE)
    return lba << SECTOR_SHIFT, sectors << SECTOR_SHIFT
