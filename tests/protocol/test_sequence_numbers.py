"""The numbers that the target gives its PDUs, which our initiator does not look at: StatSN, DataSN,
R2TSN, ExpDataSN, offsets, flags.
"""

import os
from collections.abc import Iterator

import pytest

from protocol.iscsi import pdu
from protocol.iscsi.pdu import FINAL, STATUS_PRESENT, Pdu, pack
from tests.protocol.coupling import Coupling, coupled, feed
from tests.protocol.exchanges import command_pdu
from tests.protocol.memory_volume import MemoryVolume

SECTOR = 512
SEGMENT, BURST = 1024, 2560
READ_FLAGS, WRITE_FLAGS = 0xC1, 0xA1
READ_10, WRITE_10 = 0x28, 0x2A


def pdus(data: bytes) -> Iterator[Pdu]:
    """What was sent, PDU by PDU."""
    while data:
        size = int.from_bytes(data[5:8], "big")
        yield Pdu(data[:48], b"", memoryview(data)[48 : 48 + size])
        data = data[48 + size + -size % 4 :]


@pytest.fixture
def pair() -> Coupling:
    pair = coupled(
        MemoryVolume(1 << 20),
        data_segment_bytes=SEGMENT,
        max_burst_bytes=BURST,
        first_burst_bytes=512,
        initial_r2t=True,
    )
    pair.peer.take()
    return pair


def answers(pair: Coupling, request: bytes) -> list[Pdu]:
    feed(pair.target, request)
    return list(pdus(pair.peer.take()))


def write_size(sectors: int) -> int:
    return sectors * SECTOR


@pytest.mark.parametrize("sectors", [1, 2, 3, 5, 6, 11, 64])
@pytest.mark.parametrize("held", [False, True])
def test_data_in_is_numbered_without_gaps_and_the_last_one_carries_the_status(pair, sectors, held):
    volume, size = pair.node.directory.targets["iqn.2026-01.io.cleaved:disk"][0], sectors * SECTOR
    volume.data[:size] = os.urandom(size)
    stat_sn, volume.hold_reads = pair.target._phase.session.stat_sn, held
    feed(pair.target, command_pdu(READ_FLAGS, 9, READ_10, expected=size))
    volume.release()
    pair.target.flush_output()
    got = list(pdus(pair.peer.take()))
    assert {answer.opcode for answer in got} == {pdu.DATA_IN} and {
        answer.itt for answer in got
    } == {9}
    assert [answer.word36 for answer in got] == list(range(len(got)))  # DataSN
    offset, burst = 0, BURST
    for answer in got:
        assert answer.word40 == offset and len(answer.data) <= min(SEGMENT, burst)
        offset, burst = offset + len(answer.data), burst - len(answer.data)
        last = offset == size
        assert (
            bool(answer.flags & FINAL) == (last or burst == 0)
            and bool(answer.flags & STATUS_PRESENT) == last
        )
        burst = burst or BURST
    assert offset == size and b"".join(bytes(answer.data) for answer in got) == volume.data[:size]
    assert got[-1].word24 == stat_sn and {answer.word24 for answer in got[:-1]} <= {0}
    assert pair.target._phase.session.stat_sn == stat_sn + 1


@pytest.mark.parametrize("sectors", [1, 5, 6, 11, 64])
def test_r2ts_are_numbered_and_the_response_counts_them(pair, sectors):
    size, stat_sn = sectors * SECTOR, pair.target._phase.session.stat_sn
    data = os.urandom(size)
    got = answers(pair, command_pdu(WRITE_FLAGS, 9, WRITE_10, expected=size))
    offset, count, tags = 0, 0, set()
    while offset < size:
        (r2t,) = got
        wanted = min(BURST, size - offset)
        assert (r2t.opcode, r2t.itt, r2t.flags) == (pdu.R2T, 9, FINAL)
        assert (r2t.word36, r2t.word40, r2t.word44) == (
            count,
            offset,
            wanted,
        )  # R2TSN, offset, length
        assert (
            r2t.word24 == stat_sn and r2t.ttt != pdu.RESERVED_TAG
        )  # the next StatSN, which it does not take
        tags.add(r2t.ttt)
        for data_sn, at in enumerate(range(offset, offset + wanted, SEGMENT)):
            piece = data[at : min(at + SEGMENT, offset + wanted)]
            flags = FINAL if at + len(piece) == offset + wanted else 0
            head = pack(
                pdu.DATA_OUT, flags, 9, length=len(piece), words=(r2t.ttt, 0, 0, 0, data_sn, at, 0)
            )
            got = answers(pair, head + piece)
        offset, count = offset + wanted, count + 1
    (response,) = got
    assert (response.opcode, response.byte3, response.word24) == (pdu.SCSI_RESPONSE, 0, stat_sn)
    assert response.word36 == count  # ExpDataSN: the number of R2Ts
    assert len(tags) == count
    assert pair.node.directory.targets["iqn.2026-01.io.cleaved:disk"][0].data[:size] == data


def test_responses_take_status_numbers_one_after_the_other(pair):
    first = pair.target._phase.session.stat_sn
    ping = pack(pdu.NOP_OUT | pdu.IMMEDIATE, 0x80, 5, words=(pdu.RESERVED_TAG, 1, 0, 0, 0, 0, 0))
    unready = pack(pdu.SCSI_COMMAND | pdu.IMMEDIATE, 0x81, 6, words=(0, 1, 0, 0, 0, 0, 0))
    strange = pack(0x3E | pdu.IMMEDIATE, 0x80, 7)
    got = [
        answer for request in (ping, unready, strange, ping) for answer in answers(pair, request)
    ]
    assert [answer.opcode for answer in got] == [
        pdu.NOP_IN,
        pdu.SCSI_RESPONSE,
        pdu.REJECT,
        pdu.NOP_IN,
    ]
    assert [answer.word24 for answer in got] == [first, first + 1, first + 2, first + 3]


def test_the_window_follows_what_is_under_way(pair):
    volume = pair.node.directory.targets["iqn.2026-01.io.cleaved:disk"][0]
    volume.hold_reads = True
    before = pair.target._phase.session.max_cmd_sn
    for number in range(1, 4):
        assert answers(pair, command_pdu(READ_FLAGS, number, READ_10, cmd_sn=number)) == []
    ping = pack(pdu.NOP_OUT | pdu.IMMEDIATE, 0x80, 5, words=(pdu.RESERVED_TAG, 4, 0, 0, 0, 0, 0))
    (answer,) = answers(pair, ping)
    assert (answer.word28, answer.word32) == (4, before)
    volume.release()
    pair.target.flush_output()
    ended = list(pdus(pair.peer.take()))
    assert [answer.word32 for answer in ended] == [before + 1, before + 2, before + 3]
