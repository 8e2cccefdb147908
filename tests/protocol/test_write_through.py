"""With the write cache switched off, every command that changes sectors is durable before its
status (SBC-3 6.4.2, WCE).
"""

import pytest

from protocol.volume import Buffer, Completion
from tests.protocol.coupling import Coupling, coupled
from tests.protocol.memory_volume import MemoryVolume
from tests.protocol.test_extended_copy import cdb as copy_cdb
from tests.protocol.test_extended_copy import copy_list, naa, segment, target

SIZE = 8 << 20
SECTOR = b"a" * 512


class CachedVolume(MemoryVolume):
    """``durable`` is False while a change was neither written with FUA nor followed by a flush."""

    durable = True

    def write(self, offset_bytes: int, data: Buffer, fua: bool, done: Completion) -> None:
        self.durable &= fua
        super().write(offset_bytes, data, fua, done)

    def write_zeros(
        self, offset_bytes: int, length_bytes: int, fua: bool, done: Completion
    ) -> None:
        self.durable &= fua
        super().write_zeros(offset_bytes, length_bytes, fua, done)

    def unmap(self, offset_bytes: int, length_bytes: int, done: Completion) -> None:
        self.durable = False
        super().unmap(offset_bytes, length_bytes, done)

    def flush(self, done: Completion) -> None:
        self.durable = True
        super().flush(done)


class SharingVolume(CachedVolume):
    """Copies by reference, too."""

    def copy_from(
        self,
        source: object,
        source_offset_bytes: int,
        offset_bytes: int,
        length_bytes: int,
        done: Completion,
    ) -> None:
        assert source is self
        self.data[offset_bytes : offset_bytes + length_bytes] = self.data[
            source_offset_bytes : source_offset_bytes + length_bytes
        ]
        self.durable = False
        done(None)


def write_same(flags: int = 0, sectors: int = 2) -> bytes:
    return bytes((0x93, flags)) + (8).to_bytes(8, "big") + sectors.to_bytes(4, "big") + bytes(2)


def long_form(opcode: int, sectors: int = 1) -> bytes:
    return bytes((opcode, 0)) + (8).to_bytes(8, "big") + sectors.to_bytes(4, "big") + bytes(2)


def unmap_list() -> bytes:
    extents = b"".join(
        lba.to_bytes(8, "big") + (8).to_bytes(4, "big") + bytes(4) for lba in (8, 64)
    )
    return (
        (len(extents) + 6).to_bytes(2, "big") + len(extents).to_bytes(2, "big") + bytes(4) + extents
    )


CHANGES = {
    "WRITE(6)": (bytes((0x0A, 0, 0, 8, 1, 0)), SECTOR),
    "WRITE(16)": (long_form(0x8A), SECTOR),
    "WRITE AND VERIFY(16)": (long_form(0x8E), SECTOR),
    "WRITE ATOMIC(16)": (
        bytes((0x9C, 0)) + (8).to_bytes(8, "big") + bytes((0, 0, 0, 8, 0, 0)),
        SECTOR * 8,
    ),
    "COMPARE AND WRITE": (
        bytes((0x89, 0)) + (8).to_bytes(8, "big") + bytes((0, 0, 0, 1, 0, 0)),
        bytes(512) + SECTOR,
    ),
    "ORWRITE(16)": (long_form(0x8B), SECTOR),
    "WRITE SAME of a pattern": (write_same(), SECTOR),
    "WRITE SAME of a pattern in pieces": (write_same(sectors=2048), SECTOR),
    "WRITE SAME of zeros": (write_same(), bytes(512)),
    "WRITE SAME with UNMAP": (write_same(0x08), bytes(512)),
    "WRITE SAME without data": (write_same(0x01), b""),
    "UNMAP": (bytes((0x42, 0, 0, 0, 0, 0, 0, 0, len(unmap_list()), 0)), unmap_list()),
    "SANITIZE, OVERWRITE": (bytes((0x48, 1, 0, 0, 0, 0, 0, 0, 5, 0)), bytes((1, 0, 0, 1, 7))),
    "SANITIZE, BLOCK ERASE": (bytes((0x48, 2, 0, 0, 0, 0, 0, 0, 0, 0)), b""),
}


def write_through(volume: MemoryVolume) -> Coupling:
    """A session whose initiator has switched the write cache off (caching mode page, WCE 0)."""
    pair = coupled(volume)
    parameters = bytes(4) + bytes((0x08, 0x12)) + bytes(18)
    pair.command(bytes((0x15, 0x10, 0, 0, len(parameters), 0)), data=parameters)
    return pair


@pytest.mark.parametrize("name", CHANGES)
def test_without_a_write_cache_a_change_is_durable_before_its_status(name: str) -> None:
    volume = CachedVolume(SIZE)
    cdb, data = CHANGES[name]
    write_through(volume).command(cdb, data=data)
    assert volume.durable
    if "SANITIZE" not in name and "VERIFY" not in name:
        coupled(volume).command(cdb, data=data if name != "COMPARE AND WRITE" else SECTOR + SECTOR)
        assert not volume.durable  # this test can fail: with a write cache nothing of it waits


@pytest.mark.parametrize("kind", [CachedVolume, SharingVolume])
def test_without_a_write_cache_a_copy_is_durable_before_its_status(
    kind: type[CachedVolume],
) -> None:
    volume = kind(SIZE)
    pair = write_through(volume)
    parameters = copy_list([target(naa(pair, 0))], [segment(0, 0, 64, 0, 4096)])
    volume.data[:4] = b"copy"
    pair.command(copy_cdb(len(parameters)), data=parameters)
    assert volume.data[4096 * 512 :][:4] == b"copy" and volume.durable
