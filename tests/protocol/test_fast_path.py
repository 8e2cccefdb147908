"""The fast path and the general way give byte-identical answers, and the fast path is really taken
by what it is for.
"""

import errno
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.iscsi import fast_path, pdu
from protocol.iscsi.full_feature import FullFeaturePhase
from protocol.iscsi.pdu import pack
from protocol.volume import Buffer, Completion
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
    less_is_final: bool = False
    stray_data: int = 0

    def encode(self, itt: int, cmd_sn: int) -> bytes:
        length = self.sectors * 512
        expected = max(0, length + self.expected_more)
        brought = max(0, min(length, expected) - self.immediate_less) if self.writes else 0
        direction = pdu.WRITE if self.writes else pdu.READ
        brought = brought if self.writes else self.stray_data
        final = 0 if self.immediate_less and self.writes and not self.less_is_final else pdu.FINAL
        opcode = (0x8A if self.writes else 0x88) if self.wide else (0x2A if self.writes else 0x28)
        if self.wide:
            cdb = (
                bytes((opcode, self.cdb_flags))
                + self.lba.to_bytes(8, "big")
                + self.sectors.to_bytes(4, "big")
            )
            cdb += bytes((self.group, self.control))
        else:
            cdb = (
                bytes((opcode, self.cdb_flags))
                + self.lba.to_bytes(4, "big")
                + bytes((self.group,))
                + self.sectors.to_bytes(2, "big")
            )
            cdb += bytes((self.control,)) + bytes([self.tail]) * 6
        words = (expected, cmd_sn + self.cmd_sn_more, 0, 0, 0, 0, 0)
        head = pack(
            pdu.SCSI_COMMAND | (pdu.IMMEDIATE if self.immediate else 0),
            final | direction | self.flags,
            1 if self.same_tag else itt,
            length=brought,
            lun=self.lun << 48,
            words=words,
        )
        return head[:32] + cdb + bytes([itt & 0xFF]) * brought + bytes(-brought % 4)


near_the_end = st.integers(SECTORS - 16, SECTORS + 4)
plain = st.builds(
    Plain,
    writes=st.booleans(),
    wide=st.booleans(),
    lba=st.one_of(st.integers(0, 64), near_the_end),
    sectors=st.integers(0, 20),
)
ODDITIES: dict[str, list[int | bool]] = {
    "sectors": [0, 1, 16, 17, 127, 128, 129, 140],
    "flags": [0, 2, 3, 4, 5, 7],
    "lba": [SECTORS - 7, SECTORS - 8, SECTORS, SECTORS + 1],
    "lun": [1, 0x4000, 0x100],
    "cdb_flags": [1, 2, 4, 8, 16, 24, 32, 64, 128, 255],
    "group": [1, 63, 64, 128, 255],
    "control": [1, 4, 128],
    "expected_more": [-512, 512, 100],
    "immediate_less": [4, 512],
    "less_is_final": [True],
    "stray_data": [512],
    "immediate": [True],
    "cmd_sn_more": [500, -1],
    "same_tag": [True],
    "tail": [255],
}


@st.composite
def odd(draw: st.DrawFn) -> Plain:
    """A plain command with one or two things about it that are not plain: each check of the fast
    path stands alone often enough.
    """
    names = draw(st.lists(st.sampled_from(sorted(ODDITIES)), min_size=1, max_size=2, unique=True))
    return replace(draw(plain), **{name: draw(st.sampled_from(ODDITIES[name])) for name in names})  # type: ignore[arg-type]


