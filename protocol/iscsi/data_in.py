"""The data-in half of a task: splitting what goes to the client into Data-In PDUs, at the client's
pace.

PDUs are at most the initiator's MaxRecvDataSegmentLength; a sequence ends (F bit) at each
MaxBurstLength; the last PDU carries the status when that is GOOD (phase collapse, RFC 7143 11.7.3).
Large reads are taken from the volume piece by piece, and stop while the client does not drain.
"""

from protocol.iscsi.limits import READ_PIECE_BYTES
from protocol.iscsi.pdu import DATA_IN, FINAL, HEADER, READ, RESERVED_TAG, STATUS_PRESENT
from protocol.iscsi.session import Session, Task, residual_flags
from protocol.scsi.plan import Query, ReadExtent
from protocol.volume import BlockVolume, Buffer

_HEADER_PACK = HEADER.pack


class DataIn:
    """Emits the bytes of one task in order; ``position`` is the next buffer offset, ``data_sn`` the
    next DataSN.
    """

    __slots__ = ("burst_left", "data_sn", "position", "session", "task", "total")

    def __init__(self, session: Session, task: Task, total: int) -> None:
        self.session = session
        self.task = task
        self.total = total
        self.position = 0
        self.data_sn = 0
        self.burst_left = session.parameters.max_burst_bytes

    def emit(self, data: Buffer) -> None:
        """Send ``data`` at the current position; with the last of ``total`` the status goes too and
        the task ends.
        """
        segment_max = self.session.parameters.peer_data_segment_bytes
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
        session, task = self.session, self.task
        offset, data_sn = self.position, self.data_sn
        self.position = offset + size
        self.data_sn = data_sn + 1
        stat_sn = flags = residual = 0
        if self.position == self.total:
            if task.expected_bytes != task.wanted_bytes:
                flags, residual = residual_flags(task.expected_bytes, task.wanted_bytes)
            flags |= FINAL | STATUS_PRESENT
            session.task_ended(task)
            stat_sn = session.take_stat_sn()
        else:
            self.burst_left -= size
            if self.burst_left == 0:
                flags = FINAL
                self.burst_left = session.parameters.max_burst_bytes
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
            session.exp_cmd_sn,
            session.max_cmd_sn,
            data_sn,
            offset,
            residual,
        )
        session.sender.put(header, data)


def send_reply(task: Task, data: bytes, flags: int) -> None:
    """Answer a command with ``data``, as far as its PDU announces a read of them."""
    task.wanted_bytes = len(data)
    size = min(len(data), task.expected_bytes) if flags & READ else 0
    if size == 0:
        task.end()
    else:
        DataIn(task.session, task, size).emit(data[:size])


class QueryAnswer:
    """Waits for the data of a `Query` and sends them."""

    __slots__ = ("_flags", "_task")

    def __init__(self, task: Task, flags: int) -> None:
        self._task = task
        self._flags = flags

    def start(self, query: Query) -> None:
        """Start the query."""
        self._task.busy = True
        query.start(self._answered)

    def _answered(self, data: bytes | None, error: Exception | None) -> None:
        task = self._task
        if task.end_if_aborted():
            return
        if error is not None or data is None:
            task.fail(error or OSError("no data"), False, moved=0)
        else:
            send_reply(task, data, self._flags)
        task.session.sender.wake()


def send_extent(task: Task, extent: ReadExtent, flags: int) -> None:
    """Answer a read with what the volume holds, as far as the command's PDU announces a read."""
    assert task.mapped is not None
    task.wanted_bytes = extent.length_bytes
    size = min(extent.length_bytes, task.expected_bytes) if flags & READ else 0
    if size == 0:
        task.end()
        return
    task.session.read_bytes += size
    ReadStream(task, task.mapped.unit.volume, extent.offset_bytes, size).pump()


class ReadStream:
    """A read of a volume extent, piece by piece: ``pump`` goes on until the end, a miss, or a
    client that does not drain.
    """

    __slots__ = ("_offset", "_out", "_task", "_volume")

    def __init__(self, task: Task, volume: BlockVolume, offset_bytes: int, total: int) -> None:
        self._task = task
        self._volume = volume
        self._offset = offset_bytes
        self._out = DataIn(task.session, task, total)

    def pump(self) -> None:
        """Emit what can be had without waiting."""
        out, task = self._out, self._task
        sender = out.session.sender
        while out.position < out.total:
            if task.aborted:
                return
            if not sender.may_send():
                sender.stall(self.pump)
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
        if task.end_if_aborted():
            return
        if error is not None or data is None:
            task.fail(error or OSError("no data"), False, out.data_sn, out.position)
        else:
            out.emit(data)
            self.pump()
        out.session.sender.wake()
