"""The data-out half of a task: immediate, unsolicited and solicited data (RFC 7143 4.2.5.2, 11.7,
11.8).

The data of a command are collected in its own buffer, in order (DataPDUInOrder and
DataSequenceInOrder are Yes). Data that are all immediate are passed on from the receive buffer
without a copy.
"""

from collections import deque

from protocol.iscsi import limits
from protocol.iscsi.errors import ProtocolError
from protocol.iscsi.pdu import FINAL, HEADER, R2T, RESERVED_TAG, Pdu
from protocol.iscsi.session import Session, Task
from protocol.scsi import sense
from protocol.scsi.logical_unit import LogicalUnit, UnitNexus
from protocol.scsi.plan import Operation
from protocol.scsi.sense import Sense
from protocol.scsi.task import TransportTask
from protocol.volume import Buffer


class WriteAllowance:
    """Bounds the memory that a session's solicited data take: a task that has no room for its
    buffer waits for its first R2T.

    Invariant: ``_reserved`` is the sum of the ``reserved_bytes`` of all tasks, each of which this
    watches.
    """

    __slots__ = ("_queue", "_reserved")

    def __init__(self) -> None:
        self._queue: deque[WriteTask] = deque()
        self._reserved = 0

    def solicit(self, task: "WriteTask") -> None:
        """Solicit a task's next burst, now or when there is room for its buffer."""
        if task.reserved_bytes == 0:
            total = task.total_bytes
            if self._reserved and self._reserved + total > limits.WRITE_BUFFER_BYTES:
                self._queue.append(task)
                return
            task.reserved_bytes = total
            self._reserved += total
            task.watchers = (*task.watchers, self)
        task.solicit()

    def task_ended(self, task: TransportTask) -> None:
        """A task that had room has ended: give its room to those that wait."""
        assert isinstance(task, WriteTask) and task.reserved_bytes
        self._reserved -= task.reserved_bytes
        task.reserved_bytes = 0
        while self._queue:
            following = self._queue[0]
            if (
                not following.aborted
                and self._reserved
                and self._reserved + following.total_bytes > limits.WRITE_BUFFER_BYTES
            ):
                return
            self._queue.popleft()
            if not following.aborted:
                self.solicit(following)


class GatedStart:
    """Starts a task when its logical unit's gate opens; watches the tasks that it waits for."""

    __slots__ = ("_data", "_task", "_unit")

    def __init__(self, task: "WriteTask", unit: LogicalUnit, data: Buffer) -> None:
        self._task = task
        self._unit = unit
        self._data = data

    def enter(self, exclusive: bool) -> None:
        """Queue at the gate. If it was open, count and watch the changes under way, of all
        sessions.
        """
        gate, under_way = self._unit.gate, list[TransportTask]()
        if not gate.closed:
            under_way = [task for task in self._unit.task_set() if task.busy and task.changes]
        for task in under_way:
            task.watchers = (*task.watchers, self)
        gate.enter(self._begin, exclusive, len(under_way))

    def task_ended(self, task: TransportTask) -> None:
        """A change that the gate counts has ended."""
        self._unit.gate.leave()

    def _begin(self) -> None:
        task, sanitization = self._task, self._unit.sanitization
        if task.aborted:
            self._unit.gate.leave()
            return
        task.watchers = (*task.watchers, self)
        if sanitization is not None and not (sanitization.failed and task.detached):
            # It began while this command waited: nothing may be written any more.
            task.refuse(sanitization.cause())
            return
        task.start(self._data)
        self._unit.volume.settle()  # the turn may have come in another session's wake-up


