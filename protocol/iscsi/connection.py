"""One TCP connection of the target, sans-IO: bytes in by ``get_buffer`` and ``buffer_updated``, out
by ``send``.

Made for ``asyncio.BufferedProtocol``: one wake-up fills the receive buffer, all whole PDUs in it
are carried out, every touched volume is settled once, and the replies leave together in one call of
``send``. Replies that are ready later (a read that missed the cache, a durable write) ask for a
flush by ``wake``, once for as many as gather until ``flush_output``.

Invariants: ``send``, ``wake`` and ``close`` are never called inside one another by this class;
after ``close`` was called nothing is sent any more; no exception but our own mistakes comes out of
``buffer_updated``.
"""

from collections.abc import Callable

from protocol.iscsi import limits
from protocol.iscsi.errors import IscsiError, LoginRefused, ProtocolError, TextError
from protocol.iscsi.framing import ReceiveBuffer, Sender
from protocol.iscsi.full_feature import FullFeaturePhase
from protocol.iscsi.login import LoginPhase, LoginResult, refusal
from protocol.iscsi.node import SessionKey, TargetNode
from protocol.iscsi.pdu import LOGIN_REQUEST, SERIAL_MASK, Pdu
from protocol.iscsi.session import NO_SESSION, Session, Task
from protocol.names import initiator_port
from protocol.scsi.logical_unit import LogicalUnit, Nexus
from protocol.volume import Buffer


class Timeouts:
    """The timeouts of a connection: for login, for a discovery session, and for an initiator that
    is silent. ``heard`` is set by each sign of life.
    """

    __slots__ = ("_asked", "_began_seconds", "_silent_since_seconds", "heard")

    def __init__(self) -> None:
        self._began_seconds: float | None = None
        self._silent_since_seconds = 0.0
        self._asked = False
        self.heard = False

    def passed(self, now_seconds: float, phase: FullFeaturePhase | None) -> str | None:
        """Why the connection must end now, or None. Asks an initiator that has been silent for a
        while (NOP-In).
        """
        if self._began_seconds is None:
            self._began_seconds = self._silent_since_seconds = now_seconds
        age_seconds = now_seconds - self._began_seconds
        if phase is None:
            too_long = age_seconds > limits.LOGIN_SECONDS_MAX
            return "the login took too long" if too_long else None
        if phase.session.discovery and age_seconds > limits.DISCOVERY_SECONDS_MAX:
            return "the discovery session took too long"
        if self.heard:
            self.heard = self._asked = False
            self._silent_since_seconds = now_seconds
            return None
        allowed = limits.KEEP_ALIVE_ANSWER_SECONDS if self._asked else limits.KEEP_ALIVE_SECONDS
        if now_seconds - self._silent_since_seconds < allowed:
            return None
        if self._asked:
            return "the initiator does not answer"
        self._asked = True
        self._silent_since_seconds = now_seconds
        phase.ping()
        phase.session.sender.flush()
        return None


