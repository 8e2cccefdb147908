"""The full feature phase of our initiator's session: sequence numbers, and the commands under way.

Invariants: a CmdSN is taken when a command is sent, never when it is queued, so that the target
sees no gap; a command is in ``_commands`` from then until its status; each ``done`` is called
exactly once.
"""

from collections import deque
from collections.abc import Callable
from typing import ClassVar, Final

from protocol.iscsi.errors import IscsiError, ProtocolError
from protocol.iscsi.framing import Sender
from protocol.iscsi.initiator.task import Command, CommandFailed, ConnectionEnded
from protocol.iscsi.keys import Parameters
from protocol.iscsi.pdu import (
    DATA_IN,
    DATA_OUT,
    FINAL,
    HEADER,
    HEADER_BYTES,
    NOP_IN,
    OPCODE_MASK,
    OVERFLOW,
    R2T,
    READ,
    REJECT,
    RESERVED_TAG,
    SCSI_COMMAND,
    SCSI_RESPONSE,
    SERIAL_HALF,
    SERIAL_MASK,
    SIMPLE,
    STATUS_PRESENT,
    UNDERFLOW,
    WRITE,
    Pdu,
    pack,
    serial_after,
)

_TASK_TAG_MAX: Final = 0x7FFFFFFF
_SENSE_LENGTH_BYTES: Final = 2
_CDB_AT: Final = 32
# R2T tells StatSN without taking it (RFC 7143 11.8.3); Data-In has it only with status.
_UNNUMBERED: Final = frozenset((R2T, DATA_IN))


