"""Our initiator, sans-IO: one session on one connection, many commands in flight.

It has the same shape as `TargetConnection` (``get_buffer``, ``buffer_updated``, ``send``, ``wake``,
``close``), so that the same socket code drives both. Invariants: ``cmd_sn`` is taken when a command
is sent, never when it is queued, so that the target sees no gap; a command is in ``_commands`` from
then until its status; each ``done`` is called exactly once.
"""

from collections import deque
from collections.abc import Callable
from typing import ClassVar, Final

from protocol.iscsi import limits, text
from protocol.iscsi.errors import IscsiError, ProtocolError
from protocol.iscsi.framing import ReceiveBuffer, Sender
from protocol.iscsi.initiator import cdbs as initiator_cdbs
from protocol.iscsi.initiator.login import InitiatorLogin, InitiatorSettings
from protocol.iscsi.initiator.task import Command, CommandDone, CommandFailed, ConnectionEnded
from protocol.iscsi.pdu import (
    ASYNC_LOGOUT_REQUESTED,
    ASYNC_MESSAGE,
    CONTINUE,
    DATA_IN,
    DATA_OUT,
    FINAL,
    HEADER,
    HEADER_BYTES,
    IMMEDIATE,
    LOGOUT_REQUEST,
    LOGOUT_RESPONSE,
    NOP_IN,
    NOP_OUT,
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
    TASK_MANAGEMENT_REQUEST,
    TASK_MANAGEMENT_RESPONSE,
    TEXT_REQUEST,
    TEXT_RESPONSE,
    UNDERFLOW,
    WRITE,
    Pdu,
    pack,
    serial_after,
)
from protocol.scsi.commands.inquiry import encode_lun
from protocol.volume import Buffer

_TASK_TAG_MAX: Final = 0x7FFFFFFF
_SENSE_LENGTH_BYTES: Final = 2

LoginDone = Callable[[IscsiError | None], None]
ResponseDone = Callable[[int], None]
TextDone = Callable[[list[tuple[str, str]]], None]


