"""One client's connection, sans-IO: bytes in by ``get_buffer`` and ``buffer_updated``, out by the
transport's ``send``.

Made for ``asyncio.BufferedProtocol``: one wake-up fills the receive buffer, all whole requests in
it are carried out, the volume is settled once, and the replies leave together in one call of
``send``. Replies that are ready later ask for a flush by ``wake``, once for as many as gather until
``flush_output``.

Invariants: nothing is sent after ``close``; no exception but our own mistakes comes out of
``buffer_updated``; what was received before TLS is not looked at after it.
"""

from protocol.nbd import limits
from protocol.nbd.errors import NbdError, ProtocolError
from protocol.nbd.export import ExportDirectory
from protocol.nbd.framing import Outbox, ReceiveBuffer
from protocol.nbd.handshake import GREETING, Handshake, State, TlsMode
from protocol.nbd.listing import Listing
from protocol.nbd.session import Session
from protocol.nbd.transmission import Transmission
from protocol.nbd.transport import Transport


class NbdConnection:
    """One connection, in its handshake until ``session`` is there, then in its transmission phase.
    The peer's address is only reported.
    """

    __slots__ = (
        "_active",
        "_closed",
        "_ending_seconds",
        "_entered",
        "_handshake",
        "_last_seconds",
        "_listing",
        "_lost",
        "_outbox",
        "_paused",
        "_reading",
        "_receive",
        "_resting",
        "_started_seconds",
        "_tls_begun",
        "_transmission",
        "_transport",
        "_woken",
        "failure",
        "peer_address",
        "session",
        "tls_active",
    )

    def __init__(
        self, directory: ExportDirectory, mode: TlsMode, transport: Transport, peer_address: str
    ) -> None:
        self.peer_address = peer_address
        self.failure: str | None = None  # why it was ended, unless that was in order
        self.session: Session | None = None
        self.tls_active = False
        self._transport = transport
        self._receive = ReceiveBuffer(limits.HANDSHAKE_BUFFER_BYTES)
        self._outbox = Outbox()
        self._listing = Listing(transport.turn, self._flush_now, self._may_list, self._process)
        self._handshake = Handshake(directory, mode, self._outbox, self._listing)
        self._transmission: Transmission | None = None
        self._entered = False  # a wake-up is being handled
        self._woken = False
        self._paused = False
        self._resting = False  # what has been received waits for a turn
        self._reading = True
        self._closed = False
        self._lost = False
        self._tls_begun = False
        self._active = False  # an option was handled since the last tick
        self._started_seconds: float | None = None
        self._last_seconds = 0.0
        self._ending_seconds: float | None = None

    # --- Bytes ------------------------------------------------------------------------------------

    def start(self) -> None:
        """The connection is made: greet the client."""
        self._outbox.put(GREETING)
        self._flush_now()

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """The free part of the receive buffer; never empty while reading is wanted."""
        return self._receive.free()

    def buffer_updated(self, nbytes: int) -> None:
        """``nbytes`` were written into what ``get_buffer`` returned."""
        self._receive.end += nbytes
        self._process()

    def _process(self) -> None:
        """Carry out everything that has come, then settle, compact and flush."""
        if self._entered:
            return
        self._entered = True
        try:
            while self._carry_out():
                pass
        except NbdError as error:
            self._fail(str(error))
        finally:
            if self.session is not None:
                self.session.settle()
            self._entered = False
        if self._closed:
            self._receive.drop()
        self._receive.compact()
        self._finish_round()
        self._begin_tls()
        self._read_or_wait()

    def _carry_out(self) -> bool:
        """One round; True where another one may get further."""
        requests_end = limits.REQUESTS_A_TURN
        if self.session is not None:
            self.session.blocked = False
            requests_end += self.session.requests
        while not (self._closed or self._paused or self._resting):
            transmission = self._transmission
            if transmission is None:
                options = self._handshake.options
                self._handshake.run(self._receive)
                self._active = self._active or self._handshake.options > options
                if not self._after_handshake():
                    return False
            elif not transmission.run(self._receive):
                break
            if self._outbox.pending_bytes >= limits.OUTPUT_BYTES_HIGH:
                self._flush_now()
            if self.session is not None and self.session.requests >= requests_end:
                self._resting = True
                self._transport.turn(self._go_on)
        session = self.session
        if session is None or self._closed or self._paused or not session.blocked:
            return False
        at_volume = session.in_flight
        session.settle()
        return session.in_flight < at_volume

    def _go_on(self) -> None:
        """The turn for what a wake-up has left over."""
        self._resting = False
        if not self._closed:
            self._process()

    def _after_handshake(self) -> bool:
        """Act on where the handshake stands; True where the transmission phase begins."""
        handshake = self._handshake
        if handshake.state is State.ABORTED:
            self._end()
        elif handshake.state is State.TLS and self._receive.available:
            raise ProtocolError("bytes behind NBD_OPT_STARTTLS that are not of TLS")
        if handshake.entered is None:
            return False
        self.session = Session(
            handshake.entered,
            self._outbox,
            self._request_flush,
            self._flush_now,
            lambda: self._paused,
            self._transport.turn,
        )
        self._transmission = Transmission(self.session)
        self._receive.grow(limits.RECEIVE_BUFFER_BYTES)
        self.session.export.attach(self)
        return True

    def flush_output(self) -> None:
        """Send what is pending. The transport's side calls it once after each ``wake``."""
        self._woken = False
        if self._entered:
            return
        if self.session is not None and self.session.blocked:
            self._process()  # something has ended, so that more may begin
        else:
            self._finish_round()

    def _finish_round(self) -> None:
        self._flush_now()
        session = self.session
        if session is not None and session.disconnecting and not session.in_flight:
            self._end()

    def _flush_now(self) -> None:
        if self._outbox.pending and not self._lost:
            self._transport.send(self._outbox.take())

    def _request_flush(self) -> None:
        """A reply became ready: within a wake-up it leaves with the others, else a flush is asked
        for once.
        """
        if not (self._entered or self._woken or self._closed):
            self._woken = True
            self._transport.wake()

    def _read_or_wait(self) -> None:
        """Read only what can be handled: the rest waits in the kernel, then at the client."""
        if self._closed:
            return
        wanted = not (
            self._paused
            or self._resting
            or (self.session is not None and self.session.blocked)
            or self._handshake.state in {State.LISTING, State.TLS}
        )
        if wanted is not self._reading:
            self._reading = wanted
            self._transport.set_reading(wanted)

    def pause_writing(self) -> None:
        """The transport's buffer is full: nothing is carried out until `resume_writing`."""
        self._paused = True
        if not self._entered:
            self._read_or_wait()

    def resume_writing(self) -> None:
        """The client drains: go on with what waited, then with what has been received."""
        self._paused = False
        self._active = True
        self._listing.resume()
        if self.session is not None:
            self.session.resume()
        self._process()

    def _may_list(self) -> bool:
        return not (self._paused or self._closed)

    # --- TLS --------------------------------------------------------------------------------------

    def _begin_tls(self) -> None:
        """NBD_REP_ACK was the last thing in plain: nothing that was negotiated stays."""
        if self._handshake.state is State.TLS and not self._closed and not self._tls_begun:
            self._tls_begun = True
            self._read_or_wait()
            self._transport.start_tls()

    def tls_started(self, directory: ExportDirectory) -> None:
        """TLS is there, over a transport that reads; ``directory`` is that of the client whom it
        has identified.
        """
        assert self._handshake.state is State.TLS
        flags = self._handshake.client_flags
        self._receive.drop()
        shutting_down = self._handshake.shutting_down
        self._handshake = Handshake(
            directory, TlsMode.ACTIVE, self._outbox, self._listing, client_flags=flags
        )
        self._handshake.shutting_down = shutting_down
        self.tls_active = self._reading = self._active = True
        self._paused = False  # it was the plain transport that did not drain

    # --- End --------------------------------------------------------------------------------------

    def shutdown(self, reason: str) -> None:
        """The export goes, or the process stops: options are answered with NBD_REP_ERR_SHUTDOWN,
        requests with NBD_ESHUTDOWN, and after a while the connection is closed.
        """
        self._handshake.shutting_down = True
        if self.session is not None and self.session.ending is None:
            self.session.end(reason)

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._end()

    def _end(self) -> None:
        """Send what is pending, end the session, ask for the transport to be closed."""
        if self._closed:
            return
        if self.session is not None:
            self.session.settle()  # writes of this wake-up are answered while that is possible
        self._flush_now()
        self._closed = True
        self._close_session()
        self._transport.close()

    def _close_session(self) -> None:
        session = self.session
        if session is not None and not session.over:
            session.abandon(self._drained)

    def _drained(self) -> None:
        assert self.session is not None and self._transmission is not None
        self.session.export.detach(self)
        self._transmission.release()
        self._listing.release()

    def connection_lost(self) -> None:
        """The transport is gone, for whatever reason."""
        self._closed = self._lost = True
        self._close_session()
        if self.session is None:
            self._listing.release()
        if not self._entered:
            self._receive.release()

    def tick(self, now_seconds: float) -> None:
        """Time passes: the handshake must end, and a shutdown too. Call it every second or so, with
        any monotonic clock.
        """
        if self._started_seconds is None:
            self._started_seconds = self._last_seconds = now_seconds
        if self._closed:
            return
        if self._active:
            self._active, self._last_seconds = False, now_seconds
        ending = self._handshake.shutting_down or (
            self.session is not None and self.session.ending is not None
        )
        if ending:
            if self._ending_seconds is None:
                self._ending_seconds = now_seconds
            elif now_seconds - self._ending_seconds >= limits.SHUTDOWN_SECONDS:
                self._fail((self.session.ending if self.session else None) or "shutdown")
        elif self.session is None:
            if now_seconds - self._started_seconds > limits.HANDSHAKE_SECONDS_MAX:
                self._fail("the handshake took too long")
            elif now_seconds - self._last_seconds > limits.OPTION_SECONDS_MAX:
                self._fail("the client sends no option")

    # --- Reports ----------------------------------------------------------------------------------

    def describe(self) -> dict[str, object]:
        """What ``session ls`` shows; keys are stable, counters are plain ints."""
        session = self.session
        return {
            "export": session.export.name if session is not None else "",
            "address": self.peer_address,
            "tls": self.tls_active,
            "state": (
                "closed"
                if self._closed
                else "handshake"
                if session is None
                else "active"
                if session.ending is None
                else "ending"
            ),
            "replies": (
                "simple"
                if session is None or session.chunks is None
                else "extended"
                if session.extended
                else "structured"
            ),
            "requests_in_flight": session.in_flight if session is not None else 0,
            "requests": session.requests if session is not None else 0,
            "read_bytes": session.read_bytes if session is not None else 0,
            "write_bytes": session.write_bytes if session is not None else 0,
        }
