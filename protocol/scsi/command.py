"""The command table and the shape of its rows, and what handlers share."""

from collections.abc import Callable, Iterable
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

    ``evaluated`` is what follows the operation code in the CDB usage data (SPC-4 6.35.3), as
    hexadecimal text: a set bit wherever the command evaluates one. A set bit outside it is INVALID
    FIELD IN CDB, so the table is at once the report and the check.

    Another's reservation forbids ``writes``, and ``reserved`` commands like them; some kinds forbid
    every command that ``needs_medium``, unless it is to come ``despite_reservation``. RESERVE(6) by
    another forbids all but ``any_lun`` and ``despite_exclusion`` ones; a sanitize operation all but
    ``any_lun`` and ``despite_sanitize`` ones, and one that failed leaves ``after_failed_sanitize``
    ones besides.
    """

    opcode: int
    name: str
    evaluated: str
    handler: Handler
    service_action: int | None = None
    any_lun: bool = False
    despite_attention: bool = False
    reserved: bool = False
    despite_reservation: bool = False
    despite_exclusion: bool = False
    needs_medium: bool = False
    writes: bool = False
    despite_sanitize: bool = False
    after_failed_sanitize: bool = False
    usage: bytes = field(init=False)
    mask: int = field(init=False)

    def __post_init__(self) -> None:
        evaluated = bytes.fromhex(self.evaluated)
        object.__setattr__(self, "usage", bytes((self.opcode,)) + evaluated)
        object.__setattr__(self, "mask", int.from_bytes(b"\xff" + evaluated, "big"))

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


class CommandTable:
    """All commands, by what a CDB begins with: operation code, or that and a service action.

    Invariant: an operation code is in ``by_opcode`` or in ``by_service_action``, never in both.
    """

    __slots__ = ("by_opcode", "by_service_action", "commands")

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.by_opcode: dict[int, Command] = {}
        self.by_service_action: dict[int, dict[int, Command]] = {}

    def add(self, commands: Iterable[Command]) -> None:
        """Enter the commands of a family, in the order in which they are reported."""
        for command in commands:
            self.commands.append(command)
            if command.service_action is None:
                known, key = self.by_opcode, command.opcode
                assert command.opcode not in self.by_service_action
            else:
                known = self.by_service_action.setdefault(command.opcode, {})
                key = command.service_action
                assert command.opcode not in self.by_opcode
            assert key not in known, f"{command.name} and {known[key].name} are told by one CDB"
            known[key] = command

    def find(self, cdb: bytes) -> Command:
        """The command of a CDB. Raises CheckCondition where there is none."""
        command = self.by_opcode.get(cdb[0])
        if command is not None:
            return command
        actions = self.by_service_action.get(cdb[0])
        if actions is None:
            raise CheckCondition(sense.INVALID_OPCODE)
        command = actions.get(cdb[1] & 0x1F)
        if command is None:
            raise CheckCondition(sense.invalid_field_in_cdb(1, 4))
        return command


def cut(data: bytes, allocation_bytes: int) -> Reply:
    """A reply of at most the allocation length."""
    return Reply(data[:allocation_bytes])


NO_DATA: Final = Reply()


def check_range(unit: LogicalUnit, lba: int, sectors: int) -> tuple[int, int]:
    """Offset and length in bytes of a range of sectors; LBA OUT OF RANGE where it passes the end.

    A length of zero is no error, but its LBA must still lie on the disk (SBC-3 5.11; libiscsi's
    suite tests it).
    """
    total = unit.sectors
    if lba > total or sectors > total - lba or (sectors == 0 and lba == total):
        raise CheckCondition(sense.LBA_OUT_OF_RANGE)
    return lba << SECTOR_SHIFT, sectors << SECTOR_SHIFT
