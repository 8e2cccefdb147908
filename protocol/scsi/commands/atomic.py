"""COMPARE AND WRITE and ORWRITE (SBC-3 5.2, 5.17): a read and a write that depends on it, as one
operation.

WRITE ATOMIC (SBC-4 5.48): a write that is durable as a whole or not at all.
"""

from typing import Final

from protocol.scsi import limits, opcodes, sense
from protocol.scsi.command import NO_DATA, Command, Request, check_range
from protocol.scsi.commands.scan import Comparison, Scan
from protocol.scsi.errors import CheckCondition
from protocol.scsi.limits import SECTOR_SHIFT
from protocol.scsi.plan import Operation, Plan
from protocol.volume import Buffer, Completion

_FUA: Final = 0x08


def compare_and_write(request: Request) -> Plan:
    """COMPARE AND WRITE: the first half of the data is compared, the second half is written where
    the comparison holds.
    """
    cdb, unit = request.cdb, request.unit
    offset, length = check_range(unit, int.from_bytes(cdb[2:10], "big"), cdb[13])
    if length == 0:
        return Operation(0, lambda _, done: done(None), exact=True)
    fua = bool(cdb[1] & _FUA) or not unit.write_cache

    def start(data: Buffer, done: Completion) -> None:
        view = memoryview(data)

        def compared(error: Exception | None) -> None:
            if error is not None:
                done(error)
                return
            unit.volume.write(offset, view[length:], fua, done)
            unit.volume.settle()

        Scan(
            unit, offset, length, Comparison(view[:length], repeated=False).check, compared
        ).start()

    return Operation(2 * length, start, needs_owned_data=True, exact=True, exclusive=True)


def or_write(request: Request) -> Plan:
    """ORWRITE(16): the bits of the data are set in the sectors."""
    cdb, unit = request.cdb, request.unit
    sectors = int.from_bytes(cdb[10:14], "big")
    if sectors > limits.TRANSFER_SECTORS_MAX:
        raise CheckCondition(sense.invalid_field_in_cdb(10))
    offset, length = check_range(unit, int.from_bytes(cdb[2:10], "big"), sectors)
    if length == 0:
        return NO_DATA

    def start(data: Buffer, done: Completion) -> None:
        usable = len(data) >> SECTOR_SHIFT << SECTOR_SHIFT
        merged = bytearray(memoryview(data)[:usable])

        def merge(position: int, piece: Buffer) -> None:
            end = position + len(piece)
            both = int.from_bytes(merged[position:end], "big") | int.from_bytes(piece, "big")
            merged[position:end] = both.to_bytes(len(piece), "big")

        def read_through(error: Exception | None) -> None:
            if error is not None:
                done(error)
                return
            unit.volume.write(offset, merged, bool(cdb[1] & _FUA) or not unit.write_cache, done)
            unit.volume.settle()

        Scan(unit, offset, usable, merge, read_through).start()

    return Operation(length, start, needs_owned_data=True, exclusive=True)


def write_atomic(request: Request) -> Plan:
    """WRITE ATOMIC(16): whole blocks only, which a volume writes in one step
    (`protocol.volume.ATOMIC_WRITE_BYTES_MAX`).

    A client that announces less data is refused: part of an atomic write would not be atomic.
    """
    cdb, unit = request.cdb, request.unit
    lba, sectors = int.from_bytes(cdb[2:10], "big"), int.from_bytes(cdb[12:14], "big")
    offset, length = check_range(unit, lba, sectors)
    if lba % limits.PHYSICAL_BLOCK_SECTORS:
        raise CheckCondition(sense.invalid_field_in_cdb(2))
    if sectors > limits.ATOMIC_SECTORS_MAX or sectors % limits.PHYSICAL_BLOCK_SECTORS:
        raise CheckCondition(sense.invalid_field_in_cdb(12))
    if length == 0:
        return NO_DATA
    fua = bool(cdb[1] & _FUA) or not unit.write_cache
    return Operation(
        length, lambda data, done: unit.volume.write(offset, data, fua, done), exact=True
    )


COMMANDS: Final = (
    # Bytes 10 and 11 are the atomic boundary, which is 0: no boundary splits a write.
    Command(
        opcodes.WRITE_ATOMIC_16,
        "WRITE ATOMIC(16)",
        "18ffffffffffffffff0000ffff3f00",
        write_atomic,
        needs_medium=True,
        writes=True,
    ),
    Command(
        opcodes.COMPARE_AND_WRITE,
        "COMPARE AND WRITE",
        "18ffffffffffffffff000000ff3f00",
        compare_and_write,
        needs_medium=True,
        writes=True,
    ),
    Command(
        opcodes.ORWRITE_16,
        "ORWRITE(16)",
        "18ffffffffffffffffffffffff3f00",
        or_write,
        needs_medium=True,
        writes=True,
    ),
)