class RecordingVolume(MemoryVolume):
    """Remembers which writes were to be durable."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.durable: list[int] = []

    def write(self, offset_bytes: int, data: Buffer, fua: bool, done: Completion) -> None:
        if fua:
            self.durable.append(offset_bytes)
        super().write(offset_bytes, data, fua, done)


Outcome = tuple[bytes, bytes, list[int], str | None, list[int]]


def carry_out(
    commands: list[Plain], fast: bool, chunk: int, hold: bool, failing: int | None
) -> Outcome:
    """Feed all commands; return what was sent, the volume's content and durable writes, why the
    connection ended if it did, and what the fast path advances inline: sequence numbers, counters.
    """
    volume = RecordingVolume()
    pair = coupled(volume, data_segment_bytes=8192)
    phase = pair.target._phase
    assert phase is not None and phase.fast is not None
    if not fast:
        phase.fast = None
    volume.hold_writes = hold
    volume.fail_writes = failing
    stream = bytearray()
    for itt, command in enumerate(commands, start=2):
        # A command that is out of its window or immediate takes no number, so the next one has the
        # same.
        stream += command.encode(itt, taken_numbers(commands[: itt - 2]) + 1)
    for at in range(0, len(stream), chunk):
        if pair.peer.closed:
            break
        feed(pair.target, bytes(stream[at : at + chunk]))
    volume.release()
    pair.target.flush_output()
    session = phase.session
    numbers = [
        session.stat_sn,
        session.exp_cmd_sn,
        session.max_cmd_sn,
        session.commands,
        session.read_bytes,
        session.write_bytes,
        len(session.tasks),
    ]
    return bytes(pair.peer.sent), bytes(volume.data), volume.durable, pair.target.failure, numbers


def taken_numbers(commands: list[Plain]) -> int:
    return sum(not (command.immediate or command.cmd_sn_more) for command in commands)


@given(
    commands=st.lists(st.one_of(plain, odd()), max_size=24),
    chunk=st.sampled_from([48, 1000, 65536]),
    hold=st.booleans(),
    failing=st.sampled_from([None, None, errno.ENOSPC]),
)
def test_both_ways_give_the_same_bytes(commands, chunk, hold, failing):
    assert carry_out(commands, True, chunk, hold, failing) == carry_out(
        commands, False, chunk, hold, failing
    )


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ODDITIES.items() for value in values]
)
def test_each_thing_that_is_not_plain_is_left_to_the_general_way(name, value, writes, wide, hold):
    command = replace(Plain(writes, wide, 8, 8), **{name: value})
    if name == "less_is_final":
        command = replace(command, immediate_less=512)
    commands = [
        Plain(True, False, 64, 8, same_tag=True),
        command,
        *[Plain(False, False, 8, 8)] * 12,
    ]
    assert carry_out(commands, True, 65536, hold, None) == carry_out(
        commands, False, 65536, hold, None
    )


def general_pdus(pair: Coupling, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the opcodes of PDUs that go the general way."""
    seen: list[int] = []
    handle = FullFeaturePhase.handle

    def recorded(self: FullFeaturePhase, request: pdu.Pdu) -> None:
        seen.append(request.opcode)
        handle(self, request)

    monkeypatch.setattr(FullFeaturePhase, "handle", recorded)
    return seen


@pytest.mark.parametrize(
    "command",
    [
        Plain(False, False, 8, 8),
        Plain(False, True, 8, 8),
        Plain(True, False, 8, 8),
        Plain(True, True, 8, 8, cdb_flags=8),
        Plain(False, False, 8, 8, flags=0),
        Plain(True, False, 8, 8, flags=0, cdb_flags=16),
        Plain(False, False, SECTORS - 1, 1, group=63),
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
    feed(
        pair.target,
        Plain(False, False, 0, 1).encode(9, 1) + Plain(False, False, 0, 1).encode(10, 2),
    )
    assert seen == [pdu.SCSI_COMMAND]
    assert pair.peer.sent[3] == 0x02


def test_sessions_with_digests_go_the_general_way():
    pair = coupled(MemoryVolume(SIZE), header_digest=True)
    assert pair.target._phase is not None and pair.target._phase.fast is None


def test_write_objects_are_used_again():
    pair = coupled(MemoryVolume(SIZE))
    for cmd_sn in range(1, 5):
        feed(pair.target, Plain(True, False, 0, 8).encode(cmd_sn, cmd_sn))
    phase = pair.target._phase
    assert phase is not None and phase.fast is not None
    (write,) = phase.fast.free_writes
    assert isinstance(write, fast_path.FastWrite)
