"""What a command's PDU says of its data, held against what was agreed on at login and against what its CDB wants."""

from protocol.iscsi.keys import Parameters
from protocol.iscsi.pdu import FINAL, READ, WRITE, Pdu
from protocol.scsi import sense
from protocol.scsi.errors import CheckCondition
from protocol.scsi.plan import Operation, Plan


def check_unsolicited(pdu: Pdu, parameters: Parameters) -> None:
    """Raise CheckCondition for data that a command brings or announces unasked (RFC 7143 11.4.7.2)."""
    size = len(pdu.data)
    if not pdu.flags & WRITE:
        if size:
            raise CheckCondition(sense.UNEXPECTED_UNSOLICITED_DATA)
        return
    if (size and not parameters.immediate_data) or (not pdu.flags & FINAL and parameters.initial_r2t):
        raise CheckCondition(sense.UNEXPECTED_UNSOLICITED_DATA)
    if size > min(parameters.unsolicited_bytes, pdu.expected_length):
        raise CheckCondition(sense.INCORRECT_AMOUNT_OF_DATA)


def check_direction(pdu: Pdu, plan: Plan) -> None:
    """Raise CheckCondition where data are announced the other way than the plan moves them, or not as many as an exact one wants.

    GOOD would say that they were moved: a WRITE whose PDU announces a read, say, would have written nothing.
    """
    out_bytes = pdu.expected_length if pdu.flags & WRITE else 0
    in_bytes = pdu.expected_length if pdu.flags & READ else 0
    if isinstance(plan, Operation):
        wrong = (plan.data_bytes and in_bytes) or (plan.exact and plan.data_bytes != out_bytes)
    else:
        wrong = out_bytes
    if wrong:
        raise CheckCondition(sense.INVALID_FIELD_IN_CDB)
