"""EXTENDED COPY (LID1) and RECEIVE COPY RESULTS (SPC-4 6.4, 6.18 to 6.21, 5.17): copies between
disks that do not pass through the client.

Block to block (segment descriptor 02h) between logical units that identification descriptors (E4h)
name. Only logical units of the requesting nexus are found, so that a client can copy nothing that
it could not read and write itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Final

from protocol.scsi import limits, opcodes, sense
from protocol.scsi.command import NO_DATA, Command, Request, cut
from protocol.scsi.commands.copy_job import CopyJob, Segment
from protocol.scsi.commands.identity import is_designated
from protocol.scsi.errors import CheckCondition, ReservationConflict, ScsiError
from protocol.scsi.limits import SECTOR_BYTES, SECTOR_SHIFT
from protocol.scsi.logical_unit import CopyProgress, LogicalUnit, Nexus
from protocol.scsi.plan import Operation, Plan
from protocol.volume import Buffer, Completion

COPY_STATUS: Final = 0x00
OPERATING_PARAMETERS: Final = 0x03
_HEAD: Final = Struct(">BBH4xII")
_IDENTIFICATION: Final = 0xE4
_IDENTIFICATION_BYTES: Final = 32
_DESIGNATOR_BYTES_MAX: Final = 20
_BLOCK_TO_BLOCK: Final = 0x02
_BLOCK_TO_BLOCK_BYTES: Final = 28
_SEGMENT: Final = Struct(">BBHHH2xHQQ")
# Where the fields of a segment descriptor lie, for the field pointer of sense data.
_LENGTH_AT, _SOURCE_LBA_AT, _DESTINATION_LBA_AT = 2, 12, 20
_SEGMENT_SECTORS_MAX: Final = 0xFFFF  # what the field can say
_NO_LIST_ID: Final = 3
_USAGE_RESERVED: Final = 1
_ALLOCATION_LID1: Final = slice(10, 14)
_LIST_BYTES_MAX: Final = (
    limits.COPY_TARGET_DESCRIPTORS_MAX * _IDENTIFICATION_BYTES
    + limits.COPY_SEGMENT_DESCRIPTORS_MAX * _BLOCK_TO_BLOCK_BYTES
)
_PARAMETERS: Final = Struct(">IB3xHHIIIII2xHBBBB3xB")
_SNLID: Final = 0x01  # copies without a list identifier are possible
_STATUS: Final = Struct(">IBHBI")
_IN_PROGRESS, _COMPLETED, _FAILED = range(3)
_UNIT_BYTES: Final = 0x00


@dataclass(frozen=True, slots=True)
class _List:
    """The parts of a parameter list."""

    list_id: int | None  # None: the client does not want to ask for the outcome
    targets: bytes
    segments: bytes


def _parse(data: bytes) -> _List:
    """Split the list into its parts. Raises CheckCondition if its lengths do not match the data, or
    exceed the limits.
    """
    if len(data) < _HEAD.size:
        raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
    list_id, flags, target_bytes, segment_bytes, inline_bytes = _HEAD.unpack_from(data)
    if (
        target_bytes + segment_bytes > _LIST_BYTES_MAX
        or _HEAD.size + target_bytes + segment_bytes > len(data)
    ):
        raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
    if inline_bytes:
        raise CheckCondition(sense.INLINE_DATA_LENGTH_EXCEEDED)
    use = flags >> 3 & 3
    if use == _USAGE_RESERVED:
        raise CheckCondition(sense.invalid_field_in_parameter_list(1, 4))
    if use == _NO_LIST_ID and list_id:
        raise CheckCondition(sense.invalid_field_in_parameter_list(0))
    segments_at = _HEAD.size + target_bytes
    return _List(
        None if use == _NO_LIST_ID else list_id,
        data[_HEAD.size : segments_at],
        data[segments_at : segments_at + segment_bytes],
    )


def _check_targets(targets: bytes) -> None:
    """Check the types first, because a type determines the length, then the number."""
    for at in range(0, len(targets), _IDENTIFICATION_BYTES):
        if targets[at] != _IDENTIFICATION:
            raise CheckCondition(sense.UNSUPPORTED_TARGET_DESCRIPTOR)
    if len(targets) % _IDENTIFICATION_BYTES:
        raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
    if len(targets) // _IDENTIFICATION_BYTES > limits.COPY_TARGET_DESCRIPTORS_MAX:
        raise CheckCondition(sense.TOO_MANY_TARGET_DESCRIPTORS)


def _check_segments(segments: bytes) -> None:
    for at in range(0, len(segments), _BLOCK_TO_BLOCK_BYTES):
        if segments[at] != _BLOCK_TO_BLOCK:
            raise CheckCondition(sense.UNSUPPORTED_SEGMENT_DESCRIPTOR)
    if len(segments) % _BLOCK_TO_BLOCK_BYTES:
        raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
    if len(segments) // _BLOCK_TO_BLOCK_BYTES > limits.COPY_SEGMENT_DESCRIPTORS_MAX:
        raise CheckCondition(sense.TOO_MANY_SEGMENT_DESCRIPTORS)


def _find_unit(nexus: Nexus, descriptor: bytes, at: int) -> LogicalUnit:
    """The unit of this nexus that an identification descriptor names. ``at`` is where it stands in
    the list.
    """
    if descriptor[1] & 0x1F:
        # Not a direct access block device.
        raise CheckCondition(sense.invalid_field_in_parameter_list(at + 1, 4))
    if int.from_bytes(descriptor[29:32], "big") != SECTOR_BYTES:
        raise CheckCondition(sense.invalid_field_in_parameter_list(at + 29))
    code_set, kind, size = descriptor[4] & 0x0F, descriptor[5] & 0x3F, descriptor[7]
    if size > _DESIGNATOR_BYTES_MAX:
        raise CheckCondition(sense.invalid_field_in_parameter_list(at + 7))
    for mapped in nexus.units.values():
        if is_designated(mapped.unit, code_set, kind, descriptor[8 : 8 + size]):
            return mapped.unit
    raise CheckCondition(sense.COPY_TARGET_NOT_REACHABLE)


def _units(nexus: Nexus, targets: bytes) -> list[LogicalUnit]:
    return [
        _find_unit(nexus, targets[at : at + _IDENTIFICATION_BYTES], _HEAD.size + at)
        for at in range(0, len(targets), _IDENTIFICATION_BYTES)
    ]


def _check_access(nexus: Nexus, unit: LogicalUnit, writes: bool) -> None:
    """Refuse a copy where a READ or WRITE of this nexus would be refused (SPC-4 5.17.3)."""
    if unit.reservations.forbids(nexus.id, writes):
        raise ReservationConflict
    if not unit.started or unit.sanitization is not None:
        raise CheckCondition(sense.COPY_TARGET_NOT_REACHABLE)
    if writes and unit.write_protected:
        raise CheckCondition(sense.WRITE_PROTECTED)


def _segment(nexus: Nexus, units: list[LogicalUnit], descriptor: bytes) -> Segment:
    """One segment with both of its ranges checked."""
    _, _, length, source_index, destination_index, sectors, source_lba, lba = _SEGMENT.unpack(
        descriptor
    )
    if length != _BLOCK_TO_BLOCK_BYTES - 4:
        raise CheckCondition(sense.copy_segment_fault(_LENGTH_AT))
    for index in (source_index, destination_index):
        if index >= len(units):
            raise CheckCondition(sense.COPY_TARGET_NOT_REACHABLE)
    source, destination = units[source_index], units[destination_index]
    _check_access(nexus, source, writes=False)
    _check_access(nexus, destination, writes=True)
    if source_lba + sectors > source.sectors:
        raise CheckCondition(sense.copy_segment_fault(_SOURCE_LBA_AT))
    if lba + sectors > destination.sectors:
        raise CheckCondition(sense.copy_segment_fault(_DESTINATION_LBA_AT))
    return Segment(
        source,
        source_lba << SECTOR_SHIFT,
        destination,
        lba << SECTOR_SHIFT,
        sectors << SECTOR_SHIFT,
    )


def _begin(request: Request, data: bytes, done: Completion) -> None:
    """Check everything, then start. Raises ScsiError; nothing was copied then."""
    wanted, nexus = _parse(data), request.nexus
    _check_targets(wanted.targets)
    _check_segments(wanted.segments)
    known = None if wanted.list_id is None else nexus.copies.get(wanted.list_id)
    if known is not None and known.running:
        raise CheckCondition(sense.OPERATION_IN_PROGRESS)
    for unit in {mapped.unit for mapped in nexus.units.values()}:
        unit.refresh_capacity()
    units = _units(nexus, wanted.targets)
    segments = [
        _segment(nexus, units, wanted.segments[at : at + _BLOCK_TO_BLOCK_BYTES])
        for at in range(0, len(wanted.segments), _BLOCK_TO_BLOCK_BYTES)
    ]
    progress = CopyProgress()
    if wanted.list_id is not None:
        nexus.copies[wanted.list_id] = progress
    CopyJob(segments, progress, done).run()


def extended_copy(request: Request) -> Plan:
    """EXTENDED COPY(LID1). It does not count as a change of the unit that receives it: its writes
    pass the gates of the units that they change.
    """
    list_bytes = int.from_bytes(request.cdb[_ALLOCATION_LID1], "big")
    if list_bytes == 0:
        return NO_DATA  # SPC-4 6.4.2: no error, and nothing to do
    if not _HEAD.size <= list_bytes <= _HEAD.size + _LIST_BYTES_MAX:
        raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)

    def start(data: Buffer, done: Completion) -> None:
        try:
            _begin(request, bytes(data), done)
        except ScsiError as error:
            done(error)

    return Operation(list_bytes, start, writing=False)


def copy_status(request: Request) -> Plan:
    """RECEIVE COPY RESULTS, COPY STATUS: how far a copy is. The outcome of a copy that has ended is
    reported once (SPC-4 6.18).
    """
    list_id = request.cdb[2]
    found = request.nexus.copies.get(list_id)
    if found is None:
        raise CheckCondition(sense.invalid_field_in_cdb(2))
    if not found.running:
        del request.nexus.copies[list_id]
    state = _IN_PROGRESS if found.running else _FAILED if found.failed else _COMPLETED
    body = _STATUS.pack(_STATUS.size - 4, state, found.segments, _UNIT_BYTES, found.copied_bytes)
    return cut(body, int.from_bytes(request.cdb[_ALLOCATION_LID1], "big"))


def operating_parameters(request: Request) -> Plan:
    """RECEIVE COPY RESULTS, OPERATING PARAMETERS: the limits that EXTENDED COPY has
    (SPC-4 6.21).
    """
    descriptors = bytes((_BLOCK_TO_BLOCK, _IDENTIFICATION))
    body = _PARAMETERS.pack(
        _PARAMETERS.size - 4 + len(descriptors),
        _SNLID,
        limits.COPY_TARGET_DESCRIPTORS_MAX,
        limits.COPY_SEGMENT_DESCRIPTORS_MAX,
        _LIST_BYTES_MAX,
        _SEGMENT_SECTORS_MAX * SECTOR_BYTES,
        0,
        0,
        0,
        0,
        limits.COPIES_CONCURRENT_MAX,
        SECTOR_SHIFT,
        0,
        0,
        len(descriptors),
    )
    return cut(body + descriptors, int.from_bytes(request.cdb[_ALLOCATION_LID1], "big"))


_REPORTS: Final[tuple[tuple[int, str, Callable[[Request], Plan]], ...]] = (
    (COPY_STATUS, "COPY STATUS", copy_status),
    (OPERATING_PARAMETERS, "OPERATING PARAMETERS", operating_parameters),
)
COMMANDS: Final = (
    Command(
        opcodes.EXTENDED_COPY,
        "EXTENDED COPY(LID1)",
        "1f0000000000000000ffffffff0000",
        extended_copy,
        service_action=0,
        reserved=True,
    ),
    *(
        Command(
            opcodes.RECEIVE_COPY_RESULTS,
            f"RECEIVE COPY RESULTS, {name}",
            "1fff00000000000000ffffffff0000",
            handler,
            service_action=action,
            despite_exclusion=True,
        )
        for action, name, handler in _REPORTS
    ),
)
