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

from protocol.iscsi import fast_path, limits
from protocol.iscsi.errors import IscsiError, LoginRefused, ProtocolError, TextError
from protocol.iscsi.framing import ReceiveBuffer, Sender
from protocol.iscsi.full_feature import FullFeature
from protocol.iscsi.login import LoginPhase, LoginResult, refusal
from protocol.iscsi.node import SessionKey, TargetNode
from protocol.iscsi.pdu import LOGIN_REQUEST, Pdu
from protocol.iscsi.text_exchange import TextExchange
from protocol.scsi.logical_unit import LogicalUnit, Nexus
from protocol.volume import Buffer


class TargetConnection:
    """One connection. The daemon gives three callables and calls the methods; the addresses are
    only reported.

    ``send(buffers)`` hands over what is to be written, in order. ``wake()`` asks for one
    ``flush_output()`` soon. ``close()`` asks to close the transport once everything sent has been
    written; ``connection_lost`` follows.
    """

    __slots__ = (
        "_active",
        "_close",
        "_closed",
        "_entered",
        "_key",
        "_last_seconds",
        "_login",
        "_lost",
        "_paused",
        "_phase",
        "_pinged",
        "_receive",
        "_send",
        "_sender",
        "_session_over",
        "_started_seconds",
        "_wake",
        "_woken",
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
        self._send = send
        self._wake = wake
        self._close = close
        self._receive = ReceiveBuffer(limits.LOGIN_BUFFER_BYTES, limits.LOGIN_DATA_SEGMENT_BYTES)
        self._sender = Sender()
        self._login: LoginPhase | None = LoginPhase(node, self._sender.put)
        self._phase: FullFeature | None = None
        self._key: SessionKey | None = None
        self._entered = False
        self._woken = False
        self._paused = False
        self._closed = False
        self._lost = False
        self._session_over = False
        self._active = False
        self._pinged = False
        self._started_seconds: float | None = None
        self._last_seconds = 0.0

    # --- Bytes ------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """The free part of the receive buffer; never empty while the transport is not paused."""
        return self._receive.free()

    def buffer_updated(self, nbytes: int) -> None:
        """``nbytes`` were written into what ``get_buffer`` returned."""
        self._receive.end += nbytes
        self._active = True
        self._process()

    def _process(self) -> None:
        """Carry out everything that has come, then settle, compact and flush."""
        if self._entered:
            return
        self._entered = True
        try:
            self._carry_out()
        except IscsiError as error:
            self._fail(str(error))
        finally:
            phase = self._phase
            if phase is not None:
                phase.settle()
            self._entered = False
        if self._closed:
            self._receive.start = self._receive.end
        self._receive.compact()
        self.flush_output()

    def _carry_out(self) -> None:
        receive, sender = self._receive, self._sender
        while not (self._closed or self._paused):
            phase = self._phase
            if phase is not None and phase.fast:
                fast_path.run(phase, receive)
                if sender.pending_bytes >= limits.OUTPUT_BYTES_HIGH:
                    self._flush_now()
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
                self._flush_now()

    def flush_output(self) -> None:
        """Send what is pending. The daemon calls it once after each ``wake``."""
        self._woken = False
        if self._entered:
            return
        self._flush_now()
        if self._phase is not None and self._phase.logged_out:
            self._end()

    def _flush_now(self) -> None:
        if self._sender.pending and not self._lost:
            self._send(self._sender.take())

    def _request_flush(self) -> None:
        """A reply became ready: within a wake-up it leaves with the others, else a flush is asked
        for once.
        """
        if not (self._entered or self._woken or self._closed):
            self._woken = True
            self._wake()

    def pause_writing(self) -> None:
        """The transport's buffer is full: no command is carried out until `resume_writing`. The
        daemon pauses reading too.
        """
        self._paused = True

    def resume_writing(self) -> None:
        """The client drains: go on with reads under way, then with what has been received.

        That may call `pause_writing` again: whether to read is for ``paused`` to say.
        """
        self._paused = False
        self._active = (
            True  # it takes what it is sent: a sign of life, though nothing is read of it meanwhile
        )
        if self._phase is not None:
            self._phase.resume()
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
            self._enter(result, login.stat_sn, Nexus(result.initiator_name, ""))
            return
        self.target_name = result.target.name
        self._key = (result.initiator_name, result.isid, result.target.name)
        self.node.reinstate(self._key, self, lambda: self._open_session(result, login.stat_sn))

    def _open_session(self, result: LoginResult, stat_sn: int) -> None:
        """No older session is in the way: make the nexus and answer the login.

        The target is looked up again: its LUNs and whom it is for may have changed since the login
        began.
        """
        assert result.target is not None and self._key is not None
        if self._closed or self._lost:
            return
        target = self.node.directory.open_target(result.target.name, result.initiator_name)
        if target is None:
            self._fail(
                f"the target {result.target.name} went, or was taken from this initiator, during"
                " its login"
            )
            return
        port = f"{result.initiator_name},i,0x{result.isid:012x}"
        self._enter(result, stat_sn, self.node.open_nexus(target, port))
        self.node.register(self._key, self)
        self._request_flush()

    def _enter(self, result: LoginResult, stat_sn: int, nexus: Nexus) -> None:
        self.tsih = self.node.take_tsih()
        window_end = (result.cmd_sn + limits.COMMAND_WINDOW - 1) & 0xFFFFFFFF
        self._sender.put(
            result.final_header(self.tsih, result.cmd_sn, window_end), result.final_text
        )
        portal = self.portal_address
        node = self.node
        text = TextExchange(
            lambda: node.directory.names_for(result.initiator_name, portal),
            lambda: node.portals(portal),
            node.turns,
        )
        self._phase = FullFeature(
            result,
            nexus,
            self._sender,
            stat_sn + 1,
            text,
            self._request_flush,
            self._flush_now,
            lambda: self._paused or self._closed,
            lambda: self.node.terminate_target(self.target_name),
        )
        # Digests begin after the final login response.
        self._receive.header_digest = self._sender.header_digest = result.parameters.header_digest
        self._receive.data_digest = self._sender.data_digest = result.parameters.data_digest
        if not result.discovery:
            self._receive.grow(limits.RECEIVE_BUFFER_BYTES, limits.RECEIVE_DATA_SEGMENT_BYTES)

    # --- End --------------------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._end()

    def _end(self) -> None:
        """Send what is pending, end the session, ask for the transport to be closed."""
        if self._closed:
            return
        if self._phase is not None and not self._session_over:
            self._phase.settle()  # the writes of this wake-up are answered while that is possible
        self._flush_now()
        self._closed = True
        self._close_session()
        self._close()

    def _close_session(self) -> None:
        phase = self._phase
        if phase is not None and not self._session_over:
            self._session_over = True
            phase.abandon(self._drained)

    def _drained(self) -> None:
        phase = self._phase
        assert phase is not None
        self.node.close_nexus(phase.nexus)
        if self._key is not None:
            self.node.unregister(self._key, self, self.tsih)
        else:
            self.node.release_tsih(self.tsih)
        phase.release()

    def connection_lost(self) -> None:
        """The transport is gone, for whatever reason."""
        self._closed = self._lost = True
        self._close_session()
        if not self._entered:
            self._receive.release()

    def reinstated(self, drained: Callable[[], None]) -> None:
        """The same initiator port has logged in again: end at once (RFC 7143 6.3.5), and say when
        nothing touches a volume.
        """
        phase = self._phase
        self._end()
        if phase is not None and phase.tasks:
            earlier = phase.when_drained

            def both() -> None:
                if earlier is not None:
                    earlier()
                drained()

            phase.when_drained = both
        else:
            drained()

    def terminated(self) -> None:
        """The target was reset cold."""
        self._end()

    def lun_mapped(self, lun: int, unit: LogicalUnit) -> None:
        """The session's target has one logical unit more."""
        if self._phase is not None:
            self._phase.map_lun(lun, unit)

    def lun_unmapped(self, lun: int) -> None:
        """The session's target has that logical unit no more."""
        if self._phase is not None:
            self._phase.unmap_lun(lun)

    def shutdown(self, timeout_seconds: int) -> None:
        """Ask the initiator to log out; the daemon closes after the timeout. Before the full
        feature phase: close now.
        """
        if self._phase is None:
            self._end()
        elif not self._closed:
            self._phase.ask_for_logout(timeout_seconds)
            self.flush_output()

    def tick(self, now_seconds: float) -> None:
        """Time passes: login timeout, keep-alive. Call it every second or so, with any monotonic
        clock.
        """
        if self._started_seconds is None:
            self._started_seconds = self._last_seconds = now_seconds
        if self._closed:
            return
        if self._phase is None:
            if now_seconds - self._started_seconds > limits.LOGIN_SECONDS_MAX:
                self._fail("the login took too long")
            return
        if (
            self._phase.discovery
            and now_seconds - self._started_seconds > limits.DISCOVERY_SECONDS_MAX
        ):
            self._fail("the discovery session took too long")
            return
        if self._active:
            self._active = self._pinged = False
            self._last_seconds = now_seconds
        elif now_seconds - self._last_seconds >= (
            limits.KEEP_ALIVE_ANSWER_SECONDS if self._pinged else limits.KEEP_ALIVE_SECONDS
        ):
            self._last_seconds = now_seconds
            self._keep_alive(self._phase)

    def _keep_alive(self, phase: FullFeature) -> None:
        if self._pinged:
            self._fail("the initiator does not answer")
            return
        self._pinged = True
        phase.ping()
        self.flush_output()

    # --- Reports ----------------------------------------------------------------------------------

    @property
    def logged_in(self) -> bool:
        """The login has ended well."""
        return self._phase is not None

    @property
    def discovery(self) -> bool:
        """It is a discovery session."""
        return self._phase is not None and self._phase.discovery

    @property
    def paused(self) -> bool:
        """The client does not drain: nothing is to be read."""
        return self._paused

    @property
    def commands_in_flight(self) -> int:
        """Commands between their PDU and their status."""
        return len(self._phase.tasks) if self._phase is not None else 0

    def describe(self) -> dict[str, object]:
        """What ``session ls`` shows; keys are stable, counters are plain ints."""
        phase = self._phase
        parameters = phase.parameters if phase is not None else None
        return {
            "initiator": self.initiator_name,
            "target": self.target_name,
            "address": self.peer_address,
            "portal": self.portal_address,
            "tsih": self.tsih,
            "state": (
                "closed"
                if self._closed
                else "login"
                if phase is None
                else "discovery"
                if phase.discovery
                else "active"
            ),
            "header_digest": bool(parameters and parameters.header_digest),
            "data_digest": bool(parameters and parameters.data_digest),
            "commands_in_flight": self.commands_in_flight,
            "commands": phase.commands if phase is not None else 0,
            "read_bytes": phase.read_bytes if phase is not None else 0,
            "write_bytes": phase.write_bytes if phase is not None else 0,
        }
