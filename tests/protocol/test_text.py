"""Text requests in the full feature phase: lists of targets, how long ones come, and what may be
negotiated.
"""

from collections import deque

from protocol.iscsi import limits, pdu
from protocol.iscsi.pdu import FINAL, IMMEDIATE, RESERVED_TAG, pack
from protocol.turns import Step
from tests.protocol.coupling import Coupling, coupled, feed, settings
from tests.protocol.directory import TARGET, MemoryDirectory, RecordedNode, recorded
from tests.protocol.exchanges import answer_to, command_pdu, read
from tests.protocol.memory_volume import MemoryVolume

SIZE = 1 << 20


def text_request(body: bytes, ttt: int = RESERVED_TAG) -> bytes:
    head = pack(
        pdu.TEXT_REQUEST | IMMEDIATE, FINAL, 1, length=len(body), words=(ttt, 1, 0, 0, 0, 0, 0)
    )
    return head + body + bytes(-len(body) % 4)


def text_answer(pair: Coupling, body: bytes) -> bytes:
    return bytes(answer_to(pair, text_request(body)).data)


def test_a_long_list_of_targets_comes_in_pieces():
    directory = MemoryDirectory({0: MemoryVolume(SIZE)})
    directory.targets.update({f"{TARGET}-{number:05}": {} for number in range(5000)})
    pair = Coupling(
        RecordedNode(directory), settings(target_name="", data_segment_bytes=8192)
    ).login()
    found: list[list[tuple[str, str]]] = []
    pair.initiator.send_targets(found.append)
    pair.run()
    assert [value for key, value in found[0] if key == "TargetName"] == sorted(directory.targets)


def test_a_list_has_no_greatest_length_and_each_piece_a_turn():
    node = recorded({})
    node.directory.targets.update({f"{TARGET}-{number:05}": {} for number in range(30_000)})
    steps: deque[Step] = deque()
    node.turns.call_soon = steps.append
    pair = Coupling(node, settings(target_name="")).login()
    found, ttt = b"", RESERVED_TAG
    while True:
        feed(pair.target, text_request(b"" if found else b"SendTargets=All\0", ttt))
        assert not pair.peer.sent
        assert (
            answer_to(pair, text_request(b"SendTargets=All\0")).opcode == pdu.REJECT
        )  # one request at a time
        (step,) = steps
        steps.clear()
        step()
        pair.target.flush_output()
        answer = answer_to(pair, b"")
        assert len(answer.data) <= limits.TEXT_PIECE_BYTES
        found += answer.data
        ttt = answer.ttt
        if answer.flags & FINAL:
            break
    names = [name.decode() for name in found.split(b"\0") if name.startswith(b"TargetName=")]
    assert names == [f"TargetName={name}" for name in sorted(node.directory.targets)]
    assert len(found) > 4 * limits.TEXT_PIECE_BYTES


def test_a_shorter_data_segment_that_is_declared_later_counts_for_all_reads():
    pair = coupled(MemoryVolume(SIZE))
    assert text_answer(pair, b"MaxRecvDataSegmentLength=4096\0") == b""
    feed(pair.target, command_pdu(FINAL | pdu.READ, 7, 0x28, expected=8192))
    assert int.from_bytes(pair.peer.take()[5:8], "big") == 4096


def test_text_of_a_normal_session():
    pair = coupled(MemoryVolume(SIZE))
    own = f"TargetName={TARGET}\0TargetAddress=127.0.0.1:3260,1\0".encode()
    assert text_answer(pair, b"SendTargets=\0") == own
    assert text_answer(pair, b"SendTargets=" + TARGET.encode() + b"\0") == own
    assert text_answer(pair, b"SendTargets=All\0") == b"SendTargets=Reject\0"
    assert text_answer(pair, b"SendTargets=iqn.other\0") == b""
    assert (
        text_answer(pair, b"MaxBurstLength=512\0X-unknown=1\0")
        == b"MaxBurstLength=Reject\0X-unknown=NotUnderstood\0"
    )
    assert text_answer(pair, b"MaxRecvDataSegmentLength=1024\0") == b""
    assert read(pair, 0, 8192) == bytes(8192)
