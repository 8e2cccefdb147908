"""The full feature phase of one session: its sequence numbers, its tasks, and how they are
answered.

A session has one connection here (MaxConnections=1), so that this holds the numbers of both. Every
command is a `Task` in the session's table, from its PDU until it can no longer touch a volume.

Invariants. ``exp_cmd_sn`` goes up by one for each non-immediate request, in order, and never back.
``max_cmd_sn`` goes up by one for each of them that has ended: the window is COMMAND_WINDOW less
what is under way. ``stat_sn`` is the StatSN of the next response.
"""

from collections.abc import Callable
from typing import Final

from protocol.iscsi import limits
from protocol.iscsi.errors import ProtocolError
from protocol.iscsi.framing import Sender
from protocol.iscsi.login import LoginResult
from protocol.iscsi.pdu import (
    FINAL,
    HEADER,
    HEADER_BYTES,
    NOP_IN,
    OVERFLOW,
    REJECT,
    RESERVED_TAG,
    SCSI_COMMAND,
    SCSI_RESPONSE,
    SERIAL_HALF,
    SERIAL_MASK,
    TEXT_RESPONSE,
    UNDERFLOW,
    Pdu,
    pack,
)
from protocol.scsi import sense
from protocol.scsi.errors import STATUS_CHECK_CONDITION, STATUS_GOOD, ReservationConflict, sense_of
from protocol.scsi.logical_unit import LogicalUnit, Nexus, UnitNexus
from protocol.scsi.lun import encode_lun
from protocol.scsi.sense import Sense
from protocol.scsi.task import TaskWatcher
from protocol.volume import BlockVolume

_TRANSFER_TAG_MASK: Final = 0x7FFFFFFF  # so that no tag is the reserved one
_WITH_TRANSFER_TAG: Final = frozenset((NOP_IN, TEXT_RESPONSE))


class Task:
    """A SCSI command under way, from its PDU to its status: what it came with, and how it ends.

    A task is *busy* while a volume holds one of its reads or writes. An aborted task that is busy
    stays in the session's table, silent, until the volume has completed that: only then is the
    abort answered, because only then can the task no longer touch the disk.
    """

    __slots__ = (
        "aborted",
        "busy",
        "changes",
        "expected_bytes",
        "immediate",
        "itt",
        "mapped",
        "session",
        "wanted_bytes",
        "watchers",
    )

    def __init__(
        self,
        session: "Session",
        itt: int,
        mapped: UnitNexus | None,
        expected_bytes: int,
        immediate: bool,
    ) -> None:
        self.session = session
        self.itt = itt
        self.mapped = mapped
        self.expected_bytes = expected_bytes  # Expected Data Transfer Length of the PDU
        self.wanted_bytes = 0  # what the CDB asks for; the two make the residual
        self.immediate = immediate
        self.busy = False
        self.changes = False  # True for what alters sectors: exclusive commands wait for it
        self.aborted = False
        self.watchers: tuple[TaskWatcher, ...] = ()  # of this session or of another

    def abort(self) -> None:
        """Go silent; end now, or when the volume has completed what it holds of this task."""
        if self.aborted:
            return
        self.aborted = True
        if not self.busy:
            self.session.task_ended(self)

    def end(
        self,
        sequence_count: int = 0,
        cause: Sense | None = None,
        status: int = STATUS_GOOD,
        moved: int | None = None,
    ) -> None:
        """Send the SCSI Response. ``sequence_count`` is the number of R2T or Data-In PDUs sent,
        ``moved`` the bytes transferred.
        """
        self.session.respond(
            self,
            STATUS_CHECK_CONDITION if cause is not None else status,
            cause,
            sequence_count,
            moved,
        )

    def fail(
        self, error: Exception, writing: bool, sequence_count: int = 0, moved: int | None = None
    ) -> None:
        """End with the sense data of what a volume reported, or with the status of what the
        operation found.
        """
        if isinstance(error, ReservationConflict):
            self.end(sequence_count, status=error.status, moved=moved)
            return
        self.end(sequence_count, sense_of(error, writing), moved=moved)

    def end_if_aborted(self) -> bool:
        """The volume has completed what it held of this task: end the task if it was aborted
        meanwhile, and say so.
        """
        self.busy = False
        if self.aborted:
            self.session.task_ended(self)
        return self.aborted


