"""From a CDB to a plan: one table of commands, and one order of checks."""

from typing import Final

from protocol.scsi import sense
from protocol.scsi.command import Command, CommandTable, Request
from protocol.scsi.commands import (
    atomic,
    copy,
    identity,
    log,
    medium,
    mode,
    provisioning,
    readiness,
    reservation,
    sanitize,
    supported,
)
from protocol.scsi.errors import CheckCondition, ReservationConflict
from protocol.scsi.logical_unit import LogicalUnit, Nexus, UnitNexus
from protocol.scsi.plan import Plan

TABLE: Final = CommandTable()
# In the order of REPORT SUPPORTED OPERATION CODES.
for _family in (
    readiness.COMMANDS,
    identity.COMMANDS,
    mode.COMMANDS,
    medium.COMMANDS,
    provisioning.COMMANDS,
    atomic.COMMANDS,
    reservation.COMMANDS,
    copy.COMMANDS,
    sanitize.COMMANDS,
    log.COMMANDS,
    supported.commands(TABLE),
):
    TABLE.add(_family)


def _check_reservation(mapped: UnitNexus | None, command: Command) -> None:
    """Raise ReservationConflict where another's reservation forbids the command (SPC-4 table 49,
    SBC-3 table 6).
    """
    if mapped is None:
        return
    if not (command.any_lun or command.despite_exclusion) and mapped.unit.reservations.excludes(
        mapped.nexus.id
    ):
        raise ReservationConflict
    if not (command.needs_medium or command.reserved) or command.despite_reservation:
        return
    if mapped.unit.reservations.forbids(mapped.nexus.id, command.writes or command.reserved):
        raise ReservationConflict


def _check_sanitize(unit: LogicalUnit, command: Command) -> None:
    """Raise CheckCondition where a sanitize operation, under way or failed, forbids the command
    (SBC-3 4.11.3, 4.11.4).
    """
    state = unit.sanitization
    if (
        state is None
        or command.any_lun
        or command.despite_sanitize
        or (state.failed and command.after_failed_sanitize)
    ):
        return
    raise CheckCondition(state.cause())


def prepare(nexus: Nexus, lun: int, cdb: bytes) -> Plan:
    """Check a command, in the order of SAM-5 5.14 and SPC-4 4.2, and return the plan for its
    transport.

    ``cdb`` is 16 bytes or more. Raises `ScsiError` with the status to send.
    """
    mapped = nexus.units.get(lun)
    if mapped is not None:
        mapped.unit.refresh_capacity()
    command = TABLE.by_opcode.get(cdb[0])
    waiting = None
    if (
        mapped is not None
        and mapped.attentions
        and not (command is not None and command.despite_attention)
    ):
        waiting = mapped.take_attention()
    if waiting is not None:
        raise CheckCondition(waiting)
    command = TABLE.find(cdb)
    if mapped is None and not command.any_lun:
        raise CheckCondition(sense.LOGICAL_UNIT_NOT_SUPPORTED)
    command.check_reserved(cdb)
    _check_reservation(mapped, command)
    if mapped is not None:
        _check_sanitize(mapped.unit, command)
    request = Request(nexus, lun, mapped, cdb)
    if command.needs_medium and not request.unit.started:
        raise CheckCondition(sense.INITIALIZING_COMMAND_REQUIRED)
    plan = command.handler(request)
    if command.writes and request.unit.write_protected:
        raise CheckCondition(sense.WRITE_PROTECTED)
    return plan
