"""The hot path: plain READ and WRITE commands, straight from the receive buffer to the volume and
back.

`run` takes PDUs from the front of the receive buffer as long as each is a READ(10), READ(16),
WRITE(10) or WRITE(16) that asks for nothing special, and stops before the first that is not; that
one goes the general way (`FullFeature.handle`), which gives byte-identical answers for all of them.
Nothing here checks less: a PDU is taken only if every field is what the general way would accept
without a word.

Measured rules: one unpack for the whole header; ints in locals; attributes with slots; no object
for a read; a pooled one for a write; no call that does not earn its 50 ns.
"""

from struct import Struct
from typing import TYPE_CHECKING, Final

from protocol.iscsi import limits
from protocol.iscsi.framing import ReceiveBuffer
from protocol.iscsi.pdu import (
    DATA_IN,
    FINAL,
    HEADER,
    HEADER_BYTES,
    READ,
    RESERVED_TAG,
    SCSI_COMMAND,
    SCSI_RESPONSE,
    SERIAL_MASK,
    SIMPLE,
    STATUS_PRESENT,
    WRITE,
)
from protocol.iscsi.task import Task
from protocol.scsi import opcodes
from protocol.scsi.limits import SECTOR_SHIFT

if TYPE_CHECKING:
    from protocol.iscsi.full_feature import FullFeature

# opcode, flags, reserved, lengths, LUN, task tag, expected length, CmdSN, ExpStatSN, and the CDB as
# READ(10) reads it: operation code, flags, LBA, group, sectors, control, six bytes that must be
# zero or belong to a 16-byte CDB.
_COMMAND_10: Final = Struct(">BBHIQIIIIBBIBHB6x")
# READ(16) from byte 34 on: LBA, sectors, group, control.
_CDB_16: Final = Struct(">QIBB")
_CDB_16_AT: Final = 34
# What the header's flags must be: final, one direction; the attribute says how commands may be
# ordered, and is looked at here only to leave all but simple and untagged ones to the general way.
_READ_FLAGS: Final = frozenset((FINAL | READ | SIMPLE, FINAL | READ))
_WRITE_FLAGS: Final = frozenset((FINAL | WRITE | SIMPLE, FINAL | WRITE))
_READS: Final = frozenset((opcodes.READ_10, opcodes.READ_16))
_WRITES: Final = frozenset((opcodes.WRITE_10, opcodes.WRITE_16))
_SIXTEEN: Final = frozenset((opcodes.READ_16, opcodes.WRITE_16))
_GROUP_MAX: Final = 0x3F
_FUA: Final = 0x08
_CDB_FLAGS_OTHER: Final = 0xFF & ~0x18  # all but DPO and FUA
_DATA_IN_FLAGS: Final = FINAL | STATUS_PRESENT
_PACK: Final = HEADER.pack
# HEADER of a Data-In that answers a whole READ: LUN, DataSN, buffer offset and residual are zero.
_READ_ANSWER: Final = Struct(">BB2xI8xIIIII12x")
assert _READ_ANSWER.size == HEADER.size


class FastWrite(Task):
    """A write on the hot path. Pooled: ``done`` is bound once for life."""

    __slots__ = ("done",)

    def __init__(self, phase: "FullFeature") -> None:
        super().__init__(phase, RESERVED_TAG, None, 0, False)
        self.done = self._done
        self.changes = True

    def _done(self, error: Exception | None) -> None:
        phase = self.phase
        if error is not None or self.aborted or self.watchers:
            self._done_otherwise(error)
            return
        itt = self.itt
        del phase.tasks[itt]
        phase.max_cmd_sn = max_cmd_sn = (phase.max_cmd_sn + 1) & SERIAL_MASK
        stat_sn = phase.stat_sn
        phase.stat_sn = (stat_sn + 1) & SERIAL_MASK
        phase.sender.pending.append(
            _PACK(
                SCSI_RESPONSE,
                FINAL,
                0,
                0,
                0,
                0,
                itt,
                0,
                stat_sn,
                phase.exp_cmd_sn,
                max_cmd_sn,
                0,
                0,
                0,
            )
        )
        self.busy = False
        phase.free_writes.append(self)
        phase.wake()

    def _done_otherwise(self, error: Exception | None) -> None:
        """Failed or aborted: the general way to end a task. This object is not used again, for
        others may hold it.
        """
        phase = self.phase
        if not self.let_go():
            if error is None:
                self.end()
            else:
                self.fail(error, True)
            phase.wake()
        self.retire()

    def retire(self) -> None:
        """Not used again: ``done`` holds this object, and this object the unit and its volume."""
        self.mapped = None
        del self.done


