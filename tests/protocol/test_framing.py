"""Bytes into PDUs and back: chunks of any size, digests, compaction, limits."""

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from protocol.iscsi.errors import HeaderDigestError, ProtocolError
from protocol.iscsi.framing import ReceiveBuffer, Sender
from protocol.iscsi.limits import PDU_OVERHEAD_BYTES
from protocol.iscsi.pdu import Pdu, pack
from protocol.volume import Buffer

DATA_MAX = 600
BUFFER_BYTES = 2 * (DATA_MAX + PDU_OVERHEAD_BYTES)


def received(
    stream: bytes, chunks: list[int], header_digest: bool, data_digest: bool
) -> list[tuple[bytes, bytes, bytes, bool]]:
    """All PDUs of ``stream`` when it comes in these chunks."""
    buffer = ReceiveBuffer(BUFFER_BYTES, DATA_MAX)
    buffer.header_digest, buffer.data_digest = header_digest, data_digest
    got, position, turn = [], 0, 0
    while position < len(stream):
        free = buffer.free()
        size = min(len(free), chunks[turn % len(chunks)], len(stream) - position)
        assert size, "no room for the PDU under way"
        free[:size] = stream[position : position + size]
        buffer.end += size
        position += size
        turn += 1
        while (pdu := buffer.next_pdu()) is not None:
            got.append((pdu.header, pdu.ahs, bytes(pdu.data), pdu.data_intact))
        buffer.compact()
    assert buffer.start == buffer.end == 0
    return got


segments = st.integers(0, 5).map(lambda n: bytes(range(4 * n)))
pdus = st.lists(st.tuples(st.integers(0, 63), segments, st.binary(max_size=DATA_MAX)), max_size=12)
sizes = st.lists(st.integers(1, BUFFER_BYTES), min_size=1, max_size=5)


@given(items=pdus, chunks=sizes, header_digest=st.booleans(), data_digest=st.booleans())
def test_any_chunks_give_the_pdus_that_were_sent(items, chunks, header_digest, data_digest):
    stream, expected = bytearray(), []
    for opcode, ahs, data in items:
        header = pack(opcode, 0, 1, length=len(ahs) // 4 << 24 | len(data))
        head = header + ahs
        stream += head + (crc32c(head).to_bytes(4, "little") if header_digest else b"")
        padded = data + bytes(-len(data) % 4)
        stream += padded + (crc32c(padded).to_bytes(4, "little") if data_digest and data else b"")
        expected.append((header, ahs, data, True))
    assert received(bytes(stream), chunks, header_digest, data_digest) == expected


@given(items=pdus, header_digest=st.booleans(), data_digest=st.booleans())
def test_what_a_sender_makes_a_receiver_understands(items, header_digest, data_digest):
    sent: list[Buffer] = []
    sender = Sender(sent.extend, lambda: None)
    sender.header_digest, sender.data_digest = header_digest, data_digest
    headers = [pack(opcode, 0, 1, length=len(data)) for opcode, _, data in items]
    for header, (_, _, data) in zip(headers, items, strict=True):
        sender.put(header, data)
    assert sender.pending_bytes == sum(len(data) for _, _, data in items)
    sender.flush()
    stream = b"".join(sent)
    got = received(stream, [BUFFER_BYTES], header_digest, data_digest)
    assert got == [
        (header, b"", data, True) for header, (_, _, data) in zip(headers, items, strict=True)
    ]
    assert sender.pending == [] and sender.pending_bytes == 0


def test_the_digest_of_rfc_7143():
    # Appendix A.4 of RFC 7143: 32 bytes of zeros give aa 36 91 8a on the wire.
    sent: list[Buffer] = []
    sender = Sender(sent.extend, lambda: None)
    sender.data_digest = True
    sender.put(pack(0, 0, 0, length=32), bytes(32))
    sender.flush()
    assert sent[-1] == bytes.fromhex("aa36918a")


def one(stream: bytes, **digests: bool) -> Pdu | None:
    buffer = ReceiveBuffer(BUFFER_BYTES, DATA_MAX)
    buffer.header_digest = digests.get("header", False)
    buffer.data_digest = digests.get("data", False)
    buffer.free()[: len(stream)] = stream
    buffer.end += len(stream)
    return buffer.next_pdu()


def test_a_wrong_header_digest_ends_the_connection():
    header = pack(0, 0, 1)
    with pytest.raises(HeaderDigestError):
        one(header + (crc32c(header) ^ 1).to_bytes(4, "little"), header=True)


def test_a_wrong_data_digest_is_told_to_whoever_handles_the_pdu():
    stream = pack(0, 0, 1, length=4) + b"data" + (crc32c(b"data") ^ 1).to_bytes(4, "little")
    pdu = one(stream, data=True)
    assert pdu is not None and not pdu.data_intact


def test_a_data_segment_above_the_declared_length_is_refused_before_it_has_come():
    with pytest.raises(ProtocolError):
        one(pack(0, 0, 1, length=DATA_MAX + 1))


def test_growing_keeps_what_was_not_handled():
    buffer = ReceiveBuffer(200, 100)
    stream = pack(1, 0, 1) + pack(2, 0, 2)[:20]
    buffer.free()[: len(stream)] = stream
    buffer.end += len(stream)
    assert buffer.next_pdu() is not None
    buffer.grow(1000, 500)
    buffer.free()[:28] = pack(2, 0, 2)[20:]
    buffer.end += 28
    pdu = buffer.next_pdu()
    assert pdu is not None and pdu.opcode == 2
