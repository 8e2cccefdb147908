"""Hostile bytes: whatever comes, ``buffer_updated`` raises nothing, memory stays bounded, and
chunking changes nothing.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.iscsi import limits, pdu
from protocol.iscsi.pdu import pack
from protocol.volume import Buffer, Completion
from tests.protocol.coupling import Peer, coupled, feed
from tests.protocol.directory import INITIATOR, TARGET, recorded
from tests.protocol.memory_volume import MemoryVolume

SIZE = 1 << 20

words = st.one_of(
    st.sampled_from([0, 1, 2, 0xFFFFFFFF, 0x7FFFFFFF, 512, 65536]), st.integers(0, 0xFFFFFFFF)
)
OPCODES = [
    0,
    3,
    8,
    10,
    18,
    21,
    26,
    27,
    37,
    40,
    42,
    47,
    53,
    65,
    66,
    85,
    90,
    136,
    137,
    138,
    143,
    145,
    147,
    158,
    160,
    163,
]
small = st.lists(st.sampled_from([0, 0, 0, 1, 8, 255]), min_size=14, max_size=14).map(bytes)
cdbs = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.tuples(st.sampled_from(OPCODES), st.binary(min_size=15, max_size=15)).map(
        lambda pair: bytes([pair[0]]) + pair[1]
    ),
    st.tuples(st.sampled_from(OPCODES), st.integers(0, 31), small).map(
        lambda three: bytes(three[:2]) + three[2]
    ),
)
data = st.binary(max_size=200)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """One PDU with a plausible frame and any content."""
    opcode = draw(st.one_of(st.sampled_from([0, 1, 1, 1, 2, 3, 4, 5, 6, 0x10]), st.integers(0, 63)))
    body = draw(data)
    ahs = bytes(draw(st.sampled_from([0, 0, 0, 4, 8])))
    head = pack(
        opcode | (pdu.IMMEDIATE if draw(st.booleans()) else 0),
        draw(st.integers(0, 255)),
        draw(st.sampled_from([1, 2, 3, 0xFFFFFFFF])),
        byte2=draw(st.integers(0, 255)),
        byte3=draw(st.sampled_from([0, 0, 1])),
        length=len(ahs) // 4 << 24 | len(body),
        lun=draw(st.sampled_from([0, 0, 1 << 48, 0xFFFF << 48])),
        words=(
            draw(words),
            draw(st.sampled_from([1, 1, 2, 3, 4, 5])),
            0,
            draw(words),
            draw(words),
            draw(words),
            draw(words),
        ),
    )
    if opcode == pdu.SCSI_COMMAND:
        head = head[:32] + draw(cdbs)
    return head + ahs + body + bytes(-len(body) % 4)


class PromptVolume(MemoryVolume):
    """Writes complete at once, not with the batch: the order of answers does not depend on what
    came in one wake-up.
    """

    def write(self, offset_bytes: int, data: Buffer, fua: bool, done: Completion) -> None:
        super().write(offset_bytes, data, fua, done)
        super().settle()


def outcome(stream: bytes, chunk: int, **changes: bool) -> tuple[bytes, bytes, bool]:
    volume = PromptVolume(SIZE)
    pair = coupled(volume, chunk, **changes)
    feed(pair.target, stream, chunk)
    return bytes(pair.peer.sent), bytes(volume.data), pair.peer.closed


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(stream=st.lists(requests(), max_size=8).map(b"".join), cut=st.integers(0, 100))
def test_any_requests_in_any_chunks(stream, cut):
    stream = stream[: max(0, len(stream) - cut)]
    whole = outcome(stream, 1 << 30)
    assert outcome(stream, 13) == whole


@given(stream=st.binary(max_size=400))
def test_any_bytes_after_the_login(stream):
    assert outcome(stream, 1 << 30) == outcome(stream, 1)


@given(stream=st.one_of(st.binary(max_size=400), st.lists(requests(), max_size=4).map(b"".join)))
def test_any_bytes_before_the_login(stream):
    for chunk in (1 << 30, 7):
        peer = Peer(recorded({0: MemoryVolume(SIZE)}))
        feed(peer.connection, stream, chunk)
        peer.connection.connection_lost()


NAMES = [
    "InitiatorName",
    "TargetName",
    "SessionType",
    "AuthMethod",
    "CHAP_A",
    "CHAP_N",
    "CHAP_R",
    "CHAP_I",
    "CHAP_C",
    "HeaderDigest",
    "MaxBurstLength",
    "InitialR2T",
    "X",
    "SendTargets",
]
VALUES = [
    INITIATOR,
    TARGET,
    "Normal",
    "Discovery",
    "None",
    "CHAP",
    "5",
    "0x12",
    "0bAA==",
    "Yes",
    "",
]
values = st.one_of(st.sampled_from(VALUES), st.text(max_size=20))
texts = st.lists(st.tuples(st.sampled_from(NAMES), values), max_size=8).map(
    lambda pairs: "".join(f"{key}={value}\0" for key, value in pairs).encode(
        "utf-8", "surrogatepass"
    )
)


@given(bodies=st.lists(st.tuples(texts, st.integers(0, 255)), max_size=5))
def test_any_login_text(bodies):
    peer = Peer(recorded({0: MemoryVolume(SIZE)}))
    for body, flags in bodies:
        head = pack(
            pdu.LOGIN_REQUEST | pdu.IMMEDIATE,
            flags,
            0,
            length=len(body),
            lun=1 << 16,
            words=(0, 1, 0, 0, 0, 0, 0),
        )
        feed(peer.connection, head + body + bytes(-len(body) % 4))
    assert len(peer.sent) < 100_000


@pytest.mark.parametrize("length", [limits.RECEIVE_DATA_SEGMENT_BYTES + 1, 0xFFFFFF])
def test_an_oversized_pdu_ends_the_connection_at_its_header(length):
    pair = coupled(MemoryVolume(SIZE))
    feed(pair.target, pack(pdu.NOP_OUT | pdu.IMMEDIATE, 0x80, 1, length=length))
    assert pair.peer.closed


def test_bytes_after_the_end_are_swallowed():
    pair = coupled(MemoryVolume(SIZE))
    feed(pair.target, pack(pdu.LOGIN_REQUEST | pdu.IMMEDIATE, 0, 9))
    assert pair.peer.closed
    feed(pair.target, bytes(2 << 20))
    assert not pair.peer.sent


def test_immediate_commands_are_bounded():
    volume = MemoryVolume(SIZE)
    volume.hold_reads = True
    pair = coupled(volume)
    cdb = bytes((0x28, 0, 0, 0, 0, 0, 0, 0, 1)).ljust(16, b"\0")
    for itt in range(2 * limits.IMMEDIATE_COMMANDS_MAX):
        feed(
            pair.target,
            pack(pdu.SCSI_COMMAND | pdu.IMMEDIATE, 0xC1, itt, words=(512, 1, 0, 0, 0, 0, 0))[:32]
            + cdb,
        )
    assert pair.target.describe()["commands_in_flight"] == limits.IMMEDIATE_COMMANDS_MAX
    rejects = [pair.peer.sent[at + 2] for at in range(0, len(pair.peer.sent), 96)]
    assert rejects == [pdu.REJECT_IMMEDIATE] * limits.IMMEDIATE_COMMANDS_MAX


def test_a_flood_of_pings_is_answered_and_forgotten():
    pair = coupled(MemoryVolume(SIZE))
    ping = (
        pack(pdu.NOP_OUT | pdu.IMMEDIATE, 0x80, 5, length=4, words=(0xFFFFFFFF, 1, 0, 0, 0, 0, 0))
        + b"ping"
    )
    feed(pair.target, ping * 1000)
    assert len(pair.peer.sent) == 1000 * 52
