"""From a CDB to a plan: one table of commands, one order of checks, and the report of what the
table holds (SPC-4 6.35).
"""

from struct import Struct
from typing import Final

from protocol.scsi import opcodes, sense
from protocol.scsi.command import Command, Request, cut, usage
from protocol.scsi.commands import (
    atomic,
    block,
    extended_copy,
    inquiry,
    log_sense,
    mode,
    provisioning,
    reservation,
    sanitize,
    unit,
)
from protocol.scsi.errors import CheckCondition, ReservationConflict
from protocol.scsi.logical_unit import LogicalUnit, Nexus, UnitNexus
from protocol.scsi.plan import Plan

_SUPPORTED: Final = 0x03
_UNSUPPORTED: Final = 0x01
_ALL_COMMANDS_ENTRY: Final = Struct(">BxHxBH")
_TIMEOUTS_DESCRIPTOR: Final = bytes((0x00, 0x0A)) + bytes(10)  # no timeouts are promised
_SERVICE_ACTION_VALID: Final = 0x01
_TIMEOUTS_PRESENT: Final = 0x02
# ABORT TASK, ABORT TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET, TARGET RESET (iSCSI's warm and
# cold ones).
_TASK_MANAGEMENT_SUPPORTED: Final = bytes((0x80 | 0x40 | 0x10 | 0x08 | 0x02, 0, 0, 0))


def _all_commands(timeouts: bool) -> bytes:
    body = b""
    for command in COMMANDS:
        flags = (_SERVICE_ACTION_VALID if command.service_action is not None else 0) | (
            _TIMEOUTS_PRESENT if timeouts else 0
        )
        body += _ALL_COMMANDS_ENTRY.pack(
            command.opcode, command.service_action or 0, flags, command.cdb_bytes
        )
        body += _TIMEOUTS_DESCRIPTOR if timeouts else b""
    return len(body).to_bytes(4, "big") + body


def _with_service_action(command: Command) -> bytes:
    """CDB usage data, in which the service action stands with its value (SPC-4 6.35.3)."""
    if command.service_action is None:
        return command.usage
    mixed = bytearray(command.usage)
    mixed[1] = mixed[1] & 0xE0 | command.service_action
    return bytes(mixed)


def _one_command(command: Command | None, timeouts: bool) -> bytes:
    if command is None:
        return bytes((0, _UNSUPPORTED, 0, 0))
    data = _with_service_action(command)
    head = bytes((0, _SUPPORTED | (0x80 if timeouts else 0), 0, len(data)))
    return head + data + (_TIMEOUTS_DESCRIPTOR if timeouts else b"")


def _reported(request: Request) -> Command | None:
    """The command that REPORT SUPPORTED OPERATION CODES asks about, by its reporting options 1 to
    3.
    """
    option, opcode, action = (
        request.cdb[2] & 0x07,
        request.cdb[3],
        int.from_bytes(request.cdb[4:6], "big"),
    )
    with_actions = opcode in _BY_SERVICE_ACTION
    if (option == 1 and with_actions) or (option == 2 and not with_actions):
        raise CheckCondition(sense.invalid_field_in_cdb(2, 2))
    if with_actions:
        return _BY_SERVICE_ACTION[opcode].get(action)
    return _BY_OPCODE.get(opcode) if option == 1 or action == 0 else None


def report_supported_operation_codes(request: Request) -> Plan:
    """All commands, or one: by operation code, by service action, or by whichever applies."""
    cdb = request.cdb
    option, timeouts = cdb[2] & 0x07, bool(cdb[2] & 0x80)
    if option > 3:
        raise CheckCondition(sense.invalid_field_in_cdb(2, 2))
    data = _all_commands(timeouts) if option == 0 else _one_command(_reported(request), timeouts)
    return cut(data, int.from_bytes(cdb[6:10], "big"))


def report_supported_task_management(request: Request) -> Plan:
    """Which task management functions are answered (SPC-4 6.36)."""
    extended = bool(request.cdb[2] & 0x80)
    data = (
        _TASK_MANAGEMENT_SUPPORTED
        if not extended
        else _TASK_MANAGEMENT_SUPPORTED[:3] + b"\x0c" + bytes(12)
    )
    return cut(data, int.from_bytes(request.cdb[6:10], "big"))


_OWN: Final = (
    Command(
        "REPORT SUPPORTED OPERATION CODES",
        usage("a31f87ffffffffffffff0000"),
        report_supported_operation_codes,
        service_action=opcodes.REPORT_SUPPORTED_OPERATION_CODES,
        despite_sanitize=True,
    ),
    Command(
        "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS",
        usage("a31f80000000ffffffff0000"),
        report_supported_task_management,
        service_action=opcodes.REPORT_SUPPORTED_TASK_MANAGEMENT,
        despite_sanitize=True,
    ),
)

COMMANDS: Final[tuple[Command, ...]] = (
    unit.COMMANDS
    + inquiry.COMMANDS
    + mode.COMMANDS
    + block.COMMANDS
    + provisioning.COMMANDS
    + atomic.COMMANDS
    + reservation.COMMANDS
    + extended_copy.COMMANDS
    + sanitize.COMMANDS
    + log_sense.COMMANDS
    + _OWN
)
_BY_OPCODE: Final = {
    command.opcode: command for command in COMMANDS if command.service_action is None
}
_BY_SERVICE_ACTION: Final[dict[int, dict[int, Command]]] = {}
for _command in COMMANDS:
    if _command.service_action is not None:
        _BY_SERVICE_ACTION.setdefault(_command.opcode, {})[_command.service_action] = _command
assert len(COMMANDS) == len(_BY_OPCODE) + sum(map(len, _BY_SERVICE_ACTION.values()))


# These are allowed under every kind of reservation.
_ALLOWED_DESPITE_RESERVATION: Final = frozenset(
    (opcodes.TEST_UNIT_READY, opcodes.READ_CAPACITY_10, opcodes.SERVICE_ACTION_IN_16)
)


def _find(cdb: bytes) -> Command:
    command = _BY_OPCODE.get(cdb[0])
    if command is not None:
        return command
    actions = _BY_SERVICE_ACTION.get(cdb[0])
    if actions is None:
        raise CheckCondition(sense.INVALID_OPCODE)
    command = actions.get(cdb[1] & 0x1F)
    if command is None:
        raise CheckCondition(sense.invalid_field_in_cdb(1, 4))
    return command


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
    if not (command.needs_medium or command.reserved):
        return
    if command.opcode in _ALLOWED_DESPITE_RESERVATION:
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
    """Check a command, in the order of SAM-5 5.14 and SPC-4 4.2, and return what it wants of its
    transport.

    ``cdb`` is 16 bytes or more. Raises `ScsiError` with the status to send.
    """
    mapped = nexus.units.get(lun)
    if mapped is not None:
        mapped.unit.refresh_capacity()
    command = _BY_OPCODE.get(cdb[0])
    waiting = None
    if (
        mapped is not None
        and mapped.attentions
        and not (command is not None and command.despite_attention)
    ):
        waiting = mapped.take_attention()
    if waiting is not None:
        raise CheckCondition(waiting)
    command = _find(cdb)
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
