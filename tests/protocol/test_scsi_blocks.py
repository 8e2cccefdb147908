"""Commands that touch sectors: ranges, verify, write same, unmap, flush, start and stop,
protection.
"""

import errno

import pytest

from protocol.iscsi.initiator.task import CommandFailed
from protocol.scsi import limits
from protocol.volume import Buffer, Completion
from tests.protocol.coupling import Coupling, coupled
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.test_scsi_identity import CACHING, fails, mode_select

SIZE = 40 << 20
SECTORS = SIZE // 512
READS = {6: 0x08, 10: 0x28, 12: 0xA8, 16: 0x88}
WRITES = {6: 0x0A, 10: 0x2A, 12: 0xAA, 16: 0x8A}
WRITE_VERIFIES = {10: 0x2E, 12: 0xAE, 16: 0x8E}
VERIFIES = {10: 0x2F, 12: 0xAF, 16: 0x8F}


def cdb(opcodes: dict[int, int], size: int, lba: int, sectors: int, flags: int = 0) -> bytes:
    """A CDB of one of the four shapes."""
    opcode = opcodes[size]
    if size == 6:
        return bytes((opcode,)) + lba.to_bytes(3, "big") + bytes((sectors & 0xFF, 0))
    if size == 10:
        return (
            bytes((opcode, flags))
            + lba.to_bytes(4, "big")
            + b"\0"
            + sectors.to_bytes(2, "big")
            + b"\0"
        )
    if size == 12:
        return (
            bytes((opcode, flags)) + lba.to_bytes(4, "big") + sectors.to_bytes(4, "big") + b"\0\0"
        )
    return bytes((opcode, flags)) + lba.to_bytes(8, "big") + sectors.to_bytes(4, "big") + b"\0\0"


@pytest.fixture
def volume() -> MemoryVolume:
    return MemoryVolume(SIZE)


@pytest.fixture
def pair(volume: MemoryVolume) -> Coupling:
    return coupled(volume)


@pytest.mark.parametrize("size", [6, 10, 12, 16])
@pytest.mark.parametrize(("lba", "sectors"), [(0, 1), (7, 3), (0, 255), (SECTORS - 5, 5)])
def test_what_is_written_is_read(pair, volume, size, lba, sectors):
    data = bytes(index * 7 & 0xFF for index in range(sectors * 512))
    pair.command(cdb(WRITES, size, lba, sectors), data=data)
    assert volume.data[lba * 512 : (lba + sectors) * 512] == data
    assert pair.command(cdb(READS, size, lba, sectors), read_bytes=len(data)) == data


def test_six_byte_commands_of_length_zero_mean_256(pair):
    pair.command(cdb(WRITES, 6, 0, 0), data=b"\x21" * 131072)
    assert pair.command(cdb(READS, 6, 0, 0), read_bytes=131072) == b"\x21" * 131072


@pytest.mark.parametrize(
    "opcodes",
    [READS, WRITES, WRITE_VERIFIES, VERIFIES],
    ids=["read", "write", "write and verify", "verify"],
)
@pytest.mark.parametrize("size", [10, 12, 16])
@pytest.mark.parametrize(
    ("lba", "sectors", "bad"),
    [
        (SECTORS, 1, True),
        (SECTORS - 1, 2, True),
        (0xFFFFFFFF, 1, True),
        (SECTORS, 0, True),
        (SECTORS - 1, 0, False),
    ],
)
def test_ranges_end_at_the_capacity(pair, opcodes, size, lba, sectors, bad):
    if bad:
        fails(pair, cdb(opcodes, size, lba, sectors), (5, 0x21, 0))
    else:
        assert pair.command(cdb(opcodes, size, lba, sectors)) == b""


@pytest.mark.parametrize("opcodes", [READS, WRITES, VERIFIES])
def test_transfers_above_the_advertised_maximum_are_refused(pair, opcodes):
    fails(pair, cdb(opcodes, 16, 0, limits.TRANSFER_SECTORS_MAX + 1), (5, 0x24, 0))


def test_a_transfer_of_the_maximum_passes(pair, volume):
    data = b"\x5a" * (limits.TRANSFER_SECTORS_MAX * 512)
    pair.command(cdb(WRITES, 16, 0, limits.TRANSFER_SECTORS_MAX), data=data)
    assert volume.data[: len(data)] == data


