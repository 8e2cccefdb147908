"""The full feature phase of a target connection: one handler for each PDU, and the session's life
until the logout.
"""

from collections.abc import Callable
from typing import ClassVar, Final

from protocol.iscsi import limits, scsi_command
from protocol.iscsi.data_out import WriteAllowance, WriteTask
from protocol.iscsi.errors import ProtocolError
from protocol.iscsi.fast_path import FastPath, is_eligible
from protocol.iscsi.node import TargetNode
from protocol.iscsi.pdu import (
    ASYNC_LOGOUT_REQUESTED,
    ASYNC_MESSAGE,
    DATA_OUT,
    FINAL,
    LOGIN_REQUEST,
    LOGOUT_REQUEST,
    LOGOUT_RESPONSE,
    NOP_IN,
    NOP_OUT,
    READ,
    REJECT_DATA_DIGEST,
    REJECT_IMMEDIATE,
    REJECT_INVALID_FIELD,
    REJECT_NOT_SUPPORTED,
    REJECT_SNACK,
    REJECT_TASK_IN_PROGRESS,
    RESERVED_TAG,
    SCSI_COMMAND,
    SNACK_REQUEST,
    TASK_MANAGEMENT_REQUEST,
    TEXT_REQUEST,
    WRITE,
    Pdu,
    pack,
)
from protocol.iscsi.session import Session
from protocol.iscsi.task_management import TaskManagement
from protocol.iscsi.text_exchange import TextExchange

# Reasons of a logout (RFC 7143 11.14.1): 0 closes the session, 2 asks for a recovery.
_CLOSE_CONNECTION: Final = 1
_LOGOUT_DONE: Final = 0
_LOGOUT_NO_CONNECTION: Final = 1
_LOGOUT_NO_RECOVERY: Final = 2
_SEQUENCED: Final = frozenset(
    (NOP_OUT, SCSI_COMMAND, TASK_MANAGEMENT_REQUEST, TEXT_REQUEST, LOGOUT_REQUEST)
)