class InitiatorSession:
    """What is sent and answered between login and logout. Nothing is sent before `begin`."""

    __slots__ = (
        "_begun",
        "_commands",
        "_last_tag",
        "_queue",
        "_sender",
        "_unsolicited_data",
        "cmd_sn",
        "exp_stat_sn",
        "max_cmd_sn",
        "parameters",
        "rejects",
    )

    def __init__(self, parameters: Parameters, unsolicited_data: bool, sender: Sender) -> None:
        self.parameters = parameters
        self._unsolicited_data = unsolicited_data
        self._sender = sender
        self._commands: dict[int, Command] = {}
        self._queue: deque[Command] = deque()
        self._last_tag = 0
        self._begun = False
        self.cmd_sn = 1
        self.max_cmd_sn = 0
        self.exp_stat_sn = 0
        self.rejects = 0

    def begin(self, cmd_sn: int, exp_stat_sn: int, max_cmd_sn: int) -> None:
        """The login has ended with these numbers."""
        self.cmd_sn, self.exp_stat_sn, self.max_cmd_sn = cmd_sn, exp_stat_sn, max_cmd_sn
        self._begun = True

    def end(self, error: IscsiError) -> None:
        """Every command under way ends with ``error``."""
        self._begun = False
        waiting = [*self._commands.values(), *self._queue]
        self._commands.clear()
        self._queue.clear()
        for command in waiting:
            command.done(None, error)

    @property
    def in_flight(self) -> int:
        """Commands sent and not ended yet."""
        return len(self._commands)

    # --- Sequence numbers -------------------------------------------------------------------------

    def take_tag(self) -> int:
        """An Initiator Task Tag."""
        self._last_tag = (self._last_tag + 1) & _TASK_TAG_MAX
        return self._last_tag

    def take_cmd_sn(self) -> int:
        """The CmdSN of a request that is made now and is not immediate."""
        cmd_sn = self.cmd_sn
        self.cmd_sn = (cmd_sn + 1) & SERIAL_MASK
        return cmd_sn

    def count(self, pdu: Pdu) -> None:
        """StatSN and the command window, which never shrinks (RFC 7143 4.2.2.1)."""
        numbered = pdu.opcode not in _UNNUMBERED or (
            pdu.opcode == DATA_IN and pdu.flags & STATUS_PRESENT
        )
        if numbered and not (pdu.opcode == NOP_IN and pdu.itt == RESERVED_TAG):
            self.exp_stat_sn = (pdu.stat_sn + 1) & SERIAL_MASK
        if (
            serial_after(pdu.max_cmd_sn, self.max_cmd_sn)
            and (pdu.max_cmd_sn - pdu.exp_cmd_sn + 1) & SERIAL_MASK < SERIAL_HALF
        ):
            self.max_cmd_sn = pdu.max_cmd_sn

    # --- Commands ---------------------------------------------------------------------------------

    def submit(self, command: Command) -> None:
        """Send a command, or queue it while it cannot be sent."""
        self._queue.append(command)
        self.pump()

    def pump(self) -> None:
        """Send queued commands as far as the window and the transport go."""
        while (
            self._queue
            and self._begun
            and not self._sender.paused
            and not serial_after(self.cmd_sn, self.max_cmd_sn)
        ):
            self._send_command(self._queue.popleft())

    def _send_command(self, command: Command) -> None:
        parameters, size = self.parameters, len(command.data)
        command.itt = itt = self.take_tag()
        self._commands[itt] = command
        cmd_sn = self.take_cmd_sn()
        immediate = (
            min(size, parameters.unsolicited_bytes, parameters.peer_data_segment_bytes)
            if parameters.immediate_data
            else 0
        )
        asked_first = parameters.initial_r2t or not self._unsolicited_data
        unsolicited = immediate if asked_first else min(size, parameters.unsolicited_bytes)
        more = unsolicited > immediate
        flags = (
            SIMPLE
            | (0 if more else FINAL)
            | (READ if command.read_bytes else 0)
            | (WRITE if size else 0)
        )
        words = (command.read_bytes or size, cmd_sn, self.exp_stat_sn)
        header = HEADER.pack(
            SCSI_COMMAND, flags, 0, 0, immediate, command.lun, itt, *words, 0, 0, 0, 0
        )
        self._sender.put(header[:_CDB_AT] + command.cdb, memoryview(command.data)[:immediate])
        if more:
            self._send_data(command, RESERVED_TAG, immediate, unsolicited)

    def _send_data(self, command: Command, ttt: int, offset: int, end: int) -> None:
        """One sequence of Data-Out PDUs."""
        view, segment, data_sn = (
            memoryview(command.data),
            self.parameters.peer_data_segment_bytes,
            0,
        )
        while offset < end:
            step = min(segment, end - offset)
            flags = FINAL if offset + step == end else 0
            words = (ttt, 0, self.exp_stat_sn, 0, data_sn, offset, 0)
            self._sender.put(
                pack(DATA_OUT, flags, command.itt, length=step, lun=command.lun, words=words),
                view[offset : offset + step],
            )
            offset += step
            data_sn += 1

    # --- Responses --------------------------------------------------------------------------------

    def handle(self, pdu: Pdu) -> bool:
        """Take one PDU that belongs to a command; False for any other. Raises ProtocolError."""
        handler = self._HANDLERS.get(pdu.opcode)
        if handler is None:
            return False
        handler(self, pdu)
        return True

    def _data_in(self, pdu: Pdu) -> None:
        command = self._commands.get(pdu.itt)
        if command is None:
            return  # of a command that was aborted
        if not command.take(pdu):
            raise ProtocolError("a Data-In outside of the command's buffer")
        if pdu.flags & STATUS_PRESENT:
            self._ended(command, pdu, b"")

    def _scsi_response(self, pdu: Pdu) -> None:
        command = self._commands.get(pdu.itt)
        if command is None:
            return
        length = int.from_bytes(pdu.data[:_SENSE_LENGTH_BYTES], "big")
        self._ended(
            command, pdu, bytes(pdu.data[_SENSE_LENGTH_BYTES : _SENSE_LENGTH_BYTES + length])
        )

    def _ended(self, command: Command, pdu: Pdu, sense: bytes) -> None:
        del self._commands[pdu.itt]
        command.residual = (
            pdu.residual if pdu.flags & UNDERFLOW else -pdu.residual if pdu.flags & OVERFLOW else 0
        )
        if pdu.byte3 or pdu.byte2:
            command.done(None, CommandFailed(pdu.byte3, sense))
        else:
            command.done(command.result(), None)

    def _r2t(self, pdu: Pdu) -> None:
        command = self._commands.get(pdu.itt)
        if command is None:
            return
        if pdu.buffer_offset + pdu.residual > len(command.data):
            raise ProtocolError("an R2T beyond the command's data")
        self._send_data(command, pdu.ttt, pdu.buffer_offset, pdu.buffer_offset + pdu.residual)

    def _reject(self, pdu: Pdu) -> None:
        """A command whose header was sent back has ended without a status; one of whose data were
        rejected will still get its status.
        """
        self.rejects += 1
        if len(pdu.data) < HEADER_BYTES or pdu.data[0] & OPCODE_MASK != SCSI_COMMAND:
            return
        command = self._commands.pop(int.from_bytes(pdu.data[16:20], "big"), None)
        if command is not None:
            command.done(None, ConnectionEnded(f"rejected, reason {pdu.byte2:#x}"))

    _HANDLERS: ClassVar[dict[int, Callable[["InitiatorSession", Pdu], None]]] = {
        SCSI_RESPONSE: _scsi_response,
        DATA_IN: _data_in,
        R2T: _r2t,
        REJECT: _reject,
    }