class InitiatorConnection:
    """One connection. Call `start`, wait for ``logged_in(None)``, then submit commands; callbacks
    come out of ``buffer_updated``.
    """

    __slots__ = (
        "_answers",
        "_close",
        "_closed",
        "_commands",
        "_entered",
        "_logged_in",
        "_login",
        "_next_tag",
        "_paused",
        "_queue",
        "_receive",
        "_send",
        "_sender",
        "_text",
        "_text_done",
        "_wake",
        "_woken",
        "cmd_sn",
        "exp_stat_sn",
        "failure",
        "logout_requested",
        "max_cmd_sn",
        "parameters",
        "rejects",
        "settings",
    )

    def __init__(
        self,
        settings: InitiatorSettings,
        send: Callable[[list[Buffer]], None],
        wake: Callable[[], None],
        close: Callable[[], None],
        logged_in: LoginDone,
    ) -> None:
        self.settings = settings
        self._send = send
        self._wake = wake
        self._close = close
        self._logged_in = logged_in
        self._receive = ReceiveBuffer(
            limits.RECEIVE_BUFFER_BYTES, limits.RECEIVE_DATA_SEGMENT_BYTES
        )
        self._sender = Sender()
        self._login: InitiatorLogin | None = InitiatorLogin(settings, self._sender.put)
        self.parameters = self._login.parameters
        self._commands: dict[int, Command] = {}
        self._queue: deque[Command] = deque()
        self._answers: dict[int, ResponseDone] = {}
        self._text = bytearray()
        self._text_done: TextDone | None = None
        self._next_tag = 0
        self._entered = self._woken = self._closed = self._paused = False
        self.cmd_sn = 1
        self.max_cmd_sn = 0
        self.exp_stat_sn = 0
        self.failure: IscsiError | None = None
        self.logout_requested = False
        self.rejects = 0

    # --- Bytes ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Send the leading login request."""
        if self._login is not None:
            self._login.start()
        self.flush_output()

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """The free part of the receive buffer."""
        return self._receive.free()

    def buffer_updated(self, nbytes: int) -> None:
        """``nbytes`` were written into what ``get_buffer`` returned. Callbacks are called from
        here.
        """
        self._receive.end += nbytes
        self._process()

    def _process(self) -> None:
        if self._entered:
            return
        self._entered = True
        try:
            while not self._closed:
                pdu = self._receive.next_pdu()
                if pdu is None:
                    break
                self._handle(pdu)
        except IscsiError as error:
            self._fail(error)
        finally:
            self._entered = False
        if self._closed:
            self._receive.start = self._receive.end
        self._receive.compact()
        self.flush_output()

    def flush_output(self) -> None:
        """Send what is pending. To be called once after each ``wake``."""
        self._woken = False
        if self._sender.pending and not self._entered:
            self._send(self._sender.take())

    def _request_flush(self) -> None:
        if not (self._entered or self._woken or self._closed):
            self._woken = True
            self._wake()

    def pause_writing(self) -> None:
        """The transport's buffer is full: commands are queued until `resume_writing`."""
        self._paused = True

    def resume_writing(self) -> None:
        """The target drains again."""
        self._paused = False
        self._pump()
        self._request_flush()

    def connection_lost(self) -> None:
        """The transport is gone: everything under way ends with ConnectionEnded."""
        self._fail(ConnectionEnded("the connection was closed"))

    def _fail(self, error: IscsiError) -> None:
        if self._closed:
            return
        self._closed = True
        self.failure = error
        if self._sender.pending:
            self._send(self._sender.take())
        if self._login is not None:
            self._login = None
            self._logged_in(error)
        ended = error if isinstance(error, ConnectionEnded) else ConnectionEnded(str(error))
        waiting = [*self._commands.values(), *self._queue]
        self._commands.clear()
        self._queue.clear()
        for command in waiting:
            command.done(None, ended)
        self._close()

    # --- Commands ---------------------------------------------------------------------------------

    def submit(
        self, lun: int, cdb: bytes, done: CommandDone, *, read_bytes: int = 0, data: Buffer = b""
    ) -> Command:
        """Send a command, or queue it while the target's window is closed. ``data`` must stay valid
        until ``done``.
        """
        command = Command(encode_lun(lun), cdb.ljust(16, b"\0"), read_bytes, data, done)
        if self._closed:
            done(None, ConnectionEnded("the connection is closed"))
            return command
        self._queue.append(command)
        self._pump()
        self._request_flush()
        return command

    def submit_read(
        self, lun: int, offset_bytes: int, length_bytes: int, done: CommandDone
    ) -> Command:
        """READ(16) of a range of whole sectors."""
        return self.submit(
            lun, initiator_cdbs.read(offset_bytes, length_bytes), done, read_bytes=length_bytes
        )

    def submit_write(
        self, lun: int, offset_bytes: int, data: Buffer, done: CommandDone, fua: bool = False
    ) -> Command:
        """WRITE(16) of whole sectors."""
        return self.submit(lun, initiator_cdbs.write(offset_bytes, len(data), fua), done, data=data)

    def submit_flush(self, lun: int, done: CommandDone) -> Command:
        """SYNCHRONIZE CACHE(16) of everything."""
        return self.submit(lun, initiator_cdbs.flush(), done)

    def submit_unmap(self, lun: int, extents: list[tuple[int, int]], done: CommandDone) -> Command:
        """UNMAP of ranges given as (offset, length) in bytes."""
        parameters = initiator_cdbs.unmap_parameters(extents)
        return self.submit(lun, initiator_cdbs.unmap(len(parameters)), done, data=parameters)

    def submit_write_zeros(
        self, lun: int, offset_bytes: int, length_bytes: int, done: CommandDone
    ) -> Command:
        """WRITE SAME(16) without a data-out buffer: zeros."""
        return self.submit(lun, initiator_cdbs.write_zeros(offset_bytes, length_bytes), done)

    def submit_capacity(self, lun: int, done: CommandDone) -> Command:
        """READ CAPACITY(16); `initiator_cdbs.parse_capacity` makes bytes of the answer."""
        return self.submit(
            lun, initiator_cdbs.read_capacity(), done, read_bytes=initiator_cdbs.CAPACITY_BYTES
        )

    @property
    def in_flight(self) -> int:
        """Commands sent and not ended yet."""
        return len(self._commands)

    def _tag(self) -> int:
        self._next_tag = (self._next_tag + 1) & _TASK_TAG_MAX
        return self._next_tag

    def _pump(self) -> None:
        """Send queued commands as far as the window goes."""
        while (
            self._queue
            and self._login is None
            and not self._paused
            and not serial_after(self.cmd_sn, self.max_cmd_sn)
        ):
            self._send_command(self._queue.popleft())

    def _send_command(self, command: Command) -> None:
        parameters, size = self.parameters, len(command.data)
        command.itt = itt = self._tag()
        self._commands[itt] = command
        cmd_sn = self._take_cmd_sn()
        immediate = (
            min(size, parameters.unsolicited_bytes, parameters.peer_data_segment_bytes)
            if parameters.immediate_data
            else 0
        )
        command.immediate_bytes = immediate
        asked_first = parameters.initial_r2t or not self.settings.unsolicited_data
        unsolicited = immediate if asked_first else min(size, parameters.unsolicited_bytes)
        more = unsolicited > immediate
        flags = (
            SIMPLE
            | (0 if more else FINAL)
            | (READ if command.read_bytes else 0)
            | (WRITE if size else 0)
        )
        words = (command.read_bytes or size, cmd_sn, self.exp_stat_sn)
        header = (
            HEADER.pack(SCSI_COMMAND, flags, 0, 0, immediate, command.lun, itt, *words, 0, 0, 0, 0)[
                :32
            ]
            + command.cdb
        )
        self._sender.put(header, memoryview(command.data)[:immediate])
        if more:
            self._send_data(command, RESERVED_TAG, immediate, unsolicited)

    def _take_cmd_sn(self) -> int:
        cmd_sn = self.cmd_sn
        self.cmd_sn = (cmd_sn + 1) & SERIAL_MASK
        return cmd_sn

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

    # --- Other requests ---------------------------------------------------------------------------

    def send_targets(self, done: TextDone) -> None:
        """SendTargets=All in a discovery session: ``done`` gets the keys of the answer in order."""
        self._text.clear()
        self._text_done = done
        self._send_text(self._tag(), RESERVED_TAG, text.encode([("SendTargets", "All")]))

    def _send_text(self, itt: int, ttt: int, body: bytes) -> None:
        words = (ttt, self._take_cmd_sn(), self.exp_stat_sn, 0, 0, 0, 0)
        self._sender.put(pack(TEXT_REQUEST, FINAL, itt, length=len(body), words=words), body)
        self._request_flush()

    def task_management(
        self, function: int, lun: int, done: ResponseDone, task: Command | None = None
    ) -> None:
        """A task management function (immediate); ``done`` gets the response code."""
        itt = self._tag()
        self._answers[itt] = done
        referenced = task.itt if task is not None else RESERVED_TAG
        words = (referenced, self.cmd_sn, self.exp_stat_sn, 0, 0, 0, 0)
        self._sender.put(
            pack(
                TASK_MANAGEMENT_REQUEST | IMMEDIATE,
                FINAL | function,
                itt,
                lun=encode_lun(lun),
                words=words,
            )
        )
        self._request_flush()

    def ping(self, done: ResponseDone) -> None:
        """NOP-Out that wants an answer."""
        itt = self._tag()
        self._answers[itt] = done
        words = (RESERVED_TAG, self.cmd_sn, self.exp_stat_sn, 0, 0, 0, 0)
        self._sender.put(pack(NOP_OUT | IMMEDIATE, FINAL, itt, words=words))
        self._request_flush()

    def logout(self, done: ResponseDone) -> None:
        """Close the session; the connection is closed after the answer."""
        itt = self._tag()
        self._answers[itt] = done
        words = (0, self._take_cmd_sn(), self.exp_stat_sn, 0, 0, 0, 0)
        self._sender.put(pack(LOGOUT_REQUEST, FINAL, itt, words=words))
        self._request_flush()

    # --- Responses --------------------------------------------------------------------------------

    def _handle(self, pdu: Pdu) -> None:
        if not pdu.data_intact:
            raise ProtocolError("data digest")  # without recovery there is nothing to ask for again
        if self._login is not None:
            self._handle_login(self._login, pdu)
            return
        handler = self._HANDLERS.get(pdu.opcode)
        if handler is None:
            raise ProtocolError(f"opcode {pdu.opcode:#x} from a target")
        self._count(pdu)
        handler(self, pdu)
        if self._queue:
            self._pump()

    def _handle_login(self, login: InitiatorLogin, pdu: Pdu) -> None:
        if not login.handle(pdu):
            return
        self._login = None
        self.cmd_sn = login.cmd_sn
        self.exp_stat_sn = login.exp_stat_sn
        self.max_cmd_sn = pdu.max_cmd_sn
        self._receive.header_digest = self._sender.header_digest = self.parameters.header_digest
        self._receive.data_digest = self._sender.data_digest = self.parameters.data_digest
        self._logged_in(None)
        self._pump()

    def _count(self, pdu: Pdu) -> None:
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

    def _nop_in(self, pdu: Pdu) -> None:
        if pdu.itt != RESERVED_TAG:
            self._answer(pdu)
        if pdu.ttt != RESERVED_TAG and pdu.itt == RESERVED_TAG:
            words = (pdu.ttt, self.cmd_sn, self.exp_stat_sn, 0, 0, 0, 0)
            self._sender.put(
                pack(NOP_OUT | IMMEDIATE, FINAL, RESERVED_TAG, lun=pdu.lun, words=words)
            )

    def _answer(self, pdu: Pdu) -> None:
        done = self._answers.pop(pdu.itt, None)
        if done is not None:
            done(pdu.byte2)

    def _text_response(self, pdu: Pdu) -> None:
        self._text += pdu.data
        if pdu.flags & CONTINUE or pdu.ttt != RESERVED_TAG:
            self._send_text(pdu.itt, pdu.ttt, b"")
            return
        done, self._text_done = self._text_done, None
        if done is not None:
            done(text.parse_list(bytes(self._text)))

    def _logout_response(self, pdu: Pdu) -> None:
        self._answer(pdu)
        self._fail(ConnectionEnded("logged out"))

    def _async_message(self, pdu: Pdu) -> None:
        if pdu.word36 >> 24 == ASYNC_LOGOUT_REQUESTED:
            self.logout_requested = True

    def _reject(self, pdu: Pdu) -> None:
        """A command whose header was sent back has ended without a status; one of whose data were
        rejected gets its status yet.
        """
        self.rejects += 1
        if len(pdu.data) < HEADER_BYTES or pdu.data[0] & OPCODE_MASK != SCSI_COMMAND:
            return
        command = self._commands.pop(int.from_bytes(pdu.data[16:20], "big"), None)
        if command is not None:
            command.done(None, ConnectionEnded(f"rejected, reason {pdu.byte2:#x}"))

    _HANDLERS: ClassVar[dict[int, Callable[["InitiatorConnection", Pdu], None]]] = {
        NOP_IN: _nop_in,
        SCSI_RESPONSE: _scsi_response,
        TASK_MANAGEMENT_RESPONSE: _answer,
        TEXT_RESPONSE: _text_response,
        DATA_IN: _data_in,
        LOGOUT_RESPONSE: _logout_response,
        R2T: _r2t,
        ASYNC_MESSAGE: _async_message,
        REJECT: _reject,
    }


# R2T tells StatSN without taking it (11.8.3); Data-In has it only with status.
_UNNUMBERED: Final = frozenset((R2T, DATA_IN))
