"""Access to the medium (SBC-3 clause 5): READ, WRITE, VERIFY, SYNCHRONIZE CACHE, READ CAPACITY and
related commands.
"""

from struct import Struct
from typing import Final

from protocol.scsi import opcodes, sense
from protocol.scsi.command import NO_DATA, Command, Request, check_range, cut
from protocol.scsi.commands.scan import Comparison, Scan
from protocol.scsi.errors import CheckCondition
from protocol.scsi.limits import SECTOR_BYTES, TRANSFER_SECTORS_MAX
from protocol.scsi.plan import Operation, Plan, ReadExtent
from protocol.volume import Buffer, Completion

_FUA: Final = 0x08
_BYTE_CHECK: Final = 0x06
_CAPACITY_10: Final = Struct(">II")
_CAPACITY_16: Final = Struct(">QIBBH16x")
_CAPACITY_16_ALLOCATION_AT: Final = 10
_LBPME_LBPRZ: Final = 0xC000
# LBA and length of each CDB size: (LBA first byte, end, length first byte, end).
_LAYOUT: Final = {6: (1, 4, 4, 5), 10: (2, 6, 7, 9), 12: (2, 6, 6, 10), 16: (2, 10, 10, 14)}
_CDB_BYTES_BY_GROUP: Final = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}


def _range(request: Request) -> tuple[int, int]:
    """LBA and sectors of the CDB, by the group code in its operation code (SPC-4 4.2.5.1)."""
    cdb = request.cdb
    size = _CDB_BYTES_BY_GROUP[cdb[0] >> 5]
    lba_at, lba_end, length_at, length_end = _LAYOUT[size]
    lba = int.from_bytes(cdb[lba_at:lba_end], "big")
    sectors = int.from_bytes(cdb[length_at:length_end], "big")
    if size == 6:
        # Zero means 256 in the six-byte form only (SBC-3 5.8).
        return lba & 0x1FFFFF, sectors or 256
    return lba, sectors


def _length_at(request: Request) -> int:
    return _LAYOUT[_CDB_BYTES_BY_GROUP[request.cdb[0] >> 5]][2]


def _extent(request: Request) -> tuple[int, int]:
    """Offset and length in bytes, checked against the maximum transfer length and the capacity."""
    lba, sectors = _range(request)
    if sectors > TRANSFER_SECTORS_MAX:
        raise CheckCondition(sense.invalid_field_in_cdb(_length_at(request)))
    return check_range(request.unit, lba, sectors)


def read(request: Request) -> Plan:
    """READ(6, 10, 12, 16). FUA and DPO change nothing: a read returns every acknowledged write."""
    offset, length = _extent(request)
    return ReadExtent(offset, length) if length else NO_DATA


def write(request: Request) -> Plan:
    """WRITE(6, 10, 12, 16); with FUA, or with the write cache switched off, the data are durable
    before the status.
    """
    offset, length = _extent(request)
    if length == 0:
        return NO_DATA
    unit = request.unit
    fua = not unit.write_cache or (
        request.cdb[0] != opcodes.WRITE_6 and bool(request.cdb[1] & _FUA)
    )

    def start(data: Buffer, done: Completion) -> None:
        usable = len(data) - len(data) % SECTOR_BYTES
        if usable == 0:
            done(None)
            return
        unit.volume.write(
            offset, data if usable == len(data) else memoryview(data)[:usable], fua, done
        )

    return Operation(length, start)


def verify(request: Request) -> Plan:
    """VERIFY(10, 12, 16): read everything (the store verifies checksums), and with BYTCHK compare
    it with the client's data.
    """
    offset, length = _extent(request)
    mode = request.cdb[1] & _BYTE_CHECK
    if mode == 0x04:
        raise CheckCondition(sense.invalid_field_in_cdb(1, 2))
    if length == 0:
        return NO_DATA
    unit = request.unit

    def start(data: Buffer, done: Completion) -> None:
        usable = length if mode == 0 else min(length, len(data) - len(data) % SECTOR_BYTES)
        if mode == 0x06:
            usable = length if len(data) >= SECTOR_BYTES else 0
        check = None if mode == 0 else Comparison(data, repeated=mode == 0x06).check
        Scan(unit, offset, usable, check, done).start()

    wanted = {0x00: 0, 0x02: length, 0x06: SECTOR_BYTES}[mode]
    return Operation(wanted, start, writing=False, needs_owned_data=True)


def write_and_verify(request: Request) -> Plan:
    """WRITE AND VERIFY(10, 12, 16): write to the medium, then read back and compare."""
    offset, length = _extent(request)
    mode = request.cdb[1] & _BYTE_CHECK
    if mode > 0x02:
        raise CheckCondition(sense.invalid_field_in_cdb(1, 2))
    if length == 0:
        return NO_DATA
    unit = request.unit

    def start(data: Buffer, done: Completion) -> None:
        usable = len(data) - len(data) % SECTOR_BYTES

        def written(error: Exception | None) -> None:
            if error is not None:
                done(error)
                return
            Scan(
                unit, offset, usable, Comparison(data, repeated=False).check if mode else None, done
            ).start()

        unit.volume.write(offset, memoryview(data)[:usable], True, written)

    return Operation(length, start, needs_owned_data=True)


def synchronize_cache(request: Request) -> Plan:
    """SYNCHRONIZE CACHE(10, 16): the whole volume is made durable; a range is only checked. Length
    zero means to the end.
    """
    check_range(request.unit, *_range(request))
    volume = request.unit.volume
    return Operation(0, lambda _, done: volume.flush(done))


def prefetch(request: Request) -> Plan:
    """PRE-FETCH(10, 16): only the range is checked, since the store decides what it caches. GOOD
    promises nothing.
    """
    lba, sectors = _range(request)
    check_range(request.unit, lba, sectors or max(1, request.unit.sectors - lba))
    return NO_DATA


