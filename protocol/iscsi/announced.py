"""What a command's PDU says of its data, held against what was agreed on at login and against what
its CDB wants.
"""

from protocol.iscsi.keys import Parameters
from protocol.iscsi.pdu import FINAL, READ, WRITE, Pdu
from protocol.scsi import sense
from protocol.scsi.errors import CheckCondition
from protocol.scsi.plan import Operation, Plan


def check_unsolicited(pdu: Pdu, parameters: Parameters) -> None:
    """Raise CheckCondition for data that a command brings or announces unasked (RFC
    7143 11.4.7.2).
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
