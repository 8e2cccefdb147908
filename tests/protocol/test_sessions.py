"""Life and end of sessions, text requests, and backpressure, initiator and target coupled in
memory.
"""

import gc
import os
import weakref

import pytest

from protocol.iscsi import limits, pdu
from protocol.iscsi.connection import TargetConnection
from protocol.iscsi.initiator.task import ConnectionEnded
from protocol.iscsi.pdu import FINAL, IMMEDIATE, RESERVED_TAG, Pdu, pack
from protocol.volume import Buffer
from tests.protocol.coupling import Coupling, Peer, coupled, feed, settings
from tests.protocol.directory import recorded
from tests.protocol.exchanges import FIRST, Results, read, write
from tests.protocol.memory_volume import MemoryVolume

SIZE = 8 << 20


def test_ping_both_ways():
    pair = coupled(MemoryVolume(SIZE))
    answers: list[int] = []
    pair.initiator.ping(answers.append)
    pair.run()
    assert answers == [0]
    pair.target.tick(0.0)
    for now in (
        limits.KEEP_ALIVE_SECONDS,
        2 * limits.KEEP_ALIVE_SECONDS,
        3 * limits.KEEP_ALIVE_SECONDS,
    ):
        pair.target.tick(now)
        pair.run()
    assert not pair.peer.closed


def test_a_silent_peer_is_asked_and_then_dropped():
    pair = coupled(MemoryVolume(SIZE))
    pair.target.tick(0.0)
    pair.target.tick(limits.KEEP_ALIVE_SECONDS)
    asked = Pdu(pair.peer.take()[:48], b"", memoryview(b""))
    assert (asked.opcode, asked.itt) == (pdu.NOP_IN, RESERVED_TAG) and asked.ttt != RESERVED_TAG
    pair.target.tick(limits.KEEP_ALIVE_SECONDS + limits.KEEP_ALIVE_ANSWER_SECONDS - 0.1)
    assert not pair.peer.closed
    pair.target.tick(limits.KEEP_ALIVE_SECONDS + limits.KEEP_ALIVE_ANSWER_SECONDS)
    assert pair.target.failure == "the initiator does not answer"


def test_a_client_that_drains_slowly_lives():
    pair = coupled(MemoryVolume(SIZE))
    for now in range(0, 1000, 50):
        pair.target.resume_writing()
        pair.target.pause_writing()
        pair.target.tick(float(now))
    assert not pair.peer.closed


def test_a_discovery_session_ends_after_a_while():
    pair = Coupling(recorded({0: MemoryVolume(SIZE)}), settings(target_name="")).login()
    assert pair.target.discovery
    for now in range(int(limits.DISCOVERY_SECONDS_MAX) + 2):
        assert not pair.peer.closed
        pair.initiator.ping(lambda _: None)
        pair.run()
        pair.target.tick(float(now))
    assert pair.target.failure == "the discovery session took too long"


def test_logout_ends_the_session():
    pair = coupled(MemoryVolume(SIZE))
    answers: list[int] = []
    pair.initiator.logout(answers.append)
    pair.run()
    assert answers == [0]
    assert pair.peer.closed and pair.initiator_closed
    directory = pair.node.directory
    assert directory.opened == directory.closed == [pair.target]
    assert not pair.node.sessions and not pair.node.units


@pytest.mark.parametrize("connection_lost", [False, True])
def test_a_logout_is_answered_when_no_volume_holds_a_write(connection_lost):
    volume = MemoryVolume(SIZE)
    pair = coupled(volume)
    volume.hold_writes = True
    written = Results()
    pair.initiator.submit_write(0, 0, bytes(512), written)
    pair.run()
    answers: list[int] = []
    pair.initiator.logout(answers.append)
    pair.run()
    feed(pair.target, pack(pdu.NOP_OUT | IMMEDIATE, FINAL, 5, words=FIRST))
    assert answers == [] and not pair.peer.sent and not pair.peer.closed  # nor is anything else
    if connection_lost:
        pair.target.connection_lost()
    volume.release()
    pair.run()
    assert answers == ([] if connection_lost else [0]) and pair.peer.closed is not connection_lost
    assert pair.target.failure is None and pair.node.directory.closed == [pair.target]


