"""Our initiator, sans-IO: one session on one connection, many commands in flight.

It has the same shape as `TargetConnection` (``get_buffer``, ``buffer_updated``, ``send``, ``wake``,
``close``), so that the same socket code drives both.
"""

from collections.abc import Callable
from typing import ClassVar

from protocol.iscsi import limits, text
from protocol.iscsi.errors import IscsiError, ProtocolError
from protocol.iscsi.framing import ReceiveBuffer, Sender
from protocol.iscsi.initiator import cdbs
from protocol.iscsi.initiator.login import InitiatorLogin, InitiatorSettings
from protocol.iscsi.initiator.session import InitiatorSession
from protocol.iscsi.initiator.task import Command, CommandDone, ConnectionEnded
from protocol.iscsi.keys import Parameters
from protocol.iscsi.pdu import (
    ASYNC_LOGOUT_REQUESTED,
    ASYNC_MESSAGE,
    CONTINUE,
    FINAL,
    IMMEDIATE,
    LOGOUT_REQUEST,
    LOGOUT_RESPONSE,
    NOP_IN,
    NOP_OUT,
    RESERVED_TAG,
    TASK_MANAGEMENT_REQUEST,
    TASK_MANAGEMENT_RESPONSE,
    TEXT_REQUEST,
    TEXT_RESPONSE,
    Pdu,
    pack,
)
from protocol.scsi.lun import encode_lun
from protocol.volume import Buffer

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
        "_logged_in",
        "_login",
        "_receive",
        "_sender",
        "_session",
        "_text",
        "_text_done",
        "failure",
        "logout_requested",
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
        self._close = close
        self._logged_in = logged_in
        self._receive = ReceiveBuffer(
            limits.RECEIVE_BUFFER_BYTES, limits.RECEIVE_DATA_SEGMENT_BYTES
        )
        self._sender = Sender(send, wake)
        self._login: InitiatorLogin | None = InitiatorLogin(settings, self._sender.put)
        self._session = InitiatorSession(
            self._login.parameters, settings.unsolicited_data, self._sender
        )
        self._answers: dict[int, ResponseDone] = {}
        self._text = bytearray()
        self._text_done: TextDone | None = None
        self._closed = False
        self.failure: IscsiError | None = None
        self.logout_requested = False

    @property
    def parameters(self) -> Parameters:
        """What login has negotiated."""
        return self._session.parameters

    @property
    def in_flight(self) -> int:
        """Commands sent and not ended yet."""
        return self._session.in_flight

    @property
    def rejects(self) -> int:
        """Requests that the target rejected."""
        return self._session.rejects

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
        sender = self._sender
        if sender.corked:
            return
        sender.corked = True
        try:
            while not self._closed:
                pdu = self._receive.next_pdu()
                if pdu is None:
                    break
                self._handle(pdu)
        except IscsiError as error:
            self._fail(error)
        finally:
            sender.corked = False
        if self._closed:
            self._receive.start = self._receive.end
        self._receive.compact()
        self.flush_output()

    def flush_output(self) -> None:
        """Send what is pending. To be called once after each ``wake``."""
        if not self._sender.corked:
            self._sender.flush()

    def pause_writing(self) -> None:
        """The transport's buffer is full: commands are queued until `resume_writing`."""
        self._sender.paused = True

    def resume_writing(self) -> None:
        """The target drains again."""
        self._sender.resume()
        self._session.pump()
        self._sender.wake()

    def connection_lost(self) -> None:
        """The transport is gone: everything under way ends with ConnectionEnded."""
        self._fail(ConnectionEnded("the connection was closed"))

    def _fail(self, error: IscsiError) -> None:
        if self._closed:
            return
        self._sender.flush()
        self._closed = self._sender.closed = True
        self.failure = error
        if self._login is not None:
            self._login = None
            self._logged_in(error)
        self._session.end(
            error if isinstance(error, ConnectionEnded) else ConnectionEnded(str(error))
        )
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
        self._session.submit(command)
        self._sender.wake()
        return command

    def submit_read(
        self, lun: int, offset_bytes: int, length_bytes: int, done: CommandDone
    ) -> Command:
        """READ(16) of a range of whole sectors."""
        return self.submit(
            lun, cdbs.read(offset_bytes, length_bytes), done, read_bytes=length_bytes
        )

    def submit_write(
        self, lun: int, offset_bytes: int, data: Buffer, done: CommandDone, fua: bool = False
    ) -> Command:
        """WRITE(16) of whole sectors."""
        return self.submit(lun, cdbs.write(offset_bytes, len(data), fua), done, data=data)

    def submit_flush(self, lun: int, done: CommandDone) -> Command:
        """SYNCHRONIZE CACHE(16) of everything."""
        return self.submit(lun, cdbs.flush(), done)

    def submit_unmap(self, lun: int, extents: list[tuple[int, int]], done: CommandDone) -> Command:
        """UNMAP of ranges given as (offset, length) in bytes."""
        parameters = cdbs.unmap_parameters(extents)
        return self.submit(lun, cdbs.unmap(len(parameters)), done, data=parameters)

    def submit_write_zeros(
        self, lun: int, offset_bytes: int, length_bytes: int, done: CommandDone
    ) -> Command:
        """WRITE SAME(16) without a data-out buffer: zeros."""
        return self.submit(lun, cdbs.write_zeros(offset_bytes, length_bytes), done)

    def submit_capacity(self, lun: int, done: CommandDone) -> Command:
        """READ CAPACITY(16); `cdbs.parse_capacity` makes bytes of the answer."""
        return self.submit(lun, cdbs.read_capacity(), done, read_bytes=cdbs.CAPACITY_BYTES)

    # --- Other requests ---------------------------------------------------------------------------

    def send_targets(self, done: TextDone) -> None:
        """SendTargets=All in a discovery session: ``done`` gets the keys of the answer in order."""
        self._text.clear()
        self._text_done = done
        self._send_text(
            self._session.take_tag(), RESERVED_TAG, text.encode([("SendTargets", "All")])
        )

    def _send_text(self, itt: int, ttt: int, body: bytes) -> None:
        words = (ttt, self._session.take_cmd_sn(), self._session.exp_stat_sn, 0, 0, 0, 0)
        self._sender.put(pack(TEXT_REQUEST, FINAL, itt, length=len(body), words=words), body)
        self._sender.wake()

    def task_management(
        self, function: int, lun: int, done: ResponseDone, task: Command | None = None
    ) -> None:
        """A task management function (immediate); ``done`` gets the response code."""
        itt = self._session.take_tag()
        self._answers[itt] = done
        referenced = task.itt if task is not None else RESERVED_TAG
        words = (referenced, self._session.cmd_sn, self._session.exp_stat_sn, 0, 0, 0, 0)
        self._sender.put(
            pack(
                TASK_MANAGEMENT_REQUEST | IMMEDIATE,
                FINAL | function,
                itt,
                lun=encode_lun(lun),
                words=words,
            )
        )
        self._sender.wake()

    def ping(self, done: ResponseDone) -> None:
        """NOP-Out that wants an answer."""
        itt = self._session.take_tag()
        self._answers[itt] = done
        words = (RESERVED_TAG, self._session.cmd_sn, self._session.exp_stat_sn, 0, 0, 0, 0)
        self._sender.put(pack(NOP_OUT | IMMEDIATE, FINAL, itt, words=words))
        self._sender.wake()

    def logout(self, done: ResponseDone) -> None:
        """Close the session; the connection is closed after the answer."""
        itt = self._session.take_tag()
        self._answers[itt] = done
        words = (0, self._session.take_cmd_sn(), self._session.exp_stat_sn, 0, 0, 0, 0)
        self._sender.put(pack(LOGOUT_REQUEST, FINAL, itt, words=words))
        self._sender.wake()

    # --- Responses --------------------------------------------------------------------------------

    def _handle(self, pdu: Pdu) -> None:
        if not pdu.data_intact:
            raise ProtocolError("data digest")  # without recovery there is nothing to ask for again
        if self._login is not None:
            self._handle_login(self._login, pdu)
            return
        session = self._session
        session.count(pdu)
        handler = self._HANDLERS.get(pdu.opcode)
        if handler is not None:
            handler(self, pdu)
        elif not session.handle(pdu):
            raise ProtocolError(f"opcode {pdu.opcode:#x} from a target")
        session.pump()

    def _handle_login(self, login: InitiatorLogin, pdu: Pdu) -> None:
        if not login.handle(pdu):
            return
        self._login = None
        self._session.begin(login.cmd_sn, login.exp_stat_sn, pdu.max_cmd_sn)
        parameters = self.parameters
        self._receive.header_digest = self._sender.header_digest = parameters.header_digest
        self._receive.data_digest = self._sender.data_digest = parameters.data_digest
        self._logged_in(None)
        self._session.pump()

    def _nop_in(self, pdu: Pdu) -> None:
        if pdu.itt != RESERVED_TAG:
            self._answer(pdu)
        if pdu.ttt != RESERVED_TAG and pdu.itt == RESERVED_TAG:
            words = (pdu.ttt, self._session.cmd_sn, self._session.exp_stat_sn, 0, 0, 0, 0)
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

    _HANDLERS: ClassVar[dict[int, Callable[["InitiatorConnection", Pdu], None]]] = {
        NOP_IN: _nop_in,
        TASK_MANAGEMENT_RESPONSE: _answer,
        TEXT_RESPONSE: _text_response,
        LOGOUT_RESPONSE: _logout_response,
        ASYNC_MESSAGE: _async_message,
    }
