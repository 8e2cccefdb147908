"""Which TCP connections are taken: a bound on all of them, and one on those of each address that have not logged in.

The second keeps a stranger from holding every place: his connections end with the time that a login may take, and until then
others find room beside them.
"""

from collections import Counter
from typing import Final, Protocol

from daemon.logs import get_log

# An initiator that starts logs in to all its targets by all its paths at once, some tens of connections, and tries again what is
# refused. A stranger holds no more than this, each for LOGIN_SECONDS_MAX and LOGIN_BUFFER_BYTES at most (protocol.iscsi.limits).
LOGINS_PER_ADDRESS_MAX: Final = 64


class Admitted(Protocol):
    """A connection that was taken."""

    @property
    def logging_in(self) -> bool:
        """It lives, and its login has not ended."""


class Admission:
    """``connections_max`` bounds all connections. Invariant: ``_logging_in`` holds every one that has not logged in, by address."""

    def __init__(self, connections_max: int) -> None:
        self.connections_max = connections_max
        self._connections = 0
        self._logging_in: dict[str, set[Admitted]] = {}
        self._refused: Counter[str] = Counter()

    def refusal(self, host: str) -> str | None:
        """Why no connection from ``host`` can be taken now; None when one can."""
        if self._connections >= self.connections_max:
            return f"iscsi.connections_max {self.connections_max}"
        waiting = self._logging_in.get(host, set())
        # Those that have logged in since are found here, where it matters, so that a login needs to tell nobody.
        waiting -= {connection for connection in waiting if not connection.logging_in}
        if len(waiting) >= LOGINS_PER_ADDRESS_MAX:
            return f"{LOGINS_PER_ADDRESS_MAX} connections of this address have not logged in"
        return None

    def refused(self, peer: str, reason: str) -> None:
        """Log the first refusal for a reason at once, those that follow until `tick` as a number: a flood must not fill the log."""
        self._refused[reason] += 1
        if self._refused[reason] == 1:
            get_log().warning("iscsi.refused", peer=peer, reason=reason, times=1)

    def tick(self) -> None:
        """Some time has passed: tell of what was refused beside what was logged."""
        for reason, times in self._refused.items():
            if times > 1:
                get_log().warning("iscsi.refused", peer=None, reason=reason, times=times - 1)
        self._refused.clear()

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
