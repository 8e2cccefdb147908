"""Every opcode in every state of a connection: what is answered or closed, the same in any pieces,
and other sessions notice nothing.
"""

from collections.abc import Callable

import pytest

from protocol.iscsi import pdu
from protocol.iscsi.chap import ChapSecrets
from protocol.iscsi.pdu import FINAL, RESERVED_TAG, pack
from tests.protocol.coupling import Coupling, Peer, feed, settings
from tests.protocol.directory import INITIATOR, TARGET, RecordedNode, recorded
from tests.protocol.exchanges import command_pdu
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.test_login import NAMES, request
from tests.protocol.test_sequence_numbers import pdus

SECRETS = ChapSecrets("user", b"secret-of-12+")
HELLO = [*NAMES, ("AuthMethod", "CHAP,None")]
DISCOVERY = [("InitiatorName", INITIATOR), ("SessionType", "Discovery")]
TASK_TAG = 0x77
REQUESTS = {0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x10}
# What answers a request in the full feature phase of a session with a disk; () where it is
# swallowed; None where the connection ends.
FULL_FEATURE: dict[int, tuple[int, ...] | None] = {
    pdu.NOP_OUT: (pdu.NOP_IN,),
    pdu.SCSI_COMMAND: (pdu.SCSI_RESPONSE,),
    pdu.TASK_MANAGEMENT_REQUEST: (pdu.TASK_MANAGEMENT_RESPONSE,),
    pdu.LOGIN_REQUEST: None,
    pdu.TEXT_REQUEST: (pdu.TEXT_RESPONSE,),
    pdu.DATA_OUT: (),
    pdu.LOGOUT_REQUEST: (pdu.LOGOUT_RESPONSE,),
    pdu.SNACK_REQUEST: (pdu.REJECT,),
}

State = Callable[[RecordedNode], Peer]


def connected(node: RecordedNode, *requests: bytes) -> Peer:
    peer = Peer(node)
    for each in requests:
        feed(peer.connection, each)
    assert not peer.closed
    peer.take()
    return peer


def untouched(node: RecordedNode) -> Peer:
    return connected(node)


def security_begun(node: RecordedNode) -> Peer:
    node.directory.chap = None
    return connected(node, request(HELLO, pdu.SECURITY_STAGE, None))


def challenged(node: RecordedNode) -> Peer:
    node.directory.chap = SECRETS
    return connected(
        node,
        request(HELLO, pdu.SECURITY_STAGE, None),
        request([("CHAP_A", "7,5")], pdu.SECURITY_STAGE, None),
    )


def operational(node: RecordedNode) -> Peer:
    return connected(node, request(NAMES, pdu.OPERATIONAL_STAGE, None))


def text_continued(node: RecordedNode) -> Peer:
    return connected(node, request(b"Initiat", pdu.OPERATIONAL_STAGE, None, flags=pdu.CONTINUE))


def full_feature(node: RecordedNode) -> Peer:
    return connected(node, request(NAMES))


def ready(node: RecordedNode, *pairs: tuple[str, str]) -> tuple[Peer, MemoryVolume]:
    """A session that has been told that it is new."""
    peer = connected(node, request([*NAMES, *pairs]))
    volume = disk(node)
    while node.unit_for(volume).nexuses[-1].take_attention():
        pass
    return peer, volume


def disk(node: RecordedNode) -> MemoryVolume:
    volume = node.directory.targets[TARGET][0]
    assert isinstance(volume, MemoryVolume)
    return volume


def collecting(node: RecordedNode) -> Peer:
    """A write waits for its data."""
    peer, _ = ready(node, ("InitialR2T", "Yes"))
    feed(peer.connection, command_pdu(0xA1, TASK_TAG, 0x2A, cmd_sn=5))
    assert [answer.opcode for answer in pdus(peer.take())] == [pdu.R2T]
    return peer


