"""What is supported (SPC-4 6.35, 6.36): REPORT SUPPORTED OPERATION CODES tells what the command
table holds, REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS which of those are carried out.
"""

from struct import Struct
from typing import Final

from protocol.scsi import opcodes, sense
from protocol.scsi.command import Command, CommandTable, Request, cut
from protocol.scsi.errors import CheckCondition
from protocol.scsi.plan import Plan

SUPPORTED_OPERATION_CODES: Final = 0x0C
SUPPORTED_TASK_MANAGEMENT: Final = 0x0D
_SUPPORTED: Final = 0x03
_UNSUPPORTED: Final = 0x01
_ALL_COMMANDS_ENTRY: Final = Struct(">BxHxBH")
_TIMEOUTS_DESCRIPTOR: Final = bytes((0x00, 0x0A)) + bytes(10)  # no timeouts are promised
_SERVICE_ACTION_VALID: Final = 0x01
_TIMEOUTS_PRESENT: Final = 0x02
# ABORT TASK, ABORT TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET, TARGET RESET (iSCSI's warm and
# cold ones).
_TASK_MANAGEMENT_SUPPORTED: Final = bytes((0x80 | 0x40 | 0x10 | 0x08 | 0x02, 0, 0, 0))


def _all_commands(table: CommandTable, timeouts: bool) -> bytes:
    body = b""
    for command in table.commands:
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


def _reported(table: CommandTable, cdb: bytes) -> Command | None:
    """The command that REPORT SUPPORTED OPERATION CODES asks about, by its reporting options 1 to
    3.
    """
    option, opcode, action = cdb[2] & 0x07, cdb[3], int.from_bytes(cdb[4:6], "big")
    with_actions = opcode in table.by_service_action
    if (option == 1 and with_actions) or (option == 2 and not with_actions):
        raise CheckCondition(sense.invalid_field_in_cdb(2, 2))
    if with_actions:
        return table.by_service_action[opcode].get(action)
    return table.by_opcode.get(opcode) if option == 1 or action == 0 else None


def report_operation_codes(table: CommandTable, request: Request) -> Plan:
    """All commands, or one: by operation code, by service action, or by whichever applies."""
    cdb = request.cdb
    option, timeouts = cdb[2] & 0x07, bool(cdb[2] & 0x80)
    if option > 3:
        raise CheckCondition(sense.invalid_field_in_cdb(2, 2))
    data = (
        _all_commands(table, timeouts)
        if option == 0
        else _one_command(_reported(table, cdb), timeouts)
    )
    return cut(data, int.from_bytes(cdb[6:10], "big"))


def report_task_management(request: Request) -> Plan:
    """Which task management functions are carried out."""
    extended = bool(request.cdb[2] & 0x80)
    data = (
        _TASK_MANAGEMENT_SUPPORTED
        if not extended
        else _TASK_MANAGEMENT_SUPPORTED[:3] + b"\x0c" + bytes(12)
    )
    return cut(data, int.from_bytes(request.cdb[6:10], "big"))


def commands(table: CommandTable) -> tuple[Command, ...]:
    """The rows of this family, which report ``table`` as it is when they are carried out."""
    return (
        Command(
            opcodes.MAINTENANCE_IN,
            "REPORT SUPPORTED OPERATION CODES",
            "1f87ffffffffffffff0000",
            lambda request: report_operation_codes(table, request),
            service_action=SUPPORTED_OPERATION_CODES,
            despite_sanitize=True,
        ),
        Command(
            opcodes.MAINTENANCE_IN,
            "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS",
            "1f80000000ffffffff0000",
            report_task_management,
            service_action=SUPPORTED_TASK_MANAGEMENT,
            despite_sanitize=True,
        ),
    )
