"""CDBs that our initiator sends, from offsets and lengths in bytes, and what it parses of the
answers.
"""

from struct import Struct
from typing import Final

from protocol.scsi import opcodes
from protocol.scsi.limits import SECTOR_SHIFT

_EXTENT: Final = Struct(">BBQIBB")
_UNMAP: Final = Struct(">B5xBHB")
_UNMAP_DESCRIPTOR: Final = Struct(">QI4x")
_UNMAP_HEAD: Final = Struct(">HH4x")
_CAPACITY: Final = Struct(">QI")
_FUA: Final = 0x08
_NDOB: Final = 0x01
CAPACITY_BYTES: Final = 32


def read(offset_bytes: int, length_bytes: int) -> bytes:
    """READ(16)."""
    return _EXTENT.pack(
        opcodes.READ_16, 0, offset_bytes >> SECTOR_SHIFT, length_bytes >> SECTOR_SHIFT, 0, 0
    )


def write(offset_bytes: int, length_bytes: int, fua: bool) -> bytes:
    """WRITE(16)."""
    return _EXTENT.pack(
        opcodes.WRITE_16,
        _FUA if fua else 0,
        offset_bytes >> SECTOR_SHIFT,
        length_bytes >> SECTOR_SHIFT,
        0,
        0,
    )


def write_zeros(offset_bytes: int, length_bytes: int) -> bytes:
    """WRITE SAME(16) with NDOB: zeros without sending any."""
    return _EXTENT.pack(
        opcodes.WRITE_SAME_16,
        _NDOB,
        offset_bytes >> SECTOR_SHIFT,
        length_bytes >> SECTOR_SHIFT,
        0,
        0,
    )


def flush() -> bytes:
    """SYNCHRONIZE CACHE(16) of the whole unit."""
    return _EXTENT.pack(opcodes.SYNCHRONIZE_CACHE_16, 0, 0, 0, 0, 0)


def unmap(parameter_bytes: int) -> bytes:
    """UNMAP with a parameter list of this length."""
    return _UNMAP.pack(opcodes.UNMAP, 0, parameter_bytes, 0)


def unmap_parameters(extents: list[tuple[int, int]]) -> bytes:
    """The parameter list of UNMAP for (offset, length) in bytes."""
    body = b"".join(
        _UNMAP_DESCRIPTOR.pack(offset >> SECTOR_SHIFT, length >> SECTOR_SHIFT)
        for offset, length in extents
    )
    return _UNMAP_HEAD.pack(len(body) + 6, len(body)) + body


def read_capacity() -> bytes:
    """READ CAPACITY(16)."""
    return _EXTENT.pack(
        opcodes.SERVICE_ACTION_IN_16, opcodes.READ_CAPACITY_16, 0, CAPACITY_BYTES, 0, 0
    )


def parse_capacity(data: bytes) -> int:
    """Capacity in bytes from the answer to READ CAPACITY(16)."""
    last, sector_bytes = _CAPACITY.unpack_from(data)
    return (int(last) + 1) * int(sector_bytes)