def test_logout_of_another_connection_or_for_recovery_is_refused():
    for flags, cid, outcome in ((FINAL | 1, 9, 1), (FINAL | 2, 0, 2)):
        pair = coupled(MemoryVolume(SIZE))
        feed(
            pair.target,
            pack(pdu.LOGOUT_REQUEST | IMMEDIATE, flags, 3, words=(cid << 16, 1, 0, 0, 0, 0, 0)),
        )
        answer = Pdu(pair.peer.take()[:48], b"", memoryview(b""))
        assert (answer.opcode, answer.byte2) == (
            pdu.LOGOUT_RESPONSE,
            outcome,
        ) and not pair.peer.closed


def test_shutdown_asks_the_initiator_to_log_out():
    pair = coupled(MemoryVolume(SIZE))
    pair.target.shutdown(7)
    assert pair.peer.sent[42:44] == bytes((0, 7))  # Parameter3
    pair.run()
    assert pair.initiator.logout_requested and not pair.peer.closed


def test_a_session_that_logs_in_again_waits_for_the_older_ones_writes():
    volume = MemoryVolume(SIZE)
    node = recorded({0: volume})
    old = Coupling(node, settings()).login()
    for mapped in node.unit_for(volume).nexuses:
        mapped.take_attention()
    volume.hold_writes = True
    results = Results()
    old.initiator.submit_write(0, 0, bytes(512), results)
    old.run()
    new = Coupling(node, settings())
    new.initiator.start()
    new.run()
    assert old.peer.closed and new.login_result == []
    volume.release()
    new.run()
    assert new.login_result == [None] and node.directory.closed == [old.target]
    assert list(node.sessions.values()) == [new.target]


@pytest.mark.parametrize("second_gives_up", [True, False])
def test_the_third_login_of_a_port_waits_for_the_first_sessions_writes(second_gives_up):
    volume = MemoryVolume(SIZE)
    node = recorded({0: volume})
    first = Coupling(node, settings()).login()
    node.unit_for(volume).nexuses[0].take_attention()
    volume.hold_writes = True
    first.initiator.submit_write(0, 0, bytes(512), Results())
    first.run()
    second, third = (Coupling(node, settings()) for _ in range(2))
    second.initiator.start()
    second.run()
    if second_gives_up:
        second.target.connection_lost()
    third.initiator.start()
    third.run()
    assert second.login_result == third.login_result == []
    volume.release()
    third.run()
    assert third.login_result == [None] and list(node.sessions.values()) == [third.target]
    assert len(node.unit_for(volume).nexuses) == 1 and second.peer.closed is not second_gives_up


def test_other_ports_of_one_initiator_have_sessions_of_their_own():
    node = recorded({0: MemoryVolume(SIZE)})
    pairs = [Coupling(node, settings(isid=isid)).login() for isid in (1, 2)]
    assert len(node.sessions) == 2 and not any(pair.peer.closed for pair in pairs)


def test_a_lost_connection_is_closed_for_the_directory_when_its_writes_have_ended():
    volume = MemoryVolume(SIZE)
    volume.hold_writes = True
    pair = coupled(volume)
    pair.initiator.submit_write(0, 0, bytes(512), Results())
    pair.run()
    pair.target.connection_lost()
    assert pair.node.directory.closed == []
    volume.release()
    assert pair.node.directory.closed == [pair.target]


def test_requests_under_way_end_with_the_connection():
    volume = MemoryVolume(SIZE)
    volume.hold_reads = True
    pair = coupled(volume)
    results = [Results() for _ in range(200)]
    for result in results:
        pair.initiator.submit_read(0, 0, 512, result)
    pair.run()
    pair.initiator.connection_lost()
    assert all(isinstance(result.got[0][1], ConnectionEnded) for result in results)


# --- Backpressure ---------------------------------------------------------------------------------


