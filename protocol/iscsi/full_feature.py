"""The full feature phase of a target connection: sequence numbers, the task table, and one handler
for each PDU.

Invariants. ``exp_cmd_sn`` goes up by one for each non-immediate request, in order, and never back.
``max_cmd_sn`` goes up by one for each of them that has ended: the window is COMMAND_WINDOW less
what is under way. ``stat_sn`` is the StatSN of the next response. ``tasks`` holds every SCSI
command from its PDU until it can no longer touch a volume.
"""

from collections import deque
from collections.abc import Callable
from typing import ClassVar, Final

from protocol.iscsi import announced, fast_path, limits
from protocol.iscsi.data_in import DataIn, QueryAnswer, ReadStream, residual_flags
from protocol.iscsi.data_out import WriteTask
from protocol.iscsi.errors import ProtocolError
from protocol.iscsi.framing import Sender
from protocol.iscsi.keys import Parameters
from protocol.iscsi.login import LoginResult
from protocol.iscsi.pdu import (
    ASYNC_LOGOUT_REQUESTED,
    ASYNC_MESSAGE,
    ATTRIBUTE,
    DATA_OUT,
    FINAL,
    HEADER,
    HEADER_BYTES,
    LOGIN_REQUEST,
    LOGOUT_REQUEST,
    LOGOUT_RESPONSE,
    NOP_IN,
    NOP_OUT,
    READ,
    REJECT,
    REJECT_DATA_DIGEST,
    REJECT_IMMEDIATE,
    REJECT_INVALID_FIELD,
    REJECT_NOT_SUPPORTED,
    REJECT_SNACK,
    REJECT_TASK_IN_PROGRESS,
    RESERVED_TAG,
    SCSI_COMMAND,
    SCSI_RESPONSE,
    SERIAL_HALF,
    SERIAL_MASK,
    SIMPLE,
    SNACK_REQUEST,
    TASK_MANAGEMENT_REQUEST,
    TEXT_REQUEST,
    TEXT_RESPONSE,
    UNDERFLOW,
    WRITE,
    Pdu,
    decode_lun,
    pack,
)
from protocol.iscsi.task import Task
from protocol.iscsi.task_management import TaskManagement
from protocol.iscsi.text_exchange import TextExchange
from protocol.scsi import dispatch, opcodes, sense
from protocol.scsi.commands.inquiry import encode_lun
from protocol.scsi.errors import CheckCondition, ScsiError
from protocol.scsi.logical_unit import LogicalUnit, Nexus, UnitNexus
from protocol.scsi.plan import Operation, Query, ReadExtent, Reply
from protocol.scsi.sense import Sense
from protocol.volume import BlockVolume

LOGOUT_CLOSE_SESSION: Final = 0
LOGOUT_CLOSE_CONNECTION: Final = 1
_LOGOUT_DONE: Final = 0
_LOGOUT_NO_CONNECTION: Final = 1
_LOGOUT_NO_RECOVERY: Final = 2
_SEQUENCED: Final = frozenset(
    (NOP_OUT, SCSI_COMMAND, TASK_MANAGEMENT_REQUEST, TEXT_REQUEST, LOGOUT_REQUEST)
)
_BATCHED: Final = frozenset(
    (
        opcodes.READ_10,
        opcodes.READ_12,
        opcodes.READ_16,
        opcodes.WRITE_10,
        opcodes.WRITE_12,
        opcodes.WRITE_16,
    )
)
_UNORDERED: Final = frozenset((0, SIMPLE))  # untagged counts as simple
_WITH_TRANSFER_TAG: Final = frozenset((NOP_IN, TEXT_RESPONSE))


def _nothing() -> None:
    """What a session that was released does when it is asked for something."""


def _always() -> bool:
    """It sends nothing any more."""
    return True


