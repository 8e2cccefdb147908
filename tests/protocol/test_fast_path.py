"""The fast path and the general way give byte-identical answers, and the fast path is really taken by what it is for."""

import errno
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.iscsi import fast_path, pdu
from protocol.iscsi.full_feature import FullFeature
from protocol.iscsi.pdu import pack
from tests.protocol.coupling import Coupling, coupled, feed
from tests.protocol.memory_volume import MemoryVolume

SIZE = 1 << 20
SECTORS = SIZE // 512


@dataclass(frozen=True)
class Plain:
    """One READ or WRITE, and in what it differs from a plain one."""

    writes: bool
    wide: bool
    lba: int
    sectors: int
    flags: int = 1
    lun: int = 0
    cdb_flags: int = 0
    group: int = 0
    control: int = 0
    expected_more: int = 0
    immediate_less: int = 0
    immediate: bool = False
    cmd_sn_more: int = 0
    same_tag: bool = False
    tail: int = 0

    def encode(self, itt: int, cmd_sn: int) -> bytes:
        length = self.sectors * 512
        expected = max(0, length + self.expected_more)
        brought = max(0, min(length, expected) - self.immediate_less) if self.writes else 0
        direction = pdu.WRITE if self.writes else pdu.READ
        final = 0 if self.immediate_less and self.writes else pdu.FINAL
        opcode = (0x8A if self.writes else 0x88) if self.wide else (0x2A if self.writes else 0x28)
        if self.wide:
            cdb = bytes((opcode, self.cdb_flags)) + self.lba.to_bytes(8, "big") + self.sectors.to_bytes(4, "big")
            cdb += bytes((self.group, self.control))
        else:
            cdb = bytes((opcode, self.cdb_flags)) + self.lba.to_bytes(4, "big") + bytes((self.group,)) + self.sectors.to_bytes(2, "big")
            cdb += bytes((self.control,)) + bytes([self.tail]) * 6
        words = (expected, cmd_sn + self.cmd_sn_more, 0, 0, 0, 0, 0)
        head = pack(
            pdu.SCSI_COMMAND | (pdu.IMMEDIATE if self.immediate else 0), final | direction | self.flags, 1 if self.same_tag else itt,
            length=brought, lun=self.lun << 48, words=words,
        )
        return head[:32] + cdb + bytes([itt & 0xFF]) * brought + bytes(-brought % 4)


near_the_end = st.integers(SECTORS - 16, SECTORS + 4)
plain = st.builds(
    Plain, writes=st.booleans(), wide=st.booleans(), lba=st.one_of(st.integers(0, 64), near_the_end), sectors=st.integers(0, 20),
)
odd = st.builds(
    Plain, writes=st.booleans(), wide=st.booleans(), lba=st.one_of(st.integers(0, 64), near_the_end), sectors=st.integers(0, 140),
    flags=st.integers(0, 7), lun=st.sampled_from([0, 0, 0, 1, 0x4000, 0x100]), cdb_flags=st.sampled_from([0, 8, 16, 24, 32, 1, 255]),
    group=st.sampled_from([0, 1, 63, 64, 255]), control=st.sampled_from([0, 0, 4]), expected_more=st.sampled_from([0, 0, -512, 512, 100]),
    immediate_less=st.sampled_from([0, 0, 4, 512]), immediate=st.booleans(), cmd_sn_more=st.sampled_from([0, 0, 0, 500]),
    same_tag=st.booleans(), tail=st.sampled_from([0, 255]),
)


def carry_out(commands: list[Plain], fast: bool, chunk: int, hold: bool, failing: int | None) -> tuple[bytes, bytes, str | None]:
    """Feed all commands; return what was sent, the volume's content, and why the connection ended if it did."""
    volume = MemoryVolume(SIZE)
    pair = coupled(volume, data_segment_bytes=8192)
    phase = pair.target._phase
    assert phase is not None and phase.fast
    phase.fast = fast
    volume.hold_writes = hold
    volume.fail_writes = failing
    stream = bytearray()
    for itt, command in enumerate(commands, start=2):
        # A command that is out of its window or immediate takes no number, so the next one has the same.
        stream += command.encode(itt, taken_numbers(commands[: itt - 2]) + 1)
    for at in range(0, len(stream), chunk):
        if pair.peer.closed:
            break
        feed(pair.target, bytes(stream[at : at + chunk]))
    volume.release()
    pair.target.flush_output()
    return bytes(pair.peer.sent), bytes(volume.data), pair.target.failure


def taken_numbers(commands: list[Plain]) -> int:
    return sum(not (command.immediate or command.cmd_sn_more) for command in commands)


@given(
    commands=st.lists(st.one_of(plain, plain, odd), max_size=24), chunk=st.sampled_from([48, 1000, 65536]), hold=st.booleans(),
    failing=st.sampled_from([None, None, errno.ENOSPC]),
)
def test_both_ways_give_the_same_bytes(commands, chunk, hold, failing):
    assert carry_out(commands, True, chunk, hold, failing) == carry_out(commands, False, chunk, hold, failing)


def general_pdus(pair: Coupling, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the opcodes of PDUs that go the general way."""
    seen: list[int] = []
    handle = FullFeature.handle

    def recorded(self: FullFeature, request: pdu.Pdu) -> None:
        seen.append(request.opcode)
        handle(self, request)

    monkeypatch.setattr(FullFeature, "handle", recorded)
    return seen


@pytest.mark.parametrize(
    "command",
    [
        Plain(False, False, 8, 8), Plain(False, True, 8, 8), Plain(True, False, 8, 8), Plain(True, True, 8, 8, cdb_flags=8),
        Plain(False, False, 8, 8, flags=0), Plain(True, False, 8, 8, flags=0, cdb_flags=16), Plain(False, False, SECTORS - 1, 1, group=63),
        Plain(True, True, 0, 128),
    ],
)
def test_what_the_fast_path_is_for_never_goes_the_general_way(command, monkeypatch):
    pair = coupled(MemoryVolume(SIZE))
    seen = general_pdus(pair, monkeypatch)
    feed(pair.target, command.encode(9, 1))
    assert seen == [] and len(pair.peer.sent) >= 48
    described = pair.target.describe()
    assert (described["commands"], described["commands_in_flight"]) == (1, 0)


def test_a_pending_attention_is_not_overtaken(monkeypatch):
    pair = coupled(MemoryVolume(SIZE), clear_attention=False)
    seen = general_pdus(pair, monkeypatch)
    feed(pair.target, Plain(False, False, 0, 1).encode(9, 1) + Plain(False, False, 0, 1).encode(10, 2))
    assert seen == [pdu.SCSI_COMMAND]
    assert pair.peer.sent[3] == 0x02


def test_sessions_with_digests_go_the_general_way():
    pair = coupled(MemoryVolume(SIZE), header_digest=True)
    assert pair.target._phase is not None and not pair.target._phase.fast


def test_write_objects_are_used_again():
    pair = coupled(MemoryVolume(SIZE))
    for cmd_sn in range(1, 5):
        feed(pair.target, Plain(True, False, 0, 8).encode(cmd_sn, cmd_sn))
    phase = pair.target._phase
    assert phase is not None and len(phase.free_writes) == 1
    assert isinstance(phase.free_writes[0], fast_path.FastWrite)