def read_defect_data(request: Request) -> Plan:
    """READ DEFECT DATA(10, 12): an empty list, in any format."""
    cdb = request.cdb
    wide = cdb[0] == opcodes.READ_DEFECT_DATA_12
    asked = cdb[1] if wide else cdb[2]
    allocation = int.from_bytes(cdb[6:10] if wide else cdb[7:9], "big")
    return cut(bytes((0, asked & 0x1F)) + bytes(6 if wide else 2), allocation)


def read_capacity_10(request: Request) -> Plan:
    """READ CAPACITY(10); FFFFFFFFh tells the client to ask with the 16-byte form."""
    cdb = request.cdb
    if any(cdb[2:6]):
        raise CheckCondition(sense.invalid_field_in_cdb(2))
    return cut(
        _CAPACITY_10.pack(min(request.unit.sectors - 1, 0xFFFFFFFF), SECTOR_BYTES),
        _CAPACITY_10.size,
    )


def read_capacity_16(request: Request) -> Plan:
    """READ CAPACITY(16): capacity, physical block size, and that the volume is thin and reads zeros
    where deallocated.
    """
    cdb = request.cdb
    if any(cdb[2:10]):
        raise CheckCondition(sense.invalid_field_in_cdb(2))
    body = _CAPACITY_16.pack(
        request.unit.sectors - 1,
        SECTOR_BYTES,
        0,
        request.unit.physical_block_exponent,
        _LBPME_LBPRZ,
    )
    return cut(
        body,
        int.from_bytes(cdb[_CAPACITY_16_ALLOCATION_AT : _CAPACITY_16_ALLOCATION_AT + 4], "big"),
    )


COMMANDS: Final = (
    Command(opcodes.READ_6, "READ(6)", "1fffffff00", read, needs_medium=True),
    Command(opcodes.READ_10, "READ(10)", "18ffffffff3fffff00", read, needs_medium=True),
    Command(opcodes.READ_12, "READ(12)", "18ffffffffffffffff3f00", read, needs_medium=True),
    Command(opcodes.READ_16, "READ(16)", "18ffffffffffffffffffffffff3f00", read, needs_medium=True),
    Command(opcodes.WRITE_6, "WRITE(6)", "1fffffff00", write, needs_medium=True, writes=True),
    Command(
        opcodes.WRITE_10, "WRITE(10)", "18ffffffff3fffff00", write, needs_medium=True, writes=True
    ),
    Command(
        opcodes.WRITE_12,
        "WRITE(12)",
        "18ffffffffffffffff3f00",
        write,
        needs_medium=True,
        writes=True,
    ),
    Command(
        opcodes.WRITE_16,
        "WRITE(16)",
        "18ffffffffffffffffffffffff3f00",
        write,
        needs_medium=True,
        writes=True,
    ),
    Command(
        opcodes.WRITE_AND_VERIFY_10,
        "WRITE AND VERIFY(10)",
        "16ffffffff3fffff00",
        write_and_verify,
        needs_medium=True,
        writes=True,
    ),
    Command(
        opcodes.WRITE_AND_VERIFY_12,
        "WRITE AND VERIFY(12)",
        "16ffffffffffffffff3f00",
        write_and_verify,
        needs_medium=True,
        writes=True,
    ),
    Command(
        opcodes.WRITE_AND_VERIFY_16,
        "WRITE AND VERIFY(16)",
        "16ffffffffffffffffffffffff3f00",
        write_and_verify,
        needs_medium=True,
        writes=True,
    ),
    Command(opcodes.VERIFY_10, "VERIFY(10)", "16ffffffff3fffff00", verify, needs_medium=True),
    Command(opcodes.VERIFY_12, "VERIFY(12)", "16ffffffffffffffff3f00", verify, needs_medium=True),
    Command(
        opcodes.VERIFY_16, "VERIFY(16)", "16ffffffffffffffffffffffff3f00", verify, needs_medium=True
    ),
    Command(
        opcodes.SYNCHRONIZE_CACHE_10,
        "SYNCHRONIZE CACHE(10)",
        "06ffffffff3fffff00",
        synchronize_cache,
        needs_medium=True,
    ),
    Command(
        opcodes.SYNCHRONIZE_CACHE_16,
        "SYNCHRONIZE CACHE(16)",
        "06ffffffffffffffffffffffff3f00",
        synchronize_cache,
        needs_medium=True,
    ),
    Command(
        opcodes.PRE_FETCH_10, "PRE-FETCH(10)", "02ffffffff3fffff00", prefetch, needs_medium=True
    ),
    Command(
        opcodes.PRE_FETCH_16,
        "PRE-FETCH(16)",
        "02ffffffffffffffffffffffff3f00",
        prefetch,
        needs_medium=True,
    ),
    Command(
        opcodes.READ_DEFECT_DATA_10,
        "READ DEFECT DATA(10)",
        "001f00000000ffff00",
        read_defect_data,
        needs_medium=True,
    ),
    Command(
        opcodes.READ_DEFECT_DATA_12,
        "READ DEFECT DATA(12)",
        "1fffffffffffffffff0000",
        read_defect_data,
        needs_medium=True,
    ),
    Command(
        opcodes.READ_CAPACITY_10,
        "READ CAPACITY(10)",
        "00ffffffff00000000",
        read_capacity_10,
        needs_medium=True,
        despite_reservation=True,
    ),
    Command(
        opcodes.SERVICE_ACTION_IN_16,
        "READ CAPACITY(16)",
        "1fffffffffffffffffffffffff0000",
        read_capacity_16,
        service_action=opcodes.READ_CAPACITY_16,
        needs_medium=True,
        despite_reservation=True,
    ),
)
