"""The hot path: plain READ and WRITE commands, straight from the receive buffer to the volume and
back.

`FastPath.run` takes PDUs from the front of the receive buffer as long as each is a READ(10),
READ(16), WRITE(10) or WRITE(16) that asks for nothing special, and stops before the first that is
not; that one goes the general way (`FullFeaturePhase.handle`), which gives byte-identical answers
for all of them. Nothing here checks less: a PDU is taken only if every field is what the general
way would accept as it is.

Measured rules: one unpack for the whole header; ints in locals; attributes with slots; no object
for a read; a pooled one for a write; no call that does not earn its 50 ns. So these are inlined:
`Session.accept`, `begin`, `task_ended`, `open_window`, `take_stat_sn` and `respond`, `DataIn.emit`
and `Sender.put`. tests/protocol/test_fast_path.py compares both ways, bytes and numbers.
"""

from struct import Struct
from typing import Final

from protocol.iscsi.framing import ReceiveBuffer
from protocol.iscsi.limits import COMMAND_WINDOW, OUTPUT_BYTES_HIGH
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
from protocol.iscsi.session import Session, Task
from protocol.scsi import opcodes
from protocol.scsi.limits import SECTOR_SHIFT

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
_PACK: Final = HEADER.pack
# HEADER of a Data-In that answers a whole READ: opcode and flags as one number; LUN, DataSN, buffer
# offset and residual are zero.
_READ_ANSWER: Final = Struct(">H2xI8xIIIII12x")
_ANSWER: Final = DATA_IN << 8 | FINAL | STATUS_PRESENT
assert _READ_ANSWER.size == HEADER.size


class FastWrite(Task):
    """A write on the hot path. Pooled in ``free``: ``done`` is bound once for life, and ``busy`` is
    True all the time, for it is in the session's table only while a volume holds it.
    """

    __slots__ = ("_free", "done")

    def __init__(self, session: Session, free: "list[FastWrite]") -> None:
        super().__init__(session, RESERVED_TAG, None, 0, False)
        self._free = free
        self.done = self._done
        self.busy = self.changes = True

    def _done(self, error: Exception | None) -> None:
        if error is not None or self.aborted or self.watchers:
            self._done_otherwise(error)
            return
        session = self.session
        itt = self.itt
        del session.tasks[itt]
        session.max_cmd_sn = max_cmd_sn = (session.max_cmd_sn + 1) & SERIAL_MASK
        stat_sn = session.stat_sn
        session.stat_sn = (stat_sn + 1) & SERIAL_MASK
        sender = session.sender
        sender.pending.append(
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
                session.exp_cmd_sn,
                max_cmd_sn,
                0,
                0,
                0,
            )
        )
        self._free.append(self)
        sender.wake()

    def _done_otherwise(self, error: Exception | None) -> None:
        """Failed, aborted or watched: the general way to end a task. This object is not used again,
        for others may refer to it.
        """
        if not self.end_if_aborted():
            if error is None:
                self.end()
            else:
                self.fail(error, True)
            self.session.sender.wake()
        self.retire()

    def retire(self) -> None:
        """Not used again: ``done`` holds this object, and this object the unit and its volume."""
        self.mapped = None
        del self.done


def is_eligible(session: Session) -> bool:
    """Whether a session can use the hot path at all: a normal session without digests."""
    parameters = session.parameters
    return not (session.discovery or parameters.header_digest or parameters.data_digest)


class FastPath:
    """The hot path of one session, with its pool of `FastWrite`."""

    __slots__ = ("_session", "_write_max", "free_writes")

    def __init__(self, session: Session) -> None:
        parameters = session.parameters
        self._session = session
        self._write_max = parameters.unsolicited_bytes if parameters.immediate_data else 0
        self.free_writes: list[FastWrite] = []

    def run(self, receive: ReceiveBuffer) -> None:
        """Carry out plain commands from ``receive.start`` on. Stops at anything else, and when
        enough output has gathered.
        """
        session, free_writes, write_max = self._session, self.free_writes, self._write_max
        storage, position, end = receive.storage, receive.start, receive.end
        last_header = end - HEADER_BYTES
        units, tasks, append = session.units, session.tasks, session.sender.pending.append
        read_max, exp_cmd_sn = session.single_data_in_bytes, session.exp_cmd_sn
        unpack, pack = _COMMAND_10.unpack_from, _READ_ANSWER.pack
        first_cmd_sn, read_bytes, write_bytes = exp_cmd_sn, 0, 0
        touched = None
        while position <= last_header:
            (
                opcode, flags, _, lengths, lun, itt, expected, cmd_sn, _, operation, cdb_flags, lba,
                group, sectors, control,
            ) = unpack(storage, position)  # fmt: skip
            if opcode != SCSI_COMMAND or cmd_sn != exp_cmd_sn or itt == RESERVED_TAG:
                break
            if operation in _SIXTEEN:
                lba, sectors, group, control = _CDB_16.unpack_from(storage, position + _CDB_16_AT)
            length, offset = sectors << SECTOR_SHIFT, lba << SECTOR_SHIFT
            mapped = units.get(lun)
            if length != expected or not length or mapped is None or itt in tasks:
                break
            unit = mapped.unit
            odd = cdb_flags & _CDB_FLAGS_OTHER or group > _GROUP_MAX or control
            if odd or len(tasks) >= COMMAND_WINDOW or offset + length > unit.capacity_bytes:
                break
            if operation in _READS:
                if flags not in _READ_FLAGS or lengths or length > read_max:
                    break
                try:
                    data = unit.volume.try_read(offset, length) if mapped.plain_read else None
                except Exception:  # noqa: BLE001 - the general way meets it too, and makes sense data
                    break
                if data is None:
                    break
                position += HEADER_BYTES
                exp_cmd_sn = (cmd_sn + 1) & SERIAL_MASK
                session.max_cmd_sn = max_cmd_sn = (session.max_cmd_sn + 1) & SERIAL_MASK
                stat_sn = session.stat_sn
                session.stat_sn = (stat_sn + 1) & SERIAL_MASK
                append(pack(_ANSWER, length, itt, RESERVED_TAG, stat_sn, exp_cmd_sn, max_cmd_sn))
                append(data)
                read_bytes += length
                if read_bytes >= OUTPUT_BYTES_HIGH:
                    break
                continue
            data_at = position + HEADER_BYTES
            plain = operation in _WRITES and flags in _WRITE_FLAGS and mapped.plain_write
            if not plain or lengths != length or length > write_max or data_at + length > end:
                break
            position = data_at + length
            session.exp_cmd_sn = exp_cmd_sn = (cmd_sn + 1) & SERIAL_MASK
            task = free_writes.pop() if free_writes else FastWrite(session, free_writes)
            task.itt, task.mapped = itt, mapped
            task.expected_bytes = task.wanted_bytes = length
            tasks[itt] = task
            if mapped is not touched:
                session.touch(mapped)
                touched = mapped
            data = receive.view[data_at:position]
            unit.volume.write(offset, data, cdb_flags & _FUA != 0, task.done)
            write_bytes += length
        receive.start, session.exp_cmd_sn = position, exp_cmd_sn
        session.sender.pending_bytes += read_bytes
        session.commands += (exp_cmd_sn - first_cmd_sn) & SERIAL_MASK
        session.read_bytes += read_bytes
        session.write_bytes += write_bytes

    def retire(self) -> None:
        """Nothing can happen any more (`FastWrite.retire`)."""
        for write in self.free_writes:
            write.retire()
        self.free_writes.clear()
