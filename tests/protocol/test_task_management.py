"""Abort and reset: answered only when no volume holds what was aborted."""

import pytest

from protocol.iscsi import limits, pdu, task_management
from protocol.iscsi.initiator.task import CommandFailed
from tests.protocol.coupling import Coupling, coupled, feed, settings
from tests.protocol.directory import recorded
from tests.protocol.exchanges import Results, answer_to, manage
from tests.protocol.memory_volume import MemoryVolume

SIZE = 8 << 20
CLEAR_ACA = 3  # RFC 7143 11.5.1: one that is not supported


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("function", [1, 2, 4, 5, 6])
def test_an_abort_is_answered_only_when_the_volume_has_let_go(function, fast):
    volume = MemoryVolume(SIZE)
    volume.hold_writes = True
    pair = coupled(volume, header_digest=not fast)
    results = Results()
    task = pair.initiator.submit_write(0, 0, bytes(4096), results)
    pair.run()
    answers = manage(pair, function, task=task)
    assert answers == [] and pair.target.describe()["commands_in_flight"] == 1
    volume.release()
    pair.run()
    assert answers == [task_management.COMPLETE]
    assert results.got == [] and pair.target.describe()["commands_in_flight"] == 0


def test_a_task_that_waits_for_data_is_aborted_at_once():
    volume = MemoryVolume(SIZE)
    pair = coupled(volume, immediate_data=False)
    results = Results()
    task = pair.initiator.submit_write(0, 0, bytes(4096), results)
    pair.initiator.flush_output()
    feed(pair.target, pair.to_target.popleft())
    assert pair.peer.take()[0] == pdu.R2T  # the initiator does not see it
    assert manage(pair, task_management.ABORT_TASK, task=task) == [task_management.COMPLETE]
    assert pair.target.describe()["commands_in_flight"] == 0 and volume.data[:4096] == bytes(4096)


def test_a_held_read_is_aborted_when_it_comes_back():
    volume = MemoryVolume(SIZE)
    volume.hold_reads = True
    pair = coupled(volume)
    results = Results()
    pair.initiator.submit_read(0, 0, 4096, results)
    pair.run()
    answers = manage(pair, task_management.ABORT_TASK_SET)
    assert answers == []
    volume.release()
    pair.run()
    assert answers == [0] and results.got == []


def test_two_functions_wait_for_one_task():
    volume = MemoryVolume(SIZE)
    volume.hold_writes = True
    pair = coupled(volume)
    pair.initiator.submit_write(0, 0, bytes(512), Results())
    pair.run()
    first, second = (
        manage(pair, task_management.ABORT_TASK_SET),
        manage(pair, task_management.LOGICAL_UNIT_RESET),
    )
    assert first == second == []
    volume.release()
    pair.run()
    assert first == second == [0]


def test_functions_that_wait_are_bounded():
    volume = MemoryVolume(SIZE)
    volume.hold_writes = True
    pair = coupled(volume)
    pair.initiator.submit_write(0, 0, bytes(512), Results())
    pair.run()
    immediate = pdu.pack(
        pdu.TASK_MANAGEMENT_REQUEST | pdu.IMMEDIATE,
        pdu.FINAL | 2,
        9,
        words=(pdu.RESERVED_TAG, 2, 0, 0, 0, 0, 0),
    )
    feed(pair.target, immediate * limits.TASK_MANAGEMENT_WAITING_MAX)
    assert pair.peer.take() == b""
    assert answer_to(pair, immediate).opcode == pdu.REJECT
    queued = pdu.pack(
        pdu.TASK_MANAGEMENT_REQUEST, pdu.FINAL | 2, 9, words=(pdu.RESERVED_TAG, 2, 0, 0, 0, 0, 0)
    )
    assert answer_to(pair, queued).byte2 == task_management.REJECTED
    volume.release()
    pair.target.flush_output()
    assert len(pair.peer.take()) == limits.TASK_MANAGEMENT_WAITING_MAX * pdu.HEADER_BYTES
    assert answer_to(pair, immediate).byte2 == task_management.COMPLETE  # there is room again


@pytest.mark.parametrize(
    ("function", "lun", "answer"),
    [
        (task_management.ABORT_TASK, 0, task_management.NO_TASK),
        (task_management.ABORT_TASK_SET, 5, task_management.NO_LUN),
        (task_management.LOGICAL_UNIT_RESET, 5, task_management.NO_LUN),
        (task_management.CLEAR_TASK_SET, 5, task_management.NO_LUN),
        (CLEAR_ACA, 0, task_management.NOT_SUPPORTED),
        (task_management.TASK_REASSIGN, 0, task_management.NO_REASSIGNMENT),
        (task_management.TARGET_COLD_RESET, 0, task_management.COMPLETE),
        (0x7F, 0, task_management.NOT_SUPPORTED),
        (task_management.ABORT_TASK_SET, 0, task_management.COMPLETE),
        (task_management.TARGET_WARM_RESET, 0, task_management.COMPLETE),
    ],
)
def test_functions_with_nothing_to_abort(function, lun, answer):
    assert manage(coupled(MemoryVolume(SIZE)), function, lun) == [answer]


def test_a_reset_reaches_the_tasks_of_other_sessions_and_tells_them():
    volume = MemoryVolume(SIZE)
    node = recorded({0: volume})
    one, other = (Coupling(node, settings(isid=isid)).login() for isid in (1, 2))
    for mapped in node.unit_for(volume).nexuses:
        mapped.take_attention()
    volume.hold_writes = True
    results = Results()
    other.initiator.submit_write(0, 0, bytes(512), results)
    other.run()
    answers = manage(one, task_management.LOGICAL_UNIT_RESET)
    assert answers == []
    volume.release()
    other.run()
    one.run()
    assert answers == [0] and results.got == []
    with pytest.raises(CommandFailed, match="6/29/03"):
        other.command(bytes(6))


def test_a_cold_reset_ends_every_session_of_the_target_after_its_answer():
    volume = MemoryVolume(SIZE)
    node = recorded({0: volume})
    node.directory.targets["iqn.2026-01.io.cleaved:other"] = {0: volume}
    one, second = (Coupling(node, settings(isid=isid)).login() for isid in (1, 2))
    elsewhere = Coupling(node, settings(target_name="iqn.2026-01.io.cleaved:other", isid=3)).login()
    volume.hold_writes = True
    node.unit_for(volume).nexuses[0].take_attention()
    write = Results()
    one.initiator.submit_write(0, 0, bytes(512), write)
    one.run()
    assert manage(one, task_management.TARGET_COLD_RESET) == []  # the write is under way
    assert [pair.peer.closed for pair in (one, second, elsewhere)] == [False, False, False]
    volume.release()
    one.run()
    assert [pair.peer.closed for pair in (one, second, elsewhere)] == [True, True, False]
    assert [session.target_name for session in node.sessions.values()] == [
        "iqn.2026-01.io.cleaved:other"
    ]