class FullFeaturePhase:
    """One session on its one connection, after login. ``cid`` and ``portal`` are the connection's;
    ``fast`` is its hot path, None where it may not be taken.
    """

    __slots__ = (
        "_allowance",
        "_cid",
        "_logging_out",
        "_ping_tag",
        "_task_management",
        "_text",
        "fast",
        "logged_out",
        "session",
    )

    def __init__(self, session: Session, node: TargetNode, cid: int, portal: str) -> None:
        self.session = session
        self.fast = FastPath(session) if is_eligible(session) else None
        self.logged_out = False
        self._cid = cid
        self._allowance = WriteAllowance()
        self._task_management = TaskManagement(session, node)
        self._text = TextExchange(session, node, portal)
        self._ping_tag: int | None = None
        self._logging_out = False  # a logout waits until no volume holds a command

    # --- Requests ---------------------------------------------------------------------------------

    def handle(self, pdu: Pdu) -> None:
        """One PDU by the table of handlers. Raises ProtocolError where the connection must end."""
        if self._logging_out:
            return  # RFC 7143 11.14: nothing may come after a logout request
        if not pdu.data_intact:
            self._data_digest_failed(pdu)
            return
        handler = self._HANDLERS.get(pdu.opcode)
        if handler is None:
            self.session.reject(pdu, REJECT_NOT_SUPPORTED)
        elif pdu.opcode not in _SEQUENCED or self.session.accept(pdu):
            handler(self, pdu)

    def _data_digest_failed(self, pdu: Pdu) -> None:
        """Discard and reject; a Data-Out ends its task too, which cannot complete any more (RFC
        7143 7.8).
        """
        self.session.reject(pdu, REJECT_DATA_DIGEST)
        if pdu.opcode == DATA_OUT:
            task = self.session.tasks.get(pdu.itt)
            if isinstance(task, WriteTask) and task.collecting:
                task.data_digest_failed()

    def _nop_out(self, pdu: Pdu) -> None:
        if pdu.ttt != RESERVED_TAG and pdu.ttt == self._ping_tag:
            self._ping_tag = None
        if pdu.itt == RESERVED_TAG:
            return
        session = self.session
        data = bytes(pdu.data[: session.parameters.peer_data_segment_bytes])
        header = session.response_header(NOP_IN, pdu.itt, length=len(data), lun=pdu.lun)
        session.sender.put(header, data)

    def _scsi_command(self, pdu: Pdu) -> None:
        session = self.session
        if session.discovery or pdu.itt == RESERVED_TAG:
            raise ProtocolError(
                "a SCSI command in a discovery session, or with the reserved task tag"
            )
        if pdu.itt in session.tasks:
            self._refuse_command(pdu, REJECT_TASK_IN_PROGRESS)
            return
        if pdu.immediate and session.immediate_tasks >= limits.IMMEDIATE_COMMANDS_MAX:
            session.reject(pdu, REJECT_IMMEDIATE)
            return
        if pdu.flags & READ and pdu.flags & WRITE:
            self._refuse_command(pdu, REJECT_INVALID_FIELD)  # no command here moves data both ways
            return
        scsi_command.execute(session, self._allowance, pdu)

    def _refuse_command(self, pdu: Pdu, reason: int) -> None:
        self.session.reject(pdu, reason)
        if not pdu.immediate:
            self.session.open_window()

    def _data_out(self, pdu: Pdu) -> None:
        task = self.session.tasks.get(pdu.itt)
        # Data of a task that has ended or was aborted may still be on their way: they are dropped
        # (RFC 7143 11.5.1).
        if isinstance(task, WriteTask) and task.collecting and not task.aborted:
            task.take(pdu)

    def _task_management_request(self, pdu: Pdu) -> None:
        self.session.settle()
        self._task_management.handle(pdu)

    def _text_request(self, pdu: Pdu) -> None:
        self._text.handle(pdu)

    def _logout(self, pdu: Pdu) -> None:
        session = self.session
        session.settle()  # requests that came before are answered first
        reason = pdu.flags & 0x7F
        outcome = _LOGOUT_DONE
        if reason == _CLOSE_CONNECTION and pdu.word20 >> 16 != self._cid:
            outcome = _LOGOUT_NO_CONNECTION
        elif reason > _CLOSE_CONNECTION:
            outcome = _LOGOUT_NO_RECOVERY
        if outcome != _LOGOUT_DONE:
            session.sender.put(session.response_header(LOGOUT_RESPONSE, pdu.itt, byte2=outcome))
            return
        self._logging_out = True
        self._leave_fast_path()

        def quiet() -> None:
            self.logged_out = True
            header = session.response_header(LOGOUT_RESPONSE, pdu.itt, byte2=_LOGOUT_DONE)
            session.sender.put(header)
            session.sender.wake()

        session.abandon(quiet)

    def _snack(self, pdu: Pdu) -> None:
        # At error recovery level 0 nothing is kept that could be sent again (RFC 7143 11.16).
        self.session.reject(pdu, REJECT_SNACK)

    def _login_again(self, pdu: Pdu) -> None:
        raise ProtocolError("a login request in the full feature phase")

    # --- Life of the session ----------------------------------------------------------------------

    def ping(self) -> None:
        """Ask the initiator for a sign of life (NOP-In with a transfer tag; StatSN is told, not
        taken).
        """
        session = self.session
        self._ping_tag = session.take_transfer_tag()
        words = (self._ping_tag, session.stat_sn, session.exp_cmd_sn, session.max_cmd_sn, 0, 0, 0)
        session.sender.put(pack(NOP_IN, FINAL, RESERVED_TAG, words=words))

    def ask_for_logout(self, timeout_seconds: int) -> None:
        """Asynchronous message: the target wants the initiator to log out within this time (RFC
        7143 11.9.1).
        """
        tail = (ASYNC_LOGOUT_REQUESTED << 24, timeout_seconds, 0)
        self.session.sender.put(
            self.session.response_header(ASYNC_MESSAGE, RESERVED_TAG, tail=tail)
        )

    def release(self) -> None:
        """Drop the references to the volumes: nothing can happen any more."""
        self._leave_fast_path()
        self.session.units.clear()

    def _leave_fast_path(self) -> None:
        if self.fast is not None:
            self.fast.retire()
            self.fast = None

    _HANDLERS: ClassVar[dict[int, Callable[["FullFeaturePhase", Pdu], None]]] = {
        NOP_OUT: _nop_out,
        SCSI_COMMAND: _scsi_command,
        TASK_MANAGEMENT_REQUEST: _task_management_request,
        TEXT_REQUEST: _text_request,
        DATA_OUT: _data_out,
        LOGOUT_REQUEST: _logout,
        SNACK_REQUEST: _snack,
        LOGIN_REQUEST: _login_again,
    }