class WriteTask(Task):
    """A command that takes data from the client and then starts its operation."""

    __slots__ = (
        "_allowance",
        "_burst_end",
        "_data_sn",
        "_operation",
        "_received",
        "_solicited",
        "_total",
        "_ttt",
        "buffer",
        "collecting",
        "r2t_count",
        "raw_lun",
        "reserved_bytes",
    )

    def __init__(
        self,
        session: Session,
        allowance: WriteAllowance,
        pdu: Pdu,
        mapped: UnitNexus | None,
        operation: Operation,
        announced: int,
    ) -> None:
        super().__init__(session, pdu.itt, mapped, pdu.expected_length, pdu.immediate)
        self.wanted_bytes = operation.data_bytes
        self.raw_lun = pdu.lun
        self.buffer = bytearray()
        self.collecting = True  # until all data have come; later PDUs are dropped
        self.r2t_count = 0
        self.reserved_bytes = 0  # of the session's allowance
        self._allowance = allowance
        self._operation = operation
        self.changes = operation.writing
        self._total = min(announced, operation.data_bytes)
        self._received = 0
        self._burst_end = 0
        self._data_sn = 0
        self._ttt = RESERVED_TAG
        self._solicited = False

    @property
    def total_bytes(self) -> int:
        """Size of the buffer once data are solicited."""
        return self._total

    @property
    def detached(self) -> bool:
        """True for a sanitize operation, which outlives its command."""
        return self._operation.detached

    def begin(self, pdu: Pdu) -> None:
        """Take the command's immediate data; run, wait for unsolicited data, or solicit."""
        size = len(pdu.data)
        if size >= self._total:
            data = pdu.data[: self._total]
            self._run(bytearray(data) if self._operation.needs_owned_data else data)
            return
        self.buffer = bytearray(min(self._total, self.session.parameters.unsolicited_bytes))
        self.buffer[:size] = pdu.data
        self._received = size
        if pdu.flags & FINAL:
            self._allowance.solicit(self)

    def take(self, pdu: Pdu) -> None:
        """Take one Data-Out PDU. A PDU out of sequence ends the task with the sense data of RFC
        7143 11.4.7.2.
        """
        if pdu.ttt != self._ttt:
            self._out_of_sequence(pdu)
            return
        size, offset = len(pdu.data), pdu.buffer_offset
        if (
            pdu.data_sn != self._data_sn
            or offset != self._received
            or (size == 0 and not pdu.flags & FINAL)
        ):
            self.end(self.r2t_count, sense.PROTOCOL_SERVICE_CRC_ERROR, moved=self._received)
            return
        limit = (
            self._burst_end
            if self._solicited
            else min(self.expected_bytes, self.session.parameters.unsolicited_bytes)
        )
        if offset + size > limit:
            self.end(self.r2t_count, sense.INCORRECT_AMOUNT_OF_DATA, moved=self._received)
            return
        # The PDU may announce more than the CDB wants.
        usable = max(0, min(size, self._total - offset))
        self.buffer[offset : offset + usable] = pdu.data[:usable]
        self._received = offset + size
        self._data_sn += 1
        if pdu.flags & FINAL:
            self._sequence_ended()

    def _out_of_sequence(self, pdu: Pdu) -> None:
        if self._solicited or self._ttt != RESERVED_TAG:
            raise ProtocolError(
                f"a Data-Out with transfer tag {pdu.ttt:#x}, {self._ttt:#x} was given"
            )
        self.end(self.r2t_count, sense.UNEXPECTED_UNSOLICITED_DATA, moved=self._received)

    def _sequence_ended(self) -> None:
        if self._solicited and self._received != self._burst_end:
            self.end(self.r2t_count, sense.INCORRECT_AMOUNT_OF_DATA, moved=self._received)
        elif self._received >= self._total:
            self._run(self.buffer)
        else:
            self._allowance.solicit(self)

    def solicit(self) -> None:
        """Send one R2T for the next burst."""
        session = self.session
        size = min(session.parameters.max_burst_bytes, self._total - self._received)
        # Only now, so that a waiting task holds memory only for what it has received.
        if len(self.buffer) < self._total:
            whole = bytearray(self._total)
            whole[: self._received] = memoryview(self.buffer)[: self._received]
            self.buffer = whole
        self._ttt = ttt = session.take_transfer_tag()
        self._solicited = True
        self._data_sn = 0
        self._burst_end = self._received + size
        session.sender.put(
            HEADER.pack(
                R2T,
                FINAL,
                0,
                0,
                0,
                self.raw_lun,
                self.itt,
                ttt,
                session.stat_sn,
                session.exp_cmd_sn,
                session.max_cmd_sn,
                self.r2t_count,
                self._received,
                size,
            )
        )
        self.r2t_count += 1

    def data_digest_failed(self) -> None:
        """A Data-Out of this task was discarded: without recovery the task ends (RFC 7143 7.8)."""
        self.end(self.r2t_count, sense.PROTOCOL_SERVICE_CRC_ERROR, moved=self._received)

    def _run(self, data: Buffer) -> None:
        """Start the operation, or let the gate of the logical unit start it."""
        self.collecting = False
        self._received = len(data)
        mapped = self.mapped
        if (
            mapped is not None
            and self.changes
            and (self._operation.exclusive or mapped.unit.gate.closed)
        ):
            GatedStart(
                self, mapped.unit, bytearray(data) if isinstance(data, memoryview) else data
            ).enter(self._operation.exclusive)
        else:
            self.start(data)
            self.session.touch(mapped)

    def start(self, data: Buffer) -> None:
        """Hand over to the operation; `_done` follows, perhaps before this returns."""
        self.busy = not self._operation.detached
        self._operation.start(data, self._done)

    def refuse(self, cause: Sense) -> None:
        """End without having started."""
        self.end(self.r2t_count, cause)
        self.session.sender.wake()

    def _done(self, error: Exception | None) -> None:
        if self.end_if_aborted():
            return
        if error is None:
            self.end(self.r2t_count)
        else:
            self.fail(error, self._operation.writing, self.r2t_count)
        self.session.sender.wake()
