"""What a peer may not do in the full feature phase, and what it gets: a reject, a sense, silence,
or the end.
"""

import pytest

from protocol.iscsi import limits, pdu
from protocol.iscsi.pdu import FINAL, IMMEDIATE, RESERVED_TAG, Pdu, pack
from tests.protocol.coupling import Coupling, coupled, feed, settings
from tests.protocol.directory import recorded
from tests.protocol.exchanges import FIRST, Results, answer_to, command_pdu, data_out, solicited
from tests.protocol.memory_volume import MemoryVolume

SIZE = 8 << 20


@pytest.mark.parametrize(
    ("request_pdu", "reason"),
    [
        (pack(pdu.SNACK_REQUEST, FINAL, 1), pdu.REJECT_SNACK),
        (pack(0x1F, FINAL, 1), pdu.REJECT_NOT_SUPPORTED),
        (pack(pdu.NOP_IN, FINAL, 1), pdu.REJECT_NOT_SUPPORTED),
        (
            pack(pdu.TEXT_REQUEST | IMMEDIATE, FINAL, 1, length=4, words=FIRST) + b"junk",
            pdu.REJECT_PROTOCOL_ERROR,
        ),
    ],
)
def test_rejects_carry_the_header(request_pdu, reason):
    pair = coupled(MemoryVolume(SIZE))
    answer = answer_to(pair, request_pdu)
    assert (answer.opcode, answer.byte2, answer.itt) == (pdu.REJECT, reason, RESERVED_TAG)
    assert bytes(answer.data) == request_pdu[:48] and not pair.peer.closed


def test_a_task_tag_in_use_is_rejected():
    volume = MemoryVolume(SIZE)
    volume.hold_reads = True
    pair = coupled(volume)
    command = pair.initiator.submit_read(0, 0, 512, Results())
    pair.run()
    answer = answer_to(pair, command_pdu(0xC1, command.itt, 0x28, cmd_sn=2))
    assert (answer.opcode, answer.byte2) == (pdu.REJECT, pdu.REJECT_TASK_IN_PROGRESS)


@pytest.mark.parametrize("cmd_sn", [0, 0xFFFFFFFF, 1 + limits.COMMAND_WINDOW, 0x80000000])
def test_command_numbers_outside_the_window_are_ignored(cmd_sn):
    pair = coupled(MemoryVolume(SIZE))
    feed(pair.target, pack(pdu.SCSI_COMMAND, FINAL, 9, words=(0, cmd_sn, 0, 0, 0, 0, 0)))
    assert not pair.peer.sent and not pair.peer.closed
    pair.command(bytes(6))


def test_a_gap_in_command_numbers_ends_the_connection():
    pair = coupled(MemoryVolume(SIZE))
    feed(pair.target, pack(pdu.SCSI_COMMAND, FINAL, 9, words=(0, 2, 0, 0, 0, 0, 0)))
    assert pair.peer.closed


def test_a_login_request_in_the_full_feature_phase_ends_the_connection():
    pair = coupled(MemoryVolume(SIZE))
    feed(pair.target, pack(pdu.LOGIN_REQUEST | IMMEDIATE, 0, 9))
    assert pair.peer.closed


def test_a_wrong_header_digest_ends_the_connection():
    pair = coupled(MemoryVolume(SIZE), header_digest=True)
    feed(pair.target, pack(pdu.NOP_OUT | IMMEDIATE, FINAL, 9) + b"\0\0\0\0")
    assert pair.peer.closed and pair.target.failure == "header digest"


def test_a_wrong_data_digest_of_a_command_is_rejected_and_its_number_is_not_taken():
    pair = coupled(MemoryVolume(SIZE), data_digest=True)
    feed(pair.target, command_pdu(0xA1, 9, 0x2A, length=512) + bytes(512) + b"\1\2\3\4")
    answer = Pdu(pair.peer.take()[:48], b"", memoryview(b""))
    assert (answer.opcode, answer.byte2, answer.exp_cmd_sn) == (
        pdu.REJECT,
        pdu.REJECT_DATA_DIGEST,
        1,
    )
    pair.command(bytes(6))