def busy(node: RecordedNode) -> Peer:
    """A read is at the volume."""
    peer, volume = ready(node)
    volume.hold_reads = True
    feed(peer.connection, command_pdu(0xC1, TASK_TAG, 0x28, cmd_sn=5))
    assert peer.connection.describe()["commands_in_flight"] == 1
    return peer


def discovery(node: RecordedNode) -> Peer:
    return connected(node, request(DISCOVERY))


def logout_asked(node: RecordedNode) -> Peer:
    peer = full_feature(node)
    peer.connection.shutdown(5)
    peer.take()
    return peer


BEFORE_LOGIN = (untouched, security_begun, challenged, operational, text_continued)
AFTER_LOGIN = (full_feature, collecting, busy, logout_asked)
STATES = (*BEFORE_LOGIN, *AFTER_LOGIN, discovery)


def build(first: int, cmd_sn: int) -> bytes:
    """A PDU that is right as far as one can be without knowing the state: an own task tag, the next
    CmdSN, TEST UNIT READY.
    """
    words = (
        RESERVED_TAG if first & 0x3F != pdu.TASK_MANAGEMENT_REQUEST else 0,
        cmd_sn,
        0,
        0,
        0,
        0,
        0,
    )
    if first & 0x3F == pdu.SCSI_COMMAND:
        words = (0, cmd_sn, 0, 0, 0, 0, 0)
    flags = FINAL | (5 if first & 0x3F == pdu.TASK_MANAGEMENT_REQUEST else 0)
    return pack(first, flags, 0x99, words=words)


def sent_in(state: State, first: int, chunk: int) -> tuple[bytes, bool]:
    """What an opcode brings in a state, with another session beside it that goes on as if nothing
    were.
    """
    node = recorded({0: MemoryVolume(1 << 20)})
    other = Coupling(node, settings(isid=0x42)).login()
    peer = state(node)
    phase = peer.connection._phase
    feed(peer.connection, build(first, 5 if phase is None else phase.session.exp_cmd_sn), chunk)
    disk(node).hold_reads = False
    disk(node).release()
    peer.connection.flush_output()
    outcome = bytes(peer.take()), peer.closed
    other.command(bytes((0x12, 0, 0, 0, 96, 0)), read_bytes=96)
    peer.connection.connection_lost()
    assert not peer.connection.describe()["commands_in_flight"]
    assert peer.connection not in [
        session for session in node.directory.opened if session not in node.directory.closed
    ]
    return outcome


@pytest.mark.parametrize("immediate", [0, pdu.IMMEDIATE], ids=["ordered", "immediate"])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_every_opcode(state: State, immediate: int) -> None:
    for opcode in range(64):
        outcome = sent_in(state, opcode | immediate, 1 << 30)
        assert sent_in(state, opcode | immediate, 1) == outcome, f"{opcode:02X}h byte by byte"
        sent, closed = outcome
        got = tuple(answer.opcode for answer in pdus(sent) if answer.itt != TASK_TAG)
        if state in BEFORE_LOGIN:
            # A login request that is immediate may go on or be refused; anything else ends the
            # connection without a word.
            wanted = (pdu.LOGIN_RESPONSE,) if opcode == pdu.LOGIN_REQUEST and immediate else ()
            assert got == wanted and (closed or wanted), f"{opcode:02X}h: {got}"
        elif opcode not in REQUESTS:
            assert (got, closed) == ((pdu.REJECT,), False), f"{opcode:02X}h: {got}"
        elif state is discovery:
            ends = opcode in {pdu.SCSI_COMMAND, pdu.LOGIN_REQUEST, pdu.LOGOUT_REQUEST}
            assert closed == ends, f"{opcode:02X}h: {got}"
        else:
            expected = FULL_FEATURE[opcode]
            assert got == (expected or ()) and closed == (
                expected is None or opcode == pdu.LOGOUT_REQUEST
            ), f"{opcode:02X}h: {got}"