def eligible(phase: "FullFeature") -> bool:
    """Whether a session can use the hot path at all: a normal session without digests."""
    parameters = phase.parameters
    return not (phase.discovery or parameters.header_digest or parameters.data_digest)


def run(phase: "FullFeature", receive: ReceiveBuffer) -> None:
    """Carry out plain commands from ``receive.start`` on. Stops at anything else, and when enough
    output has gathered.
    """
    storage, position, end = receive.storage, receive.start, receive.end
    last_header = end - HEADER_BYTES
    units, tasks, sender, free_writes = phase.units, phase.tasks, phase.sender, phase.free_writes
    read_max, write_max = phase.fast_read_max, phase.fast_write_max
    unpack, pack = _COMMAND_10.unpack_from, _READ_ANSWER.pack
    first_cmd_sn, read_bytes, write_bytes = phase.exp_cmd_sn, 0, 0
    touched = None
    while position <= last_header:
        (
            opcode, flags, _, lengths, lun, itt, expected, cmd_sn, _, operation, cdb_flags, lba,
            group, sectors, control,
        ) = unpack(storage, position)  # fmt: skip
        if opcode != SCSI_COMMAND or cmd_sn != phase.exp_cmd_sn or itt == RESERVED_TAG:
            break
        if operation in _SIXTEEN:
            lba, sectors, group, control = _CDB_16.unpack_from(storage, position + _CDB_16_AT)
        length = sectors << SECTOR_SHIFT
        mapped = units.get(lun)
        odd = cdb_flags & _CDB_FLAGS_OTHER or group > _GROUP_MAX or control
        if odd or length != expected or not length or mapped is None:
            break
        unit = mapped.unit
        offset = lba << SECTOR_SHIFT
        refused = itt in tasks or len(tasks) >= limits.COMMAND_WINDOW
        if refused or offset + length > unit.capacity_bytes:
            break
        if operation in _READS:
            if flags not in _READ_FLAGS or lengths or length > read_max or not mapped.plain_read:
                break
            try:
                data = unit.volume.try_read(offset, length)
            except Exception:  # noqa: BLE001 - the general way meets it too, and makes sense data
                break
            if data is None:
                break
            position += HEADER_BYTES
            phase.exp_cmd_sn = exp_cmd_sn = (cmd_sn + 1) & SERIAL_MASK
            phase.max_cmd_sn = max_cmd_sn = (phase.max_cmd_sn + 1) & SERIAL_MASK
            stat_sn = phase.stat_sn
            phase.stat_sn = (stat_sn + 1) & SERIAL_MASK
            pending = sender.pending
            answer = pack(
                DATA_IN, _DATA_IN_FLAGS, length, itt, RESERVED_TAG, stat_sn, exp_cmd_sn, max_cmd_sn
            )
            pending.append(answer)
            pending.append(data)
            read_bytes += length
            if read_bytes >= limits.OUTPUT_BYTES_HIGH:
                break
            continue
        data_at = position + HEADER_BYTES
        too_long = lengths != length or length > write_max or data_at + length > end
        if too_long or operation not in _WRITES or flags not in _WRITE_FLAGS:
            break
        if not mapped.plain_write:
            break
        position = data_at + length
        phase.exp_cmd_sn = (cmd_sn + 1) & SERIAL_MASK
        task = free_writes.pop() if free_writes else FastWrite(phase)
        task.itt = itt
        task.mapped = mapped
        task.expected_bytes = task.wanted_bytes = length
        task.busy = True
        tasks[itt] = task
        if mapped is not touched:
            phase.touch(mapped)
            touched = mapped
        unit.volume.write(offset, receive.view[data_at:position], cdb_flags & _FUA != 0, task.done)
        write_bytes += length
    receive.start = position
    sender.pending_bytes += read_bytes
    phase.commands += (phase.exp_cmd_sn - first_cmd_sn) & SERIAL_MASK
    phase.read_bytes += read_bytes
    phase.write_bytes += write_bytes
