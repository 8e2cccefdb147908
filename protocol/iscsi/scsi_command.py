"""SCSI Command PDUs (RFC 7143 11.3): check what a PDU announces against the negotiated parameters
and the CDB, and execute the command.
"""

from typing import Final

from protocol.iscsi.data_in import QueryAnswer, send_extent, send_reply
from protocol.iscsi.data_out import WriteAllowance, WriteTask
from protocol.iscsi.keys import Parameters
from protocol.iscsi.pdu import (
    FINAL,
    READ,
    SIMPLE,
    TASK_ATTRIBUTE,
    WRITE,
    Pdu,
)
from protocol.iscsi.session import Session, Task
from protocol.scsi import dispatch, opcodes, sense
from protocol.scsi.errors import CheckCondition, ScsiError
from protocol.scsi.lun import decode_lun
from protocol.scsi.plan import Operation, Plan, Query, ReadExtent, Reply

_BATCHED: Final = frozenset(
    (
        opcodes.READ_10,
        opcodes.READ_12,
        opcodes.READ_16,
        opcodes.WRITE_10,
        opcodes.WRITE_12,
        opcodes.WRITE_16,
    )
)
_UNORDERED: Final = frozenset((0, SIMPLE))  # untagged counts as simple
_OPERATION_CODE_AT: Final = 32


def check_unsolicited(pdu: Pdu, parameters: Parameters) -> None:
    """Raise CheckCondition for data that a command brings or announces without having been asked
    for them (RFC 7143 11.4.7.2).
    """
    size = len(pdu.data)
    if not pdu.flags & WRITE:
        if size:
            raise CheckCondition(sense.UNEXPECTED_UNSOLICITED_DATA)
        return
    if (size and not parameters.immediate_data) or (
        not pdu.flags & FINAL and parameters.initial_r2t
    ):
        raise CheckCondition(sense.UNEXPECTED_UNSOLICITED_DATA)
    if size > min(parameters.unsolicited_bytes, pdu.expected_length):
        raise CheckCondition(sense.INCORRECT_AMOUNT_OF_DATA)


def check_direction(pdu: Pdu, plan: Plan) -> None:
    """Raise CheckCondition where a write's PDU announces a read, or not as many data as an exact
    plan wants.

    GOOD would say that they were written. (A read whose PDU announces a write is GOOD, and brings
    no data: libiscsi's suite wants it so.)
    """
    if not isinstance(plan, Operation):
        return
    out_bytes = pdu.expected_length if pdu.flags & WRITE else 0
    reversed_way = plan.data_bytes and pdu.expected_length and pdu.flags & READ
    if reversed_way or (plan.exact and plan.data_bytes != out_bytes):
        raise CheckCondition(sense.INVALID_FIELD_IN_CDB)


def execute(session: Session, allowance: WriteAllowance, pdu: Pdu) -> None:
    """Check a command and carry out its plan."""
    session.commands += 1
    if (
        pdu.header[_OPERATION_CODE_AT] not in _BATCHED
        or pdu.flags & TASK_ATTRIBUTE not in _UNORDERED
    ):
        # Commands that change or report more than sectors, or are ordered, must see the writes
        # before them.
        session.settle()
    lun = decode_lun(pdu.lun)
    mapped = session.nexus.units.get(lun)
    try:
        check_unsolicited(pdu, session.parameters)
        plan = dispatch.prepare(session.nexus, lun, pdu.cdb)
        check_direction(pdu, plan)
    except ScsiError as error:
        task = Task(session, pdu.itt, mapped, pdu.expected_length, pdu.immediate)
        session.begin(task)
        cause = error.sense if isinstance(error, CheckCondition) else None
        task.end(cause=cause, status=error.status, moved=0)
        return
    if isinstance(plan, Operation):
        announced = pdu.expected_length if pdu.flags & WRITE else 0
        write = WriteTask(session, allowance, pdu, mapped, plan, announced)
        session.begin(write)
        session.write_bytes += write.total_bytes
        write.begin(pdu)
        return
    task = Task(session, pdu.itt, mapped, pdu.expected_length, pdu.immediate)
    session.begin(task)
    if isinstance(plan, Reply):
        send_reply(task, plan.data, pdu.flags)
    elif isinstance(plan, Query):
        QueryAnswer(task, pdu.flags).start(plan)
    else:
        assert isinstance(plan, ReadExtent)
        send_extent(task, plan, pdu.flags)
