"""UNMAP, WRITE SAME and GET LBA STATUS (SBC-3 5.5, 5.28, 5.42 to 5.44): deallocation, zeros,
patterns, and what is allocated.
"""

from struct import Struct
from typing import Final

from protocol.scsi import limits, opcodes, sense
from protocol.scsi.command import NO_DATA, Command, Request, check_range
from protocol.scsi.errors import CheckCondition
from protocol.scsi.limits import AT_ONCE_BYTES_MAX, PIECE_BYTES, SECTOR_BYTES, SECTOR_SHIFT
from protocol.scsi.logical_unit import LogicalUnit
from protocol.scsi.plan import Operation, Plan, Query, QueryDone
from protocol.volume import BlockVolume, Buffer, Completion, ReportsAllocation

_DESCRIPTOR: Final = Struct(">QI4x")
_LIST_HEAD_BYTES: Final = 8
_LBA_STATUS: Final = Struct(">QIB3x")
_LBA_STATUS_HEAD: Final = Struct(">I4x")
_MAPPED: Final = 0
_DEALLOCATED: Final = 1
_UNMAP: Final = 0x08
_ANCHOR: Final = 0x10
_NDOB: Final = 0x01
_ZERO_SECTOR: Final = bytes(SECTOR_BYTES)


def _unmap_extents(unit: LogicalUnit, data: bytes) -> list[tuple[int, int]]:
    """Ranges in bytes of an UNMAP parameter list, all checked before the first is touched."""
    if len(data) < _LIST_HEAD_BYTES:
        raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
    described = int.from_bytes(data[2:4], "big")
    if (
        described > len(data) - _LIST_HEAD_BYTES
        or described // _DESCRIPTOR.size > limits.UNMAP_DESCRIPTORS_MAX
    ):
        raise CheckCondition(sense.invalid_field_in_parameter_list(2))
    ends = _LIST_HEAD_BYTES + described - described % _DESCRIPTOR.size
    extents = [
        _DESCRIPTOR.unpack_from(data, at) for at in range(_LIST_HEAD_BYTES, ends, _DESCRIPTOR.size)
    ]
    if sum(sectors for _, sectors in extents) > limits.UNMAP_SECTORS_MAX:
        raise CheckCondition(sense.invalid_field_in_parameter_list(_LIST_HEAD_BYTES + 8))
    return [check_range(unit, lba, sectors) for lba, sectors in extents if sectors]


class _Unmapping:
    """Unmaps one extent after the other; one completion at the end, or at the first error."""

    __slots__ = ("_done", "_extents", "_volume")

    def __init__(
        self, volume: BlockVolume, extents: list[tuple[int, int]], done: Completion
    ) -> None:
        self._volume = volume
        self._extents = extents[::-1]
        self._done = done

    def step(self, error: Exception | None = None) -> None:
        """Start the next extent. UNMAP_DESCRIPTORS_MAX bounds the recursion of completions that
        come at once.
        """
        if error is not None or not self._extents:
            self._done(error)
            return
        offset, length = self._extents.pop()
        self._volume.unmap(offset, length, self.step)


def unmap(request: Request) -> Plan:
    """UNMAP: deallocate the ranges of the parameter list; they read as zeros afterwards."""
    list_bytes = int.from_bytes(request.cdb[7:9], "big")
    if list_bytes == 0:
        return NO_DATA
    unit = request.unit

    def start(data: Buffer, done: Completion) -> None:
        try:
            extents = _unmap_extents(unit, bytes(data))
        except CheckCondition as error:
            done(error)
            return
        _Unmapping(unit.volume, extents, unit.durably(done)).step()

    return Operation(list_bytes, start)


