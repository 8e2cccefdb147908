"""Commands about the unit itself: readiness, sense, start and stop, medium removal (SPC-4 clause 6,
SBC-3 5.25).
"""

from typing import Final

from protocol.scsi import opcodes, sense
from protocol.scsi.command import NO_DATA, Command, Request, cut
from protocol.scsi.logical_unit import LogicalUnit
from protocol.scsi.plan import Operation, Plan
from protocol.scsi.sense import Sense

_START: Final = 0x01
_POWER_CONDITION: Final = 0xF0
_NO_FLUSH: Final = 0x04


def unit_ready(_request: Request) -> Plan:
    """TEST UNIT READY: the dispatcher has checked that the unit is started."""
    return NO_DATA


def request_sense(request: Request) -> Plan:
    """REQUEST SENSE: with autosense there is nothing pending but unit attentions (SPC-4 6.39)."""
    descriptor = bool(request.cdb[1] & 0x01)
    if request.mapped is None:
        cause = sense.LOGICAL_UNIT_NOT_SUPPORTED
    else:
        waiting = request.mapped.take_attention()
        cause = waiting if waiting is not None else _condition(request.unit)
    return cut(cause.encode(descriptor), request.cdb[4])


def _condition(unit: LogicalUnit) -> Sense:
    """The state of a unit without unit attentions; for a sanitize operation with its progress
    (SPC-4 5.11).
    """
    if unit.sanitization is not None:
        return unit.sanitization.cause()
    return sense.NOTHING if unit.started else sense.INITIALIZING_COMMAND_REQUIRED


def start_stop_unit(request: Request) -> Plan:
    """START STOP UNIT: a stopped unit answers NOT READY to medium access until it is started.
    Stopping flushes first.
    """
    unit, flags = request.unit, request.cdb[4]
    if flags & _POWER_CONDITION:
        return NO_DATA  # a vdisk has no power conditions
    unit.started = bool(flags & _START)
    unit.state_changed()
    if unit.started or flags & _NO_FLUSH:
        return NO_DATA
    return Operation(0, lambda _, done: unit.volume.flush(done))


def prevent_allow_medium_removal(_request: Request) -> Plan:
    """PREVENT ALLOW MEDIUM REMOVAL: the medium cannot be removed anyway."""
    return NO_DATA


COMMANDS: Final = (
    Command(
        opcodes.TEST_UNIT_READY,
        "TEST UNIT READY",
        "0000000000",
        unit_ready,
        needs_medium=True,
        despite_reservation=True,
    ),
    Command(
        opcodes.REQUEST_SENSE,
        "REQUEST SENSE",
        "010000ff00",
        request_sense,
        any_lun=True,
        despite_attention=True,
    ),
    Command(
        opcodes.START_STOP_UNIT, "START STOP UNIT", "01000ff700", start_stop_unit, reserved=True
    ),
    Command(
        opcodes.PREVENT_ALLOW_MEDIUM_REMOVAL,
        "PREVENT ALLOW MEDIUM REMOVAL",
        "0000000300",
        prevent_allow_medium_removal,
    ),
)