def residual_flags(expected: int, wanted: int) -> tuple[int, int]:
    """Overflow or underflow bit, and the residual count (RFC 7143 11.4.5)."""
    if expected == wanted:
        return 0, 0
    return (OVERFLOW, wanted - expected) if wanted > expected else (UNDERFLOW, expected - wanted)


# What `Session.describe` would tell before there is a session.
NO_SESSION: Final[dict[str, object]] = {
    "header_digest": False,
    "data_digest": False,
    "commands_in_flight": 0,
    "commands": 0,
    "read_bytes": 0,
    "write_bytes": 0,
}


class Session:
    """What the handlers of all PDUs share. ``tasks`` is the table that ``nexus`` sees too: task
    management reaches the tasks of other sessions through their nexuses.
    """

    __slots__ = (
        "_transfer_tag",
        "_unsettled",
        "_when_quiet",
        "commands",
        "discovery",
        "exp_cmd_sn",
        "immediate_tasks",
        "initiator_name",
        "max_cmd_sn",
        "nexus",
        "parameters",
        "read_bytes",
        "sender",
        "single_data_in_bytes",
        "stat_sn",
        "target_name",
        "tasks",
        "units",
        "write_bytes",
    )

    def __init__(
        self,
        login: LoginResult,
        nexus: Nexus,
        tasks: dict[int, Task],
        sender: Sender,
        stat_sn: int,
    ) -> None:
        self.initiator_name = login.initiator_name
        self.discovery = login.discovery
        self.target_name = login.target.name if login.target is not None else ""
        self.parameters = parameters = login.parameters
        # Nothing is sent again, and a task has one R2T at a time, whatever the initiator offered.
        assert parameters.error_recovery_level == 0 and parameters.max_outstanding_r2t == 1
        self.nexus = nexus
        # The same units by the eight bytes of a LUN, as one number.
        self.units: dict[int, UnitNexus] = {
            encode_lun(lun): mapped for lun, mapped in nexus.units.items()
        }
        self.sender = sender
        self.stat_sn = stat_sn
        self.exp_cmd_sn = login.cmd_sn
        self.max_cmd_sn = (login.cmd_sn + limits.COMMAND_WINDOW - 1) & SERIAL_MASK
        self.tasks = tasks
        self.immediate_tasks = 0
        self._transfer_tag = 0
        self._unsettled: list[BlockVolume] = []
        self._when_quiet: list[Callable[[], None]] = []
        self.commands = self.read_bytes = self.write_bytes = 0
        self.lengths_changed()

    def lengths_changed(self) -> None:
        """The initiator has declared its MaxRecvDataSegmentLength, at login or later."""
        # A read up to this is answered by one Data-In PDU.
        self.single_data_in_bytes = min(
            self.parameters.peer_data_segment_bytes,
            self.parameters.max_burst_bytes,
            limits.READ_PIECE_BYTES,
        )

    def describe(self) -> dict[str, object]:
        """What ``session ls`` shows of it; counters are plain ints."""
        return {
            "header_digest": self.parameters.header_digest,
            "data_digest": self.parameters.data_digest,
            "commands_in_flight": len(self.tasks),
            "commands": self.commands,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
        }

    # --- Sequence numbers -------------------------------------------------------------------------

    def accept(self, pdu: Pdu) -> bool:
        """CmdSN (RFC 7143 4.2.2.1): in order on a session's one connection; what lies outside the
        window is ignored silently. Raises ProtocolError for a gap.
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
            self.open_window()
        return True

    def open_window(self) -> None:
        """A request that took a CmdSN has ended: the initiator may send one more."""
        self.max_cmd_sn = (self.max_cmd_sn + 1) & SERIAL_MASK

    def take_stat_sn(self) -> int:
        """The StatSN of a response that is made now. `FastPath` has this inlined."""
        stat_sn = self.stat_sn
        self.stat_sn = (stat_sn + 1) & SERIAL_MASK
        return stat_sn

    def take_transfer_tag(self) -> int:
        """A Target Transfer Tag, for an R2T or a NOP-In."""
        self._transfer_tag = (self._transfer_tag + 1) & _TRANSFER_TAG_MASK
        return self._transfer_tag

    # --- Responses --------------------------------------------------------------------------------

    def response_header(
        self,
        opcode: int,
        itt: int,
        *,
        flags: int = FINAL,
        byte2: int = 0,
        length: int = 0,
        lun: int = 0,
        ttt: int = RESERVED_TAG,
        tail: tuple[int, int, int] = (0, 0, 0),
    ) -> bytes:
        """Header of a response that takes a StatSN; Target Transfer Tag at byte 20 where the type
        has one, ``tail`` from byte 36 on.
        """
        word20 = ttt if opcode in _WITH_TRANSFER_TAG else 0
        words = (word20, self.take_stat_sn(), self.exp_cmd_sn, self.max_cmd_sn, *tail)
        return pack(opcode, flags, itt, byte2=byte2, length=length, lun=lun, words=words)

    def reject(self, pdu: Pdu, reason: int) -> None:
        """Send a Reject with the header of what was wrong (RFC 7143 11.17)."""
        header = self.response_header(REJECT, RESERVED_TAG, byte2=reason, length=HEADER_BYTES)
        self.sender.put(header, pdu.header)

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
        header = HEADER.pack(
            SCSI_RESPONSE,
            FINAL | flags,
            0,
            status,
            len(body),
            0,
            task.itt,
            0,
            self.take_stat_sn(),
            self.exp_cmd_sn,
            self.max_cmd_sn,
            sequence_count,
            0,
            residual,
        )
        self.sender.put(header, body)

    # --- Tasks ------------------------------------------------------------------------------------

    def begin(self, task: Task) -> None:
        """Enter a task into the table."""
        self.tasks[task.itt] = task
        if task.immediate:
            self.immediate_tasks += 1

    def task_ended(self, task: Task) -> None:
        """The task can no longer touch a volume: remove it, and tell its watchers."""
        if self.tasks.get(task.itt) is not task:
            return
        del self.tasks[task.itt]
        if task.immediate:
            self.immediate_tasks -= 1
        else:
            self.open_window()
        for watcher in task.watchers:
            watcher.task_ended(task)
        if self._when_quiet and not self.tasks:
            self._tell_quiet()

    def _tell_quiet(self) -> None:
        told, self._when_quiet = self._when_quiet, []
        for quiet in told:
            quiet()

    def when_quiet(self, quiet: Callable[[], None]) -> None:
        """Call ``quiet`` too when the session that was abandoned has no task any more."""
        self._when_quiet.append(quiet)
        if not self.tasks:
            self._tell_quiet()

    def abandon(self, quiet: Callable[[], None]) -> None:
        """The session is over: abort every task, and call ``quiet`` once no volume holds a command
        of it.

        After another call only the later ``quiet`` is called: a logout whose connection is lost
        needs no answer.
        """
        self.settle()
        self.sender.forget_stalled()
        for task in list(self.tasks.values()):
            task.abort()
        self._when_quiet.clear()
        self.when_quiet(quiet)

    # --- Logical units ----------------------------------------------------------------------------

    def touch(self, mapped: UnitNexus | None) -> None:
        """A write may have been given to this unit's volume: it is settled before the
        wake-up ends.
        """
        if mapped is not None and mapped.unit.volume not in self._unsettled:
            self._unsettled.append(mapped.unit.volume)

    def settle(self) -> None:
        """Let every touched volume carry out its batch."""
        while self._unsettled:
            self._unsettled.pop().settle()

    def map_lun(self, lun: int, unit: LogicalUnit) -> None:
        """The session's target has one logical unit more; the initiator learns of it by a unit
        attention on those that it has (SPC-4 6.33).
        """
        self.nexus.unmap(lun)
        self.units[encode_lun(lun)] = self.nexus.map(lun, unit)
        self.nexus.attention(sense.REPORTED_LUNS_CHANGED, except_for=lun)

    def unmap_lun(self, lun: int) -> None:
        """The session's target has that logical unit no more. What was given to its volume ends as
        it would have.
        """
        if self.nexus.unmap(lun):
            del self.units[encode_lun(lun)]
            self.nexus.attention(sense.REPORTED_LUNS_CHANGED)