class _PatternWrite:
    """Writes one sector again and again over a range, in pieces, each in a turn of its own.

    The next piece waits until the last one is complete, and each is settled at once: the pattern
    buffer lives as long as this object does.
    """

    __slots__ = ("_done", "_end", "_offset", "_pattern", "_unit")

    def __init__(
        self, unit: LogicalUnit, offset: int, length: int, sector: bytes, done: Completion
    ) -> None:
        self._unit = unit
        self._offset = offset
        self._end = offset + length
        self._pattern = memoryview(sector * (min(PIECE_BYTES, length) // SECTOR_BYTES))
        self._done = unit.durably(done)

    def start(self) -> None:
        """Begin. A short range is written at once, a longer one in turns."""
        if self._end - self._offset <= AT_ONCE_BYTES_MAX:
            self._step()
        else:
            self._unit.turns.take(self._step)

    def _step(self) -> None:
        volume, offset = self._unit.volume, self._offset
        size = min(len(self._pattern), self._end - offset)
        self._offset += size
        volume.write(offset, self._pattern[:size], False, self._written)
        volume.settle()

    def _written(self, error: Exception | None) -> None:
        if error is None and self._offset < self._end:
            self._unit.turns.take(self._step)
        else:
            self._done(error)


def _same_range(request: Request) -> tuple[int, int]:
    cdb = request.cdb
    wide = len(cdb) >= 16 and cdb[0] & 0xE0 == 0x80
    lba = int.from_bytes(cdb[2:10] if wide else cdb[2:6], "big")
    sectors = int.from_bytes(cdb[10:14] if wide else cdb[7:9], "big")
    # Zero is refused, since WSNZ is set in the Block Limits page.
    if sectors == 0 or sectors > limits.WRITE_SAME_SECTORS_MAX:
        raise CheckCondition(sense.invalid_field_in_cdb(10 if wide else 7))
    return check_range(request.unit, lba, sectors)


def write_same(request: Request) -> Plan:
    """WRITE SAME(10, 16): zeros are deallocated or made zero pointers, any other pattern is
    written.
    """
    flags = request.cdb[1]
    if flags & _ANCHOR:
        # ANC_SUP is 0: nothing here can be anchored.
        raise CheckCondition(sense.invalid_field_in_cdb(1, 4))
    offset, length = _same_range(request)
    unit = request.unit

    def start(data: Buffer, done: Completion) -> None:
        sector = _ZERO_SECTOR if flags & _NDOB else bytes(data[:SECTOR_BYTES])
        if sector != _ZERO_SECTOR:
            _PatternWrite(unit, offset, length, sector, done).start()
        elif flags & _UNMAP:
            unit.volume.unmap(offset, length, unit.durably(done))
        else:
            unit.volume.write_zeros(offset, length, not unit.write_cache, done)

    return Operation(0 if flags & _NDOB else SECTOR_BYTES, start, exact=True)


def _encode_runs(lba: int, runs: list[tuple[int, bool]]) -> bytes:
    body = b""
    for length, allocated in runs:
        sectors = length >> SECTOR_SHIFT
        body += _LBA_STATUS.pack(lba, sectors, _MAPPED if allocated else _DEALLOCATED)
        lba += sectors
    return _LBA_STATUS_HEAD.pack(len(body) + 4) + body


def get_lba_status(request: Request) -> Plan:
    """GET LBA STATUS: mapped or deallocated, run by run, from the LBA on; the answer may end before
    the disk does.

    It looks for no more runs than the client has room for: QEMU often asks for one, before a read.
    """
    lba = int.from_bytes(request.cdb[2:10], "big")
    allocation = int.from_bytes(request.cdb[10:14], "big")
    unit = request.unit
    offset, length = check_range(
        unit, lba, min(limits.LBA_STATUS_SECTORS_MAX, max(1, unit.sectors - lba))
    )
    volume = unit.volume
    runs_max = max(
        1,
        min(
            limits.LBA_STATUS_DESCRIPTORS_MAX,
            (allocation - _LBA_STATUS_HEAD.size) // _LBA_STATUS.size,
        ),
    )

    def start(done: QueryDone) -> None:
        def reported(runs: list[tuple[int, bool]] | None, error: Exception | None) -> None:
            done(None if runs is None else _encode_runs(lba, runs[:runs_max])[:allocation], error)

        if isinstance(volume, ReportsAllocation):
            volume.allocation(offset, length, runs_max, reported)
        else:
            reported([(length, True)], None)

    return Query(start)


COMMANDS: Final = (
    Command(
        opcodes.SERVICE_ACTION_IN_16,
        "GET LBA STATUS",
        "1fffffffffffffffffffffffff0000",
        get_lba_status,
        service_action=opcodes.GET_LBA_STATUS,
        needs_medium=True,
        despite_reservation=True,
    ),
    Command(opcodes.UNMAP, "UNMAP", "00000000003fffff00", unmap, needs_medium=True, writes=True),
    Command(
        opcodes.WRITE_SAME_10,
        "WRITE SAME(10)",
        "18ffffffff3fffff00",
        write_same,
        needs_medium=True,
        writes=True,
    ),
    Command(
        opcodes.WRITE_SAME_16,
        "WRITE SAME(16)",
        "19ffffffffffffffffffffffff3f00",
        write_same,
        needs_medium=True,
        writes=True,
    ),
)