class TargetConnection:
    """One connection. The daemon passes three callables and calls the methods; the addresses are
    only for reports.

    ``send(buffers)`` hands over what is to be written, in order. ``wake()`` asks for one
    ``flush_output()`` soon. ``close()`` asks to close the transport once everything sent has been
    written; ``connection_lost`` follows.
    """

    __slots__ = (
        "_close",
        "_key",
        "_login",
        "_phase",
        "_receive",
        "_sender",
        "_timeouts",
        "failure",
        "initiator_name",
        "node",
        "peer_address",
        "portal_address",
        "target_name",
        "tsih",
    )

    def __init__(
        self,
        node: TargetNode,
        send: Callable[[list[Buffer]], None],
        wake: Callable[[], None],
        close: Callable[[], None],
        portal_address: str,
        peer_address: str,
    ) -> None:
        self.node = node
        self.portal_address = portal_address
        self.peer_address = peer_address
        self.initiator_name = ""
        self.target_name = ""
        self.tsih = 0
        self.failure: str | None = None  # why it was ended, unless that was in order
        self._close = close
        self._receive = ReceiveBuffer(limits.LOGIN_BUFFER_BYTES, limits.LOGIN_DATA_SEGMENT_BYTES)
        self._sender = Sender(send, wake)
        self._login: LoginPhase | None = LoginPhase(node, self._sender.put)
        self._phase: FullFeaturePhase | None = None
        self._key: SessionKey | None = None
        self._timeouts = Timeouts()

    # --- Bytes ------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """The free part of the receive buffer; never empty while the transport is not paused."""
        return self._receive.free()

    def buffer_updated(self, nbytes: int) -> None:
        """``nbytes`` were written into what ``get_buffer`` returned."""
        self._receive.end += nbytes
        self._timeouts.heard = True
        self._process()

    def _process(self) -> None:
        """Carry out everything that has come, then settle, compact and flush."""
        sender = self._sender
        if sender.corked:
            return
        sender.corked = True
        try:
            self._carry_out()
        except IscsiError as error:
            self._fail(str(error))
        finally:
            phase = self._phase
            if phase is not None:
                phase.session.settle()
            sender.corked = False
        if self._sender.closed:
            self._receive.start = self._receive.end
        self._receive.compact()
        self.flush_output()

    def _carry_out(self) -> None:
        receive, sender = self._receive, self._sender
        while not (self._sender.closed or sender.paused):
            phase = self._phase
            if phase is not None and phase.fast is not None:
                phase.fast.run(receive)
                if sender.pending_bytes >= limits.OUTPUT_BYTES_HIGH:
                    sender.flush()
                    continue
            pdu = receive.next_pdu()
            if pdu is None:
                return
            if phase is not None:
                phase.handle(pdu)
                if phase.logged_out:
                    self._end()
            else:
                self._handle_login(pdu)
            if sender.pending_bytes >= limits.OUTPUT_BYTES_HIGH:
                sender.flush()

    def flush_output(self) -> None:
        """Send what is pending. The daemon calls it once after each ``wake``."""
        if self._sender.corked:
            return
        self._sender.flush()
        if self._phase is not None and self._phase.logged_out:
            self._end()

    def pause_writing(self) -> None:
        """The transport's buffer is full: no command is carried out until `resume_writing`. The
        daemon pauses reading too.
        """
        self._sender.paused = True

    def resume_writing(self) -> None:
        """The client drains: continue reads under way, then process what has been received.

        That may call `pause_writing` again: look at ``paused`` before reading on.
        """
        # The peer takes what it is sent. That is a sign of life, even if it sends nothing.
        self._timeouts.heard = True
        self._sender.resume()
        self._process()

    # --- Login ------------------------------------------------------------------------------------

    def _handle_login(self, pdu: Pdu) -> None:
        login = self._login
        if login is None or pdu.opcode != LOGIN_REQUEST or not pdu.immediate:
            raise ProtocolError("a PDU other than a login request before the login has ended")
        try:
            result = login.handle(pdu)
        except (LoginRefused, TextError) as error:
            status = error.status if isinstance(error, LoginRefused) else LoginRefused.status
            self._sender.put(refusal(pdu, login.stat_sn, status))
            raise
        finally:
            self.initiator_name = login.initiator_name
        if result is None:
            return
        self._login = None
        if result.target is None:
            self._enter(result, login.stat_sn, Nexus(result.initiator_name, ""), {})
            return
        self.target_name = result.target.name
        self._key = (result.initiator_name, result.isid, result.target.name)
        self.node.reinstate(self._key, self, lambda: self._open_session(result, login.stat_sn))

    def _open_session(self, result: LoginResult, stat_sn: int) -> None:
        """Make the nexus and answer the login, now that no older session of this initiator port
        exists.

        The target is looked up again: its LUNs and access list may have changed since the login
        began.
        """
        assert result.target is not None and self._key is not None
        if self._sender.closed:
            return
        target = self.node.directory.open_target(result.target.name, result.initiator_name)
        if target is None:
            self._fail(
                f"the target {result.target.name} went, or was taken from this initiator, during"
                " its login"
            )
            return
        port = initiator_port(result.initiator_name, result.isid)
        tasks: dict[int, Task] = {}
        nexus = self.node.open_nexus(target, port, tasks.values())
        self._enter(result, stat_sn, nexus, tasks)
        self.node.register(self._key, self)
        self._sender.wake()

    def _enter(
        self, result: LoginResult, stat_sn: int, nexus: Nexus, tasks: dict[int, Task]
    ) -> None:
        """Answer the login, and begin the full feature phase."""
        sender = self._sender
        self.tsih = self.node.take_tsih()
        session = Session(result, nexus, tasks, sender, (stat_sn + 1) & SERIAL_MASK)
        sender.put(
            result.final_header(self.tsih, session.exp_cmd_sn, session.max_cmd_sn),
            result.final_text,
        )
        self._phase = FullFeaturePhase(session, self.node, result.cid, self.portal_address)
        # Digests begin after the final login response.
        self._receive.header_digest = sender.header_digest = result.parameters.header_digest
        self._receive.data_digest = sender.data_digest = result.parameters.data_digest
        if not result.discovery:
            self._receive.grow(limits.RECEIVE_BUFFER_BYTES, limits.RECEIVE_DATA_SEGMENT_BYTES)

    # --- End --------------------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._end()

    def _end(self) -> None:
        """Send what is pending, end the session, ask for the transport to be closed."""
        if self._sender.closed:
            return
        if self._phase is not None:
            # Answer the writes of this wake-up while the connection is still open.
            self._phase.session.settle()
        self._sender.flush()
        self._close_session()
        self._close()

    def _close_session(self) -> None:
        self._sender.closed = True
        if self._phase is not None:
            self._phase.session.abandon(self._quiet)

    def _quiet(self) -> None:
        """No volume holds a command of this session any more."""
        phase = self._phase
        assert phase is not None
        self.node.close_nexus(phase.session.nexus)
        if self._key is not None:
            self.node.unregister(self._key, self, self.tsih)
        else:
            self.node.release_tsih(self.tsih)
        phase.release()

    def connection_lost(self) -> None:
        """The transport is gone, for whatever reason."""
        if not self._sender.closed:
            self._close_session()
        if not self._sender.corked:
            self._receive.release()

    def reinstated(self, quiet: Callable[[], None]) -> None:
        """The same initiator port has logged in again: end at once (RFC 7143 6.3.5), and call
        ``quiet`` when no command of this session can touch a volume.
        """
        phase = self._phase
        self._end()
        if phase is None:
            quiet()
        else:
            phase.session.when_quiet(quiet)

    def terminated(self) -> None:
        """The target was reset cold."""
        self._end()

    def lun_mapped(self, lun: int, unit: LogicalUnit) -> None:
        """The session's target has one logical unit more."""
        if self._phase is not None:
            self._phase.session.map_lun(lun, unit)

    def lun_unmapped(self, lun: int) -> None:
        """The session's target has that logical unit no more."""
        if self._phase is not None:
            self._phase.session.unmap_lun(lun)

    def shutdown(self, timeout_seconds: int) -> None:
        """Ask the initiator to log out; the daemon closes after the timeout. Before the full
        feature phase: close now.
        """
        if self._phase is None:
            self._end()
        elif not self._sender.closed:
            self._phase.ask_for_logout(timeout_seconds)
            self.flush_output()

    def tick(self, now_seconds: float) -> None:
        """Time passes: login timeout, keep-alive. Call it every second or so, with any monotonic
        clock.
        """
        if self._sender.closed:
            return
        reason = self._timeouts.passed(now_seconds, self._phase)
        if reason is not None:
            self._fail(reason)

    # --- Reports ----------------------------------------------------------------------------------

    @property
    def logged_in(self) -> bool:
        """The login has succeeded."""
        return self._phase is not None

    @property
    def discovery(self) -> bool:
        """It is a discovery session."""
        return self._phase is not None and self._phase.session.discovery

    @property
    def paused(self) -> bool:
        """The client does not drain, so do not read from it."""
        return self._sender.paused

    def describe(self) -> dict[str, object]:
        """What ``session ls`` shows; keys are stable, counters are plain ints."""
        session = self._phase.session if self._phase is not None else None
        return {
            "initiator": self.initiator_name,
            "target": self.target_name,
            "address": self.peer_address,
            "portal": self.portal_address,
            "tsih": self.tsih,
            "state": (
                "closed"
                if self._sender.closed
                else "login"
                if session is None
                else "discovery"
                if session.discovery
                else "active"
            ),
            **(NO_SESSION if session is None else session.describe()),
        }