@pytest.mark.parametrize(
    ("broken", "asc"),
    [
        ({"sn": 1}, (0xB, 0x47, 0x05)),
        ({"sn": 0xFFFFFFFF}, (0xB, 0x47, 0x05)),
        ({"offset": 512}, (0xB, 0x47, 0x05)),
        ({"size": 8704}, (0xB, 0x0C, 0x0D)),
        ({"flags": FINAL}, (0xB, 0x0C, 0x0D)),
    ],
)
def test_broken_data_sequences_end_the_task(broken, asc):
    volume = MemoryVolume(SIZE)
    pair = coupled(volume, immediate_data=False)
    results, itt, ttt = solicited(pair)
    feed(pair.target, data_out(itt, ttt, **broken))
    pair.run()
    assert (results.failure.key, results.failure.asc, results.failure.ascq) == asc
    feed(pair.target, data_out(itt, ttt, flags=FINAL))  # late data of a task that has ended
    pair.run()
    assert not pair.peer.closed and pair.target.describe()["commands_in_flight"] == 0


def test_a_transfer_tag_that_was_not_given_ends_the_connection():
    pair = coupled(MemoryVolume(SIZE), immediate_data=False)
    _, itt, ttt = solicited(pair)
    feed(pair.target, data_out(itt, ttt + 1))
    assert pair.peer.closed


def test_a_lost_data_pdu_ends_its_task():
    pair = coupled(MemoryVolume(SIZE), immediate_data=False, data_digest=True)
    results, itt, ttt = solicited(pair)
    feed(pair.target, data_out(itt, ttt) + b"\1\2\3\4")
    pair.run()
    assert (results.failure.key, results.failure.asc) == (0xB, 0x47)
    assert pair.initiator.rejects == 1


@pytest.mark.parametrize(
    ("flags", "length", "expected", "changes", "asc"),
    [
        (0xA1, 512, 512, {"immediate_data": False}, (0x0C, 0x0C)),
        (0x21, 0, 512, {"initial_r2t": True}, (0x0C, 0x0C)),
        (0xA1, 1024, 1024, {"first_burst_bytes": 512}, (0x0C, 0x0D)),
        (0xA1, 1024, 512, {}, (0x0C, 0x0D)),
        (0xC1, 512, 512, {}, (0x0C, 0x0C)),
    ],
)
def test_unsolicited_data_that_were_not_agreed_on(flags, length, expected, changes, asc):
    pair = coupled(MemoryVolume(SIZE), **changes)
    head = command_pdu(flags, 9, 0x2A if flags & 0x20 else 0x28, expected=expected, length=length)
    answer = answer_to(pair, head + bytes(length))
    assert (
        answer.opcode,
        answer.byte3,
        answer.data[2 + 2] & 15,
        tuple(answer.data[2 + 12 : 2 + 14]),
    ) == (pdu.SCSI_RESPONSE, 2, 0xB, asc)


@pytest.mark.parametrize("opcode", [0x2A, 0x0A, 0x2E, 0x41])
def test_a_write_whose_data_are_announced_as_a_read(opcode):
    pair = coupled(MemoryVolume(SIZE))
    answer = answer_to(pair, command_pdu(pdu.FINAL | pdu.READ | pdu.SIMPLE, 9, opcode))
    assert (answer.opcode, answer.byte3) == (pdu.SCSI_RESPONSE, 2)
    assert (answer.data[2 + 2] & 15, tuple(answer.data[2 + 12 : 2 + 14])) == (5, (0x24, 0))


@pytest.mark.parametrize("attribute", [2, 3])
def test_an_ordered_read_sees_the_write_before_it(attribute):
    pair = coupled(MemoryVolume(SIZE))
    write = (
        command_pdu(pdu.FINAL | pdu.WRITE | pdu.SIMPLE, 8, 0x2A, length=512, cmd_sn=1) + b"n" * 512
    )
    read = command_pdu(pdu.FINAL | pdu.READ | attribute, 9, 0x28, cmd_sn=2)
    feed(pair.target, write + read)
    sent = pair.peer.take()
    assert sent[0] == pdu.SCSI_RESPONSE and sent[48] == pdu.DATA_IN
    assert sent[96:] == b"n" * 512


def test_a_command_in_a_discovery_session_ends_the_connection():
    node = recorded({0: MemoryVolume(SIZE)})
    pair = Coupling(node, settings(target_name="")).login()
    feed(pair.target, pack(pdu.SCSI_COMMAND, 0xC1, 9, words=(0, 1, 0, 0, 0, 0, 0)))
    assert pair.peer.closed
