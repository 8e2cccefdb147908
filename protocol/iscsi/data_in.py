"""The data-in half of a task: splitting what goes to the client into Data-In PDUs, at the client's
pace.

PDUs are at most the initiator's MaxRecvDataSegmentLength; a sequence ends (F bit) at each
MaxBurstLength; the last PDU carries the status when that is GOOD (phase collapse, RFC 7143 11.7.3).
Large reads are taken from the volume piece by piece, and stop while the client does not drain.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.iscsi.limits import READ_PIECE_BYTES
from protocol.iscsi.pdu import (
    DATA_IN,
    FINAL,
    HEADER,
    OVERFLOW,
    RESERVED_TAG,
    SERIAL_MASK,
    STATUS_PRESENT,
    UNDERFLOW,
)
from protocol.iscsi.task import Task
from protocol.scsi.plan import Query
from protocol.volume import BlockVolume, Buffer

if TYPE_CHECKING:
    from protocol.iscsi.full_feature import FullFeature

_HEADER_PACK = HEADER.pack


def residual_flags(expected: int, wanted: int) -> tuple[int, int]:
    """Overflow or underflow bit, and the residual count (RFC 7143 11.4.5)."""
    if expected == wanted:
        return 0, 0
    return (OVERFLOW, wanted - expected) if wanted > expected else (UNDERFLOW, expected - wanted)


class DataIn:
    """Emits the bytes of one task in order; ``position`` is the next buffer offset, ``data_sn`` the
    next DataSN.
    """

    __slots__ = ("burst_left", "data_sn", "phase", "position", "task", "total")

    def __init__(self, phase: "FullFeature", task: Task, total: int) -> None:
        self.phase = phase
        self.task = task
        self.total = total
        self.position = 0
        self.data_sn = 0
        self.burst_left = phase.parameters.max_burst_bytes

    def emit(self, data: Buffer) -> None:
        """Send ``data`` at the current position; with the last of ``total`` the status goes too and
        the task ends.
        """
        segment_max = self.phase.parameters.peer_data_segment_bytes
        size = len(data)
        if size <= segment_max and size <= self.burst_left:
            self._emit_one(data, size)
            return
        view = memoryview(data)
        while size:
            step = min(segment_max, self.burst_left, size)
            self._emit_one(view[:step], step)
            view = view[step:]
            size -= step

    def _emit_one(self, data: Buffer, size: int) -> None:
        phase, task = self.phase, self.task
        offset, data_sn = self.position, self.data_sn
        self.position = offset + size
        self.data_sn = data_sn + 1
        if self.position == self.total:
            flags, residual = residual_flags(task.expected_bytes, task.wanted_bytes)
            phase.task_ended(task)
            stat_sn = phase.stat_sn
            phase.stat_sn = (stat_sn + 1) & SERIAL_MASK
            flags |= FINAL | STATUS_PRESENT
        else:
            self.burst_left -= size
            stat_sn = flags = residual = 0
            if self.burst_left == 0:
                flags = FINAL
                self.burst_left = phase.parameters.max_burst_bytes
        header = _HEADER_PACK(
            DATA_IN,
            flags,
            0,
            0,
            size,
            0,
            task.itt,
            RESERVED_TAG,
            stat_sn,
            phase.exp_cmd_sn,
            phase.max_cmd_sn,
            data_sn,
            offset,
            residual,
        )
        phase.sender.put(header, data)


class QueryAnswer:
    """Waits for the data of a `Query` and sends them."""

    __slots__ = ("_flags", "_send_reply", "_task")

    def __init__(
        self, task: Task, flags: int, send_reply: Callable[[Task, bytes, int], None]
    ) -> None:
        self._task = task
        self._flags = flags
        self._send_reply = send_reply

    def start(self, query: Query) -> None:
        """Ask."""
        self._task.busy = True
        query.start(self._answered)

    def _answered(self, data: bytes | None, error: Exception | None) -> None:
        task = self._task
        if task.let_go():
            return
        if error is not None or data is None:
            task.fail(error or OSError("no data"), False, moved=0)
        else:
            self._send_reply(task, data, self._flags)
        task.phase.wake()


class ReadStream:
    """A read of a volume extent, piece by piece: ``pump`` goes on until the end, a miss, or a
    client that does not drain.
    """

    __slots__ = ("_offset", "_out", "_task", "_volume")

    def __init__(self, task: Task, volume: BlockVolume, offset_bytes: int, total: int) -> None:
        self._task = task
        self._volume = volume
        self._offset = offset_bytes
        self._out = DataIn(task.phase, task, total)

    def pump(self) -> None:
        """Emit what is at hand."""
        out, task = self._out, self._task
        while out.position < out.total:
            if task.aborted:
                return
            if not task.phase.may_send(self):
                return
            offset, size = (
                self._offset + out.position,
                min(READ_PIECE_BYTES, out.total - out.position),
            )
            try:
                data = self._volume.try_read(offset, size)
            except Exception as error:  # noqa: BLE001 - whatever the volume raises carries an errno, from which sense data are made
                task.fail(error, False, out.data_sn, out.position)
                return
            if data is None:
                task.busy = True
                self._volume.read(offset, size, self._arrived)
                return
            out.emit(data)

    def _arrived(self, data: Buffer | None, error: Exception | None) -> None:
        task, out = self._task, self._out
        if task.let_go():
            return
        if error is not None or data is None:
            task.fail(error or OSError("no data"), False, out.data_sn, out.position)
        else:
            out.emit(data)
            self.pump()
        task.phase.wake()