class Durable(MemoryVolume):
    """Records the FUA flag of writes."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.fua: list[bool] = []

    def write(self, offset_bytes: int, data: Buffer, fua: bool, done: Completion) -> None:
        self.fua.append(fua)
        super().write(offset_bytes, data, fua, done)


def test_fua_and_a_write_cache_that_is_off_make_writes_durable():
    volume = Durable()
    pair = coupled(volume)
    for size, flags in ((10, 0), (10, 8), (16, 0x18), (6, 0)):
        pair.command(cdb(WRITES, size, 0, 1, flags), data=bytes(512))
    mode_select(pair, bytes(4) + CACHING[:2] + bytes(18))
    pair.command(cdb(WRITES, 10, 0, 1), data=bytes(512))
    pair.command(cdb(WRITES, 6, 0, 1), data=bytes(512))
    assert volume.fua == [False, True, True, False, True, True]


@pytest.mark.parametrize("size", [10, 12, 16])
@pytest.mark.parametrize("held", [False, True])
def test_verify(pair, volume, size, held):
    volume.data[: 1 << 20] = bytes(range(256)) * 4096
    good = bytes(volume.data[: 1 << 20])

    def verify(flags: int, data: bytes, sectors: int = 2048) -> None:
        volume.hold_reads = held
        results: list[object] = []
        pair.initiator.submit(
            0,
            cdb(VERIFIES, size, 0, sectors, flags),
            lambda _, error: results.append(error),
            data=data,
        )
        for _ in range(10):
            pair.run()
            volume.release()
        pair.run()
        if isinstance(results[0], CommandFailed):
            raise results[0]

    verify(0, b"")
    verify(0x02, good)
    verify(0x06, good[:512])
    wrong = bytearray(good)
    wrong[777_777] ^= 1
    with pytest.raises(CommandFailed, match="E/1D/00") as caught:
        verify(0x02, bytes(wrong))
    assert int.from_bytes(caught.value.sense[3:7], "big") == 777_777
    with pytest.raises(CommandFailed, match="E/1D/00"):
        verify(0x06, bytes(512))
    volume.fail_reads = errno.EIO
    with pytest.raises(CommandFailed, match="3/11/00"):
        verify(0, b"")
    volume.fail_reads = None
    with pytest.raises(CommandFailed, match="5/24/00"):
        verify(0x04, b"")


@pytest.mark.parametrize("size", [10, 12, 16])
@pytest.mark.parametrize("flags", [0, 2])
def test_write_and_verify(pair, volume, size, flags):
    data = b"\x77" * 8192
    pair.command(cdb(WRITE_VERIFIES, size, 8, 16, flags), data=data)
    assert volume.data[4096:12288] == data
    fails(pair, cdb(WRITE_VERIFIES, size, 8, 16, 4), (5, 0x24, 0), data=data)
    volume.fail_writes = errno.ENOSPC
    fails(pair, cdb(WRITE_VERIFIES, size, 8, 16, flags), (7, 0x27, 7), data=data)


def test_write_and_verify_finds_what_did_not_arrive(pair, volume):
    volume.try_read = lambda offset, length: bytes(length)
    fails(pair, cdb(WRITE_VERIFIES, 10, 0, 1, 2), (14, 0x1D, 0), data=b"\1" * 512)


def write_same(size: int, lba: int, sectors: int, flags: int = 0) -> bytes:
    if size == 10:
        return (
            bytes((0x41, flags))
            + lba.to_bytes(4, "big")
            + b"\0"
            + sectors.to_bytes(2, "big")
            + b"\0"
        )
    return bytes((0x93, flags)) + lba.to_bytes(8, "big") + sectors.to_bytes(4, "big") + b"\0\0"


@pytest.mark.parametrize("size", [10, 16])
def test_write_same(pair, volume, size):
    volume.data[: 2 << 20] = b"\xee" * (2 << 20)
    pattern = bytes(range(256)) * 2
    pair.command(write_same(size, 1, 2000), data=pattern)
    assert volume.data[512 : 512 * 2001] == pattern * 2000 and volume.data[:512] == b"\xee" * 512
    pair.command(write_same(size, 1, 1000), data=bytes(512))
    assert volume.data[512 : 512 * 1001] == bytes(512_000) and volume.unmapped == []
    pair.command(write_same(size, 8, 8, 0x08), data=bytes(512))
    assert volume.unmapped == [(4096, 4096)]
    pair.command(
        write_same(size, 8, 8, 0x08), data=pattern
    )  # unmapping would not leave the pattern: it is written
    assert volume.data[4096:8192] == pattern * 8 and volume.unmapped == [(4096, 4096)]
    fails(pair, write_same(size, 0, 1, 0x18), (5, 0x24, 0), data=bytes(512))
    fails(pair, write_same(size, SECTORS - 1, 2), (5, 0x21, 0), data=bytes(512))
    for wrong in (b"", bytes(256), bytes(1024)):
        fails(pair, write_same(size, 0, 1), (5, 0x24, 0), data=wrong)
    volume.fail_writes = errno.ENOSPC
    fails(pair, write_same(size, 0, 2000), (7, 0x27, 7), data=pattern)


def test_write_same_without_data(pair, volume):
    volume.data[:8192] = b"\xee" * 8192
    pair.command(write_same(16, 0, 8, 0x01))
    assert volume.data[:8192] == bytes(4096) + b"\xee" * 4096 and volume.unmapped == []
    pair.command(write_same(16, 8, 8, 0x09))
    assert volume.unmapped == [(4096, 4096)]
    fails(pair, write_same(16, 0, limits.WRITE_SAME_SECTORS_MAX + 1, 0x01), (5, 0x24, 0))


def unmap_list(*extents: tuple[int, int], described: int | None = None) -> bytes:
    body = b"".join(
        lba.to_bytes(8, "big") + sectors.to_bytes(4, "big") + bytes(4) for lba, sectors in extents
    )
    length = len(body) if described is None else described
    return (length + 6).to_bytes(2, "big") + length.to_bytes(2, "big") + bytes(4) + body


def unmap(pair: Coupling, data: bytes) -> None:
    pair.command(bytes((0x42, 0, 0, 0, 0, 0, 0)) + len(data).to_bytes(2, "big") + b"\0", data=data)


def test_unmap(pair, volume):
    volume.data[:16384] = b"\xee" * 16384
    unmap(pair, unmap_list((8, 8), (0, 0), (24, 8)))
    assert volume.unmapped == [(4096, 4096), (12288, 4096)]
    assert volume.data[:16384] == b"\xee" * 4096 + bytes(4096) + b"\xee" * 4096 + bytes(4096)
    unmap(pair, unmap_list())
    pair.command(bytes((0x42,)).ljust(10, b"\0"))


BAD_UNMAPS = {
    "a short header": (bytes(7), (5, 0x1A, 0)),
    "more described than sent": (unmap_list((0, 8), described=32), (5, 0x26, 0)),
    "too many descriptors": (
        unmap_list(*[(0, 1)] * (limits.UNMAP_DESCRIPTORS_MAX + 1)),
        (5, 0x26, 0),
    ),
    "too many sectors": (unmap_list((0, limits.UNMAP_SECTORS_MAX), (0, 1)), (5, 0x26, 0)),
    "beyond the end": (unmap_list((0, 8), (SECTORS - 1, 2)), (5, 0x21, 0)),
}


@pytest.mark.parametrize(("data", "sense"), BAD_UNMAPS.values(), ids=BAD_UNMAPS)
def test_bad_unmap_lists_touch_nothing(pair, volume, data, sense):
    with pytest.raises(CommandFailed) as caught:
        unmap(pair, data)
    assert (
        caught.value.key,
        caught.value.asc,
        caught.value.ascq,
    ) == sense and volume.unmapped == []


def test_an_unmap_ends_at_the_first_error(pair, volume):
    volume.fail_writes = errno.EIO
    with pytest.raises(CommandFailed, match="3/0C/00"):
        unmap(pair, unmap_list((0, 8), (8, 8)))
    assert len(volume.unmapped) == 1


@pytest.mark.parametrize(
    "command",
    [
        bytes((0x35,)).ljust(10, b"\0"),
        bytes((0x91,)).ljust(16, b"\0"),
        bytes((0x91, 2)).ljust(16, b"\0"),
    ],
)
def test_synchronize_cache(pair, volume, command):
    pair.command(command)
    assert volume.flushes == 1


def test_synchronize_cache_of_a_range_beyond_the_end(pair):
    fails(pair, bytes((0x35, 0)) + SECTORS.to_bytes(4, "big") + bytes((0, 0, 1, 0)), (5, 0x21, 0))


def test_writes_before_a_flush_are_settled_before_it(volume):
    order: list[str] = []
    original_settle, original_flush = volume.settle, volume.flush
    pair = coupled(volume)

    def settle() -> None:
        order.append(f"settle {len(volume._batch)}")
        original_settle()

    def flush(done: Completion) -> None:
        order.append("flush")
        original_flush(done)

    volume.settle, volume.flush = settle, flush
    pair.initiator.submit_write(0, 0, bytes(512), lambda *_: None)
    pair.initiator.submit_flush(0, lambda *_: None)
    pair.run()
    assert order[:2] == ["settle 1", "flush"]


def test_stop_and_start(pair, volume):
    pair.command(bytes((0x1B, 0, 0, 0, 0, 0)))
    assert volume.flushes == 1
    for command in (bytes(6), cdb(READS, 10, 0, 1), bytes((0x25,)).ljust(10, b"\0")):
        fails(pair, command, (2, 4, 2))
    assert pair.command(bytes((0x03, 0, 0, 0, 18, 0)), read_bytes=18)[2] == 2
    pair.command(bytes((0x1B, 0, 0, 0, 1, 0)))
    pair.command(cdb(READS, 10, 0, 1), read_bytes=512)
    pair.command(bytes((0x1B, 0, 0, 0, 4, 0)))
    assert volume.flushes == 1
    pair.command(bytes((0x1B, 0, 0, 0, 0x11, 0)))  # a power condition changes nothing
    fails(pair, bytes(6), (2, 4, 2))


def test_medium_removal_is_accepted_and_means_nothing(pair):
    pair.command(bytes((0x1E, 0, 0, 0, 1, 0)))
    pair.command(bytes(6))


def test_a_read_only_volume_refuses_every_command_that_writes(pair, volume):
    volume.read_only = True
    pair.node.unit_for(volume).state_changed()
    commands = [
        (cdb(WRITES, 10, 0, 1), bytes(512)),
        (cdb(WRITES, 6, 0, 1), bytes(512)),
        (cdb(WRITE_VERIFIES, 10, 0, 1), bytes(512)),
        (write_same(10, 0, 1), bytes(512)),
        (bytes((0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0)), unmap_list((0, 8))),
    ]
    for command, data in commands:
        fails(pair, command, (7, 0x27, 0), data=data)
    assert pair.command(cdb(READS, 10, 0, 1), read_bytes=512) == bytes(512)
    assert pair.command(bytes((0x1A, 8, 0x3F, 0, 255, 0)), read_bytes=255)[2] == 0x90


def lba_status(pair: Coupling, lba: int, allocation: int = 4096) -> list[tuple[int, int, int]]:
    data = pair.command(
        bytes((0x9E, 0x12)) + lba.to_bytes(8, "big") + allocation.to_bytes(4, "big") + bytes(2),
        read_bytes=allocation,
    )
    assert int.from_bytes(data[:4], "big") % 16 == 4
    return [
        (
            int.from_bytes(data[at : at + 8], "big"),
            int.from_bytes(data[at + 8 : at + 12], "big"),
            data[at + 12],
        )
        for at in range(8, len(data) - 15, 16)
    ]


def test_lba_status(pair, volume):
    volume.data[8192:12288] = b"\1" * 4096
    assert lba_status(pair, 0) == [(0, 16, 1), (16, 8, 0), (24, 8192 - 24, 1)]
    assert lba_status(pair, 18)[0] == (18, 6, 0)
    assert lba_status(pair, 0, 24) == [(0, 16, 1)]
    fails(
        pair,
        bytes((0x9E, 0x12)) + SECTORS.to_bytes(8, "big") + (24).to_bytes(4, "big") + bytes(2),
        (5, 0x21, 0),
    )


def test_a_volume_that_cannot_tell_counts_as_allocated():
    class Silent(MemoryVolume):
        allocation = None  # type: ignore[assignment]  # which is how a class says that it lacks a protocol's method

    assert lba_status(coupled(Silent(SIZE)), 8) == [(8, SECTORS - 8, 0)]


@pytest.mark.parametrize("opcodes", [{10: 0x34}, {16: 0x90}])
def test_prefetch_checks_its_range(pair, opcodes):
    (size,) = opcodes
    pair.command(cdb(opcodes, size, 0, 0))
    pair.command(cdb(opcodes, size, SECTORS - 8, 8, 0x02))
    for lba, sectors in ((SECTORS, 1), (SECTORS, 0), (SECTORS - 1, 2)):
        fails(pair, cdb(opcodes, size, lba, sectors), (5, 0x21, 0))


def test_there_are_no_defects(pair):
    assert pair.command(bytes((0x37, 0, 0x1D, 0, 0, 0, 0, 0, 255, 0)), read_bytes=255) == bytes(
        (0, 0x1D, 0, 0)
    )
    assert pair.command(
        bytes((0xB7, 0x1D)) + bytes(4) + (255).to_bytes(4, "big") + bytes(2), read_bytes=255
    ) == bytes((0, 0x1D)) + bytes(6)