def test_a_client_that_does_not_drain_stops_the_reads_and_gets_everything_later():
    volume = MemoryVolume(32 << 20)
    volume.data[:] = os.urandom(1 << 20) * 32
    pair = coupled(volume)
    results = Results()
    pair.initiator.submit_read(0, 0, 32 << 20, results)
    original = pair.peer._send

    def pausing(buffers: list[Buffer]) -> None:
        original(buffers)
        pair.target.pause_writing()

    pair.target._sender._send = pausing
    pair.run()
    assert results.got == []
    for _ in range(64):
        pair.target.resume_writing()
        pair.run()
    assert results.data == volume.data


def test_nothing_is_carried_out_while_paused():
    pair = coupled(MemoryVolume(SIZE))
    pair.target.pause_writing()
    results = Results()
    pair.initiator.submit_read(0, 0, 512, results)
    pair.run()
    assert results.got == [] and not pair.peer.sent
    pair.target.resume_writing()
    pair.run()
    assert results.data == bytes(512)


def test_one_wake_up_brings_one_flush_and_one_settle():
    volume = MemoryVolume(SIZE)
    pair = coupled(volume)
    settles = []
    original = volume.settle

    def settle() -> None:
        settles.append(len(volume._batch))
        original()

    volume.settle = settle  # type: ignore[method-assign]
    pair.peer.flushes = 0
    results = [Results() for _ in range(32)]
    for index, result in enumerate(results):
        pair.initiator.submit_write(0, index * 4096, bytes([index]) * 4096, result)
    pair.run()
    assert settles == [32] and pair.peer.flushes == 1
    assert all(result.data == b"" for result in results)


def test_late_completions_wake_once():
    volume = MemoryVolume(SIZE)
    volume.hold_reads = True
    pair = coupled(volume)
    for index in range(8):
        pair.initiator.submit_read(0, index * 512, 512, Results())
    pair.run()
    volume.release()
    assert pair.peer.wakes == 1


def test_a_peer_that_logs_in_byte_by_byte():
    volume = MemoryVolume(SIZE)
    pair = coupled(volume, chunk=1)
    write(pair, 0, b"\x11" * 1024)
    assert read(pair, 512, 512) == b"\x11" * 512


def test_describe_counts():
    pair = coupled(MemoryVolume(SIZE))
    write(pair, 0, bytes(4096))
    read(pair, 0, 8192)
    described = pair.target.describe()
    assert (described["commands"], described["read_bytes"], described["write_bytes"]) == (
        2,
        8192,
        4096,
    )
    assert described["address"] == "127.0.0.1:50000" and described["portal"] == "127.0.0.1:3260"
    assert isinstance(Peer(pair.node).connection.describe()["state"], str)


def connections() -> int:
    return sum(isinstance(thing, TargetConnection) for thing in gc.get_objects())


@pytest.mark.parametrize("how", ["lost", "logout", "lost with a write under way", "reset"])
def test_a_session_that_has_ended_is_freed_without_a_garbage_collection(how):
    gc.collect()
    gc.disable()
    try:
        before = connections()
        volume = MemoryVolume(SIZE)
        gone, node = weakref.ref(volume), recorded({0: volume})
        pair = Coupling(node, settings()).login()
        node.unit_for(volume).nexuses[0].take_attention()
        for _ in range(3):
            write(pair, 0, bytes(4096))
        volume.hold_writes = "write" in how
        results = Results()
        pair.initiator.submit_write(0, 0, bytes(4096), results)
        if how == "logout":
            pair.initiator.logout(lambda _: None)
        elif how == "reset":
            pair.initiator.task_management(7, 0, lambda _: None)
        pair.run()
        assert (
            volume.hold_writes or len(results.got) == 1
        )  # also what came with the logout was answered
        pair.target.connection_lost()
        assert len(pair.target.get_buffer()) == 0
        volume.release()
        assert not node.units and not node.sessions
        node.directory.opened.clear()
        node.directory.closed.clear()
        del (
            pair.target,
            pair.peer.connection,
            pair.node,
            volume,
            node,
        )  # the coupling is a ring of its own
        assert gone() is None and connections() == before
    finally:
        gc.enable()
