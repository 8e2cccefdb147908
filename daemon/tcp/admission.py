"""Which TCP connections are taken, and how fast: a bound on all of them, and one on those of each
address that have not logged in.

The second keeps a stranger from holding every place: those connections end with the time that a
login may take, and until then others find room beside them. The pace keeps a flood from taking the
event loop's time: a login costs half a millisecond of it, in which no session is served.
"""

from typing import Final, Protocol

from daemon.process.logs import Repeats

# An initiator that starts logs in to all its targets by all its paths at once, some tens of
# connections, and tries again what is refused. A stranger holds no more than this, each for
# LOGIN_SECONDS_MAX and LOGIN_BUFFER_BYTES at most (protocol.iscsi.limits).
LOGINS_PER_ADDRESS_MAX: Final = 64
# Connections taken at once after a while without any: an initiator that starts, with all its paths.
BURST: Final = 64
# Connections a second from then on: at least this, a fiftieth of the event loop's time (at 100 a
# second the p99 of others' reads is three times as long), ...
PACE_MIN: Final = 40.0
# ... and so many that all that may be there come back within this time after a restart; initiators
# give a login 15 s.
RETURN_SECONDS: Final = 10.0
# To refuse a connection costs a tenth of what it costs to take it.
REFUSAL_COST: Final = 0.1
# Credit is a sum of products of times; what is missing by rounding alone is not waited for.
_ROUNDING: Final = 1e-6


class Admitted(Protocol):
    """A connection that was taken."""

    @property
    def logging_in(self) -> bool:
        """It lives, and is no normal session: its login has not ended, or led to discovery, which
        anybody may do.
        """


class Admission:
    """``connections_max`` bounds all connections of a protocol; ``full`` is why no more are taken.

    Invariant: ``_logging_in`` holds every one that has not logged in, by address.
    """

    def __init__(self, protocol: str, connections_max: int, full: str | None = None) -> None:
        self.protocol = protocol
        self.connections_max = connections_max
        self._full = full or f"{protocol}.connections_max {connections_max}"
        self._pace = max(PACE_MIN, connections_max / RETURN_SECONDS)
        self._credit = float(BURST)
        self._seen_seconds = 0.0
        self._connections = 0
        self._logging_in: dict[str, set[Admitted]] = {}
        self._refusals = Repeats(f"{protocol}.refused")

    def wait_seconds(self, now_seconds: float) -> float:
        """How long the next connection has to wait for its turn; 0: not at all. ``now_seconds`` is
        of any monotonic clock.
        """
        self._credit = min(BURST, self._credit + (now_seconds - self._seen_seconds) * self._pace)
        self._seen_seconds = now_seconds
        missing = 1.0 - self._credit
        return missing / self._pace if missing > _ROUNDING else 0.0

    def spend(self, taken: bool) -> None:
        """A connection was taken from the backlog, to serve it or only to close it."""
        self._credit -= 1.0 if taken else REFUSAL_COST

    def refusal(self, host: str) -> str | None:
        """Why no connection from ``host`` can be taken now; None when one can."""
        if self._connections >= self.connections_max:
            return self._full
        waiting = self._logging_in.get(host, set())
        # Those that have logged in since are found here, where it matters, so that a login needs to
        # tell nobody.
        waiting -= {connection for connection in waiting if not connection.logging_in}
        if len(waiting) >= LOGINS_PER_ADDRESS_MAX:
            return (
                f"{LOGINS_PER_ADDRESS_MAX} connections of this address are logging in or"
                " discovering"
            )
        return None

    def refused(self, peer: str, reason: str) -> None:
        """Log the first refusal for a reason at once, those that follow until `tick` as a number: a
        flood must not fill the log.
        """
        self._refusals.log(reason, peer=peer)

    def tick(self) -> None:
        """Some time has passed: tell of what was refused beside what was logged."""
        self._refusals.tick()

    def added(self, connection: Admitted, host: str) -> None:
        """A connection was taken."""
        self._connections += 1
        self._logging_in.setdefault(host, set()).add(connection)

    def removed(self, connection: Admitted, host: str) -> None:
        """A connection that was taken has ended."""
        self._connections -= 1
        waiting = self._logging_in.get(host)
        if waiting is not None:
            waiting.discard(connection)
            if not waiting:
                del self._logging_in[host]
