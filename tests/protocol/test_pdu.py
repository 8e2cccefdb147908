"""Headers, LUNs, serial numbers, sense data: the small encodings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.iscsi import pdu
from protocol.iscsi.pdu import HEADER, Pdu, pack, serial_after
from protocol.scsi.lun import NO_LUN, decode_lun, encode_lun
from protocol.scsi.sense import Sense, invalid_field_in_cdb, invalid_field_in_parameter_list

words = st.integers(0, 0xFFFFFFFF)


@given(
    opcode=st.integers(0, 0x3F),
    immediate=st.booleans(),
    flags=st.integers(0, 255),
    byte2=st.integers(0, 255),
    byte3=st.integers(0, 255),
    lun=st.integers(0, 2**64 - 1),
    itt=words,
    seven=st.tuples(*[words] * 7),
)
def test_a_header_comes_back_as_it_was_packed(
    opcode, immediate, flags, byte2, byte3, lun, itt, seven
):
    header = pack(
        opcode | (pdu.IMMEDIATE if immediate else 0),
        flags,
        itt,
        byte2=byte2,
        byte3=byte3,
        lun=lun,
        words=seven,
    )
    got = Pdu(header, b"", memoryview(b""))
    assert (got.opcode, got.immediate, got.flags, got.byte2, got.byte3) == (
        opcode,
        immediate,
        flags,
        byte2,
        byte3,
    )
    assert (got.lun, got.itt) == (lun, itt)
    assert (
        got.ttt,
        got.cmd_sn,
        got.exp_stat_sn,
        got.max_cmd_sn,
        got.data_sn,
        got.buffer_offset,
        got.residual,
    ) == seven
    assert (
        got.expected_length == seven[0] and got.stat_sn == seven[1] and got.exp_cmd_sn == seven[2]
    )
    assert got.header == header and len(header) == 48


def test_the_cdb_is_the_last_16_bytes_and_what_an_extended_cdb_segment_adds():
    cdb = bytes(range(16))
    header = HEADER.pack(1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)[:32] + cdb
    assert Pdu(header, b"", memoryview(b"")).cdb == cdb
    extension = bytes((0, 9, 0x01, 0)) + bytes(
        range(100, 108)
    )  # AHSLength counts from the fourth byte on (RFC 7143 11.2.2.1)
    assert Pdu(header, extension, memoryview(b"")).cdb == cdb + bytes(range(100, 108))


@given(st.integers(0, 0x3FFF))
def test_every_lun_that_is_encoded_is_decoded(lun):
    assert decode_lun(encode_lun(lun)) == lun


@pytest.mark.parametrize("raw", [1, 1 << 47, 0x0100 << 48, 0x8000 << 48, 0xC000 << 48])
def test_luns_that_are_not_single_level_name_nothing(raw):
    assert decode_lun(raw) == NO_LUN


@pytest.mark.parametrize(
    ("left", "right", "after"),
    [
        (1, 0, True),
        (0, 1, False),
        (5, 5, False),
        (0, 0xFFFFFFFF, True),
        (0xFFFFFFFF, 0, False),
        (0x7FFFFFFF, 0, True),
        (0x80000000, 0, False),
    ],
)
def test_serial_numbers_wrap(left, right, after):
    assert serial_after(left, right) is after


def test_fixed_sense():
    assert Sense(5, 0x24, 0).fixed() == bytes.fromhex(
        "70 00 05 00000000 0a 00000000 24 00 00 000000"
    )
    assert Sense(14, 0x1D, 0, information=0x1234).fixed() == bytes.fromhex(
        "f0 00 0e 00001234 0a 00000000 1d 00 00 000000"
    )


def test_descriptor_sense():
    assert Sense(5, 0x24, 0).descriptor() == bytes.fromhex("72 05 24 00 000000 00")
    got = Sense(14, 0x1D, 0, information=1 << 40).descriptor()
    assert got == bytes.fromhex("72 0e 1d 00 000000 0c 00 0a 80 00 0000010000000000")
    assert invalid_field_in_cdb(2, 7).descriptor() == bytes.fromhex(
        "72 05 24 00 000000 08 02 06 0000 cf0002 00"
    )


def test_information_beyond_32_bits_is_left_out_of_fixed_sense():
    assert Sense(3, 0x11, 0, information=1 << 32).fixed()[0] == 0x70


def test_field_pointers():
    assert invalid_field_in_cdb(10).key_specific == bytes.fromhex("c0000a")
    assert invalid_field_in_parameter_list(300, 2).key_specific == bytes.fromhex("8a012c")