class FullFeature:
    """One session on its one connection, after login."""

    __slots__ = (
        "cid",
        "commands",
        "discovery",
        "exp_cmd_sn",
        "fast",
        "fast_read_max",
        "fast_write_max",
        "flush",
        "free_writes",
        "immediate_tasks",
        "initiator_name",
        "is_paused",
        "logged_out",
        "logging_out",
        "max_cmd_sn",
        "nexus",
        "parameters",
        "ping_tag",
        "portal",
        "read_bytes",
        "sender",
        "stalled",
        "stat_sn",
        "target_name",
        "task_management",
        "tasks",
        "terminate_target",
        "text",
        "transfer_tag",
        "units",
        "unsettled",
        "wake",
        "when_drained",
        "write_bytes",
        "write_queue",
        "write_reserved",
    )

    def __init__(
        self,
        login: LoginResult,
        nexus: Nexus,
        sender: Sender,
        stat_sn: int,
        text: TextExchange,
        wake: Callable[[], None],
        flush: Callable[[], None],
        is_paused: Callable[[], bool],
        terminate_target: Callable[[], None],
    ) -> None:
        self.initiator_name = login.initiator_name
        self.target_name = login.target.name if login.target is not None else ""
        self.discovery = login.discovery
        self.cid = login.cid
        self.parameters: Parameters = login.parameters
        self.sender = sender
        self.stat_sn = stat_sn
        self.exp_cmd_sn = login.cmd_sn
        self.max_cmd_sn = (login.cmd_sn + limits.COMMAND_WINDOW - 1) & SERIAL_MASK
        self.nexus = nexus
        nexus.tasks = lambda: list(self.tasks.values())
        self.units: dict[int, UnitNexus] = {
            encode_lun(lun): mapped for lun, mapped in nexus.units.items()
        }
        self.tasks: dict[int, Task] = {}
        self.immediate_tasks = 0
        self.unsettled: list[BlockVolume] = []
        self.stalled: deque[ReadStream] = deque()
        self.write_queue: deque[WriteTask] = deque()
        self.write_reserved = 0
        self.transfer_tag = 0
        self.ping_tag: int | None = None
        self.logging_out = False  # a logout waits until no volume holds a command
        self.logged_out = False
        self.when_drained: Callable[[], None] | None = None
        self.task_management = TaskManagement(self)
        self.text = text
        self.wake = wake
        self.flush = flush
        self.is_paused = is_paused
        self.terminate_target = terminate_target
        self.fast = fast_path.eligible(self)
        self.free_writes: list[fast_path.FastWrite] = []
        self.lengths_changed()
        self.fast_write_max = (
            self.parameters.unsolicited_bytes if self.parameters.immediate_data else 0
        )
        self.commands = self.read_bytes = self.write_bytes = 0

    def lengths_changed(self) -> None:
        """The initiator has declared another MaxRecvDataSegmentLength."""
        self.fast_read_max = min(
            self.parameters.peer_data_segment_bytes,
            self.parameters.max_burst_bytes,
            limits.READ_PIECE_BYTES,
        )

    # --- Requests ---------------------------------------------------------------------------------

    def handle(self, pdu: Pdu) -> None:
        """One PDU by the table of handlers. Raises ProtocolError where the connection must end."""
        if self.logging_out:
            return  # RFC 7143 11.14: nothing may come after a logout request
        if not pdu.data_intact:
            self._data_digest_failed(pdu)
            return
        handler = self._HANDLERS.get(pdu.opcode)
        if handler is None:
            self.reject(pdu, REJECT_NOT_SUPPORTED)
        elif pdu.opcode not in _SEQUENCED or self._accept(pdu):
            handler(self, pdu)

    def _accept(self, pdu: Pdu) -> bool:
        """CmdSN (RFC 7143 4.2.2.1): in order on a session's one connection; what lies outside the
        window is ignored silently.
        """
        if pdu.immediate:
            return True
        distance = (pdu.cmd_sn - self.exp_cmd_sn) & SERIAL_MASK
        room = (self.max_cmd_sn - self.exp_cmd_sn + 1) & SERIAL_MASK
        if distance >= SERIAL_HALF or distance >= room:
            return False
        if distance:
            raise ProtocolError(
                f"CmdSN {pdu.cmd_sn} on a session whose next is {self.exp_cmd_sn}: a request was"
                " lost"
            )
        self.exp_cmd_sn = (self.exp_cmd_sn + 1) & SERIAL_MASK
        if pdu.opcode != SCSI_COMMAND:
            self._open_window()
        return True

    def _open_window(self) -> None:
        self.max_cmd_sn = (self.max_cmd_sn + 1) & SERIAL_MASK

    def _data_digest_failed(self, pdu: Pdu) -> None:
        """Discard and reject; a Data-Out ends its task too, which cannot complete any more (RFC
        7143 7.8).
        """
        self.reject(pdu, REJECT_DATA_DIGEST)
        if pdu.opcode == DATA_OUT:
            task = self.tasks.get(pdu.itt)
            if isinstance(task, WriteTask) and task.collecting:
                task.data_digest_failed()

    def _nop_out(self, pdu: Pdu) -> None:
        if pdu.ttt != RESERVED_TAG and pdu.ttt == self.ping_tag:
            self.ping_tag = None
        if pdu.itt == RESERVED_TAG:
            return
        data = bytes(pdu.data[: self.parameters.peer_data_segment_bytes])
        self.sender.put(self.numbered(NOP_IN, pdu.itt, length=len(data), lun=pdu.lun), data)

    def _scsi_command(self, pdu: Pdu) -> None:
        if self.discovery or pdu.itt == RESERVED_TAG:
            raise ProtocolError(
                "a SCSI command in a discovery session, or with the reserved task tag"
            )
        if pdu.itt in self.tasks:
            self._refuse_command(pdu, REJECT_TASK_IN_PROGRESS)
            return
        if pdu.immediate and self.immediate_tasks >= limits.IMMEDIATE_COMMANDS_MAX:
            self.reject(pdu, REJECT_IMMEDIATE)
            return
        if pdu.flags & READ and pdu.flags & WRITE:
            self._refuse_command(pdu, REJECT_INVALID_FIELD)  # no command here moves data both ways
            return
        self._execute(pdu)

    def _refuse_command(self, pdu: Pdu, reason: int) -> None:
        self.reject(pdu, reason)
        if not pdu.immediate:
            self._open_window()

    def _execute(self, pdu: Pdu) -> None:
        """Check the command and carry out its plan."""
        self.commands += 1
        if pdu.header[32] not in _BATCHED or pdu.flags & ATTRIBUTE not in _UNORDERED:
            # What changes or reports more than sectors, or is to come in order, must see the writes
            # before it.
            self.settle()
        lun = decode_lun(pdu.lun)
        mapped = self.nexus.units.get(lun)
        task = Task(self, pdu.itt, mapped, pdu.expected_length, pdu.immediate)
        try:
            announced.check_unsolicited(pdu, self.parameters)
            plan = dispatch.prepare(self.nexus, lun, pdu.cdb)
            announced.check_direction(pdu, plan)
        except ScsiError as error:
            self._begin(task)
            task.end(
                cause=error.sense if isinstance(error, CheckCondition) else None,
                status=error.status,
                moved=0,
            )
            return
        if isinstance(plan, Reply):
            self._begin(task)
            self._send_reply(task, plan.data, pdu.flags)
        elif isinstance(plan, Query):
            self._begin(task)
            QueryAnswer(task, pdu.flags, self._send_reply).start(plan)
        elif isinstance(plan, ReadExtent):
            self._begin(task)
            self._send_extent(task, plan, pdu.flags)
        else:
            self._take_data(pdu, mapped, plan)

    def _begin(self, task: Task) -> None:
        self.tasks[task.itt] = task
        if task.immediate:
            self.immediate_tasks += 1

    def _send_reply(self, task: Task, data: bytes, flags: int) -> None:
        task.wanted_bytes = len(data)
        size = min(len(data), task.expected_bytes) if flags & READ else 0
        if size == 0:
            task.end()
        else:
            DataIn(self, task, size).emit(data[:size])

    def _send_extent(self, task: Task, plan: ReadExtent, flags: int) -> None:
        assert task.mapped is not None
        task.wanted_bytes = plan.length_bytes
        size = min(plan.length_bytes, task.expected_bytes) if flags & READ else 0
        if size == 0:
            task.end()
            return
        self.read_bytes += size
        ReadStream(task, task.mapped.unit.volume, plan.offset_bytes, size).pump()

    def _take_data(self, pdu: Pdu, mapped: UnitNexus | None, plan: Operation) -> None:
        task = WriteTask(self, pdu, mapped, plan, pdu.expected_length if pdu.flags & WRITE else 0)
        self._begin(task)
        self.write_bytes += task.total_bytes
        task.begin(pdu)

    def _data_out(self, pdu: Pdu) -> None:
        task = self.tasks.get(pdu.itt)
        # Data of a task that has ended or was aborted may still be on their way: they are dropped
        # (RFC 7143 11.5.1).
        if isinstance(task, WriteTask) and task.collecting and not task.aborted:
            task.take(pdu)

    def _task_management(self, pdu: Pdu) -> None:
        self.settle()
        self.task_management.handle(pdu)

    def _text(self, pdu: Pdu) -> None:
        self.text.handle(self, pdu)

    def _logout(self, pdu: Pdu) -> None:
        self.settle()  # what came before is answered before
        reason = pdu.flags & 0x7F
        outcome = _LOGOUT_DONE
        if reason == LOGOUT_CLOSE_CONNECTION and pdu.word20 >> 16 != self.cid:
            outcome = _LOGOUT_NO_CONNECTION
        elif reason > LOGOUT_CLOSE_CONNECTION:
            outcome = _LOGOUT_NO_RECOVERY
        if outcome != _LOGOUT_DONE:
            self.sender.put(self.numbered(LOGOUT_RESPONSE, pdu.itt, byte2=outcome))
            return
        self.logging_out, self.fast = True, False

        def drained() -> None:
            self.logged_out = True
            self.sender.put(self.numbered(LOGOUT_RESPONSE, pdu.itt, byte2=_LOGOUT_DONE))
            self.wake()

        self.abandon(drained)

    def _snack(self, pdu: Pdu) -> None:
        self.reject(
            pdu, REJECT_SNACK
        )  # at error recovery level 0 nothing is kept that could be sent again (RFC 7143 11.16)

    def _login_again(self, pdu: Pdu) -> None:
        raise ProtocolError("a login request in the full feature phase")

    # --- Responses --------------------------------------------------------------------------------

    def numbered(
        self,
        opcode: int,
        itt: int,
        *,
        flags: int = FINAL,
        byte2: int = 0,
        length: int = 0,
        lun: int = 0,
        ttt: int = RESERVED_TAG,
    ) -> bytes:
        """Header of a response with the next StatSN; Target Transfer Tag at byte 20 where the type
        has one.
        """
        stat_sn = self.stat_sn
        self.stat_sn = (stat_sn + 1) & SERIAL_MASK
        word20 = ttt if opcode in _WITH_TRANSFER_TAG else 0
        words = (word20, stat_sn, self.exp_cmd_sn, self.max_cmd_sn, 0, 0, 0)
        return pack(opcode, flags, itt, byte2=byte2, length=length, lun=lun, words=words)

    def reject(self, pdu: Pdu, reason: int) -> None:
        """Send a Reject with the header of what was wrong (RFC 7143 11.17)."""
        self.sender.put(
            self.numbered(REJECT, RESERVED_TAG, byte2=reason, length=HEADER_BYTES), pdu.header
        )

    def task_ended(self, task: Task) -> None:
        """The task can no longer touch a volume: remove it, and tell whoever waits for that."""
        if self.tasks.get(task.itt) is not task:
            return
        del self.tasks[task.itt]
        if task.immediate:
            self.immediate_tasks -= 1
        else:
            self.max_cmd_sn = (self.max_cmd_sn + 1) & SERIAL_MASK
        if task.reserved_bytes:
            self._release(task)
        for watcher in task.watchers:
            watcher.task_ended(task)
        if self.when_drained is not None and not self.tasks:
            drained, self.when_drained = self.when_drained, None
            drained()

    def respond(
        self, task: Task, status: int, cause: Sense | None, sequence_count: int, moved: int | None
    ) -> None:
        """SCSI Response with sense data and residual (RFC 7143 11.4); the task ends with it."""
        self.task_ended(task)
        if moved is None:
            flags, residual = residual_flags(task.expected_bytes, task.wanted_bytes)
        else:
            residual = max(0, task.expected_bytes - moved)
            flags = UNDERFLOW if residual else 0
        body = b""
        if cause is not None:
            descriptor = task.mapped is not None and task.mapped.unit.descriptor_sense
            data = cause.encode(descriptor)
            body = len(data).to_bytes(2, "big") + data
        stat_sn = self.stat_sn
        self.stat_sn = (stat_sn + 1) & SERIAL_MASK
        self.sender.put(
            HEADER.pack(
                SCSI_RESPONSE,
                FINAL | flags,
                0,
                status,
                len(body),
                0,
                task.itt,
                0,
                stat_sn,
                self.exp_cmd_sn,
                self.max_cmd_sn,
                sequence_count,
                0,
                residual,
            ),
            body,
        )

    # --- What tasks ask of the session ------------------------------------------------------------

    def touch(self, mapped: UnitNexus | None) -> None:
        """A write may have been given to this unit's volume: it is settled before the
        wake-up ends.
        """
        if mapped is not None and mapped.unit.volume not in self.unsettled:
            self.unsettled.append(mapped.unit.volume)

    def settle(self) -> None:
        """Let every touched volume carry out its batch."""
        while self.unsettled:
            self.unsettled.pop().settle()

    def may_send(self, stream: ReadStream) -> bool:
        """True while the client drains; else ``stream`` is resumed when it does."""
        if self.sender.pending_bytes >= limits.OUTPUT_BYTES_HIGH:
            self.flush()
        if self.is_paused():
            self.stalled.append(stream)
            return False
        return True

    def resume(self) -> None:
        """The client drains again: go on with the reads that waited."""
        for _ in range(len(self.stalled)):
            self.stalled.popleft().pump()

    def want_data(self, task: WriteTask) -> None:
        """Solicit a task's next burst, or queue it until the session's allowance has room for its
        buffer.
        """
        if task.reserved_bytes == 0:
            total = task.total_bytes
            if self.write_reserved and self.write_reserved + total > limits.WRITE_BUFFER_BYTES:
                self.write_queue.append(task)
                return
            task.reserved_bytes = total
            self.write_reserved += total
        self.transfer_tag = (self.transfer_tag + 1) & 0x7FFFFFFF
        task.solicit(self.transfer_tag)

    def _release(self, task: Task) -> None:
        self.write_reserved -= task.reserved_bytes
        task.reserved_bytes = 0
        while self.write_queue:
            following = self.write_queue[0]
            if (
                not following.aborted
                and self.write_reserved
                and self.write_reserved + following.total_bytes > limits.WRITE_BUFFER_BYTES
            ):
                return
            self.write_queue.popleft()
            if not following.aborted:
                self.want_data(following)

    # --- Life of the session ----------------------------------------------------------------------

    def ping(self) -> None:
        """Ask the initiator for a sign of life (NOP-In with a transfer tag; StatSN is told, not
        taken).
        """
        self.transfer_tag = (self.transfer_tag + 1) & 0x7FFFFFFF
        self.ping_tag = self.transfer_tag
        words = (self.ping_tag, self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn, 0, 0, 0)
        self.sender.put(pack(NOP_IN, FINAL, RESERVED_TAG, words=words))

    def ask_for_logout(self, timeout_seconds: int) -> None:
        """Asynchronous message: the target wants the initiator to log out within this time (RFC
        7143 11.9.1).
        """
        stat_sn = self.stat_sn
        self.stat_sn = (stat_sn + 1) & SERIAL_MASK
        event = ASYNC_LOGOUT_REQUESTED << 24
        words = (0, stat_sn, self.exp_cmd_sn, self.max_cmd_sn, event, timeout_seconds, 0)
        self.sender.put(pack(ASYNC_MESSAGE, FINAL, RESERVED_TAG, words=words))

    def map_lun(self, lun: int, unit: LogicalUnit) -> None:
        """One logical unit more; the initiator learns of it by a unit attention on those it has
        (SPC-4 6.33).
        """
        self.nexus.unmap(lun)
        self.units[encode_lun(lun)] = self.nexus.map(lun, unit)
        self.nexus.attention(sense.REPORTED_LUNS_CHANGED, except_for=lun)

    def unmap_lun(self, lun: int) -> None:
        """That logical unit no more. What was given to its volume ends as it would have."""
        if self.nexus.unmap(lun):
            del self.units[encode_lun(lun)]
            self.nexus.attention(sense.REPORTED_LUNS_CHANGED)

    def abandon(self, drained: Callable[[], None]) -> None:
        """The session is over: abort everything, and call ``drained`` once no volume holds a
        command of it.

        Called again, the later ``drained`` alone is called: a logout whose connection is lost needs
        no answer.
        """
        self.settle()
        self.stalled.clear()
        for task in list(self.tasks.values()):
            task.abort()
        if self.tasks:
            self.when_drained = drained
        else:
            drained()

    def release(self) -> None:
        """Nothing can happen any more: let go of the volumes, and of what refers back to here.

        A session is a ring of references; left whole, it would keep its memory until a garbage
        collection, and those are rare in a process that makes no other rings.
        """
        for write in self.free_writes:
            write.retire()
        self.free_writes.clear()
        self.units.clear()
        self.nexus.tasks = list
        self.wake = self.flush = self.terminate_target = _nothing
        self.is_paused = _always
        del self.task_management, self.text

    _HANDLERS: ClassVar[dict[int, Callable[["FullFeature", Pdu], None]]] = {
        NOP_OUT: _nop_out,
        SCSI_COMMAND: _scsi_command,
        TASK_MANAGEMENT_REQUEST: _task_management,
        TEXT_REQUEST: _text,
        DATA_OUT: _data_out,
        LOGOUT_REQUEST: _logout,
        SNACK_REQUEST: _snack,
        LOGIN_REQUEST: _login_again,
    }
