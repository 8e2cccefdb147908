"""Pace: how much the background may do (design section 5).

Idle (no client I/O for IDLE_SECONDS): full speed. Under load: after each message the handler rests
for a multiple of the time that the message took, so that clients meet it seldom; the multiple grows
when the event loop, and so every client, is kept waiting, and shrinks again when it is not. Two
bounds: work under load never falls below ``rate_min_bytes`` a second, so that it always ends, and
never goes above ``rate_max_bytes`` if that is set (the handler sees to the latter: a ceiling for
one work must not keep others waiting).
"""

import asyncio
from time import perf_counter

from storage.state.pool_state import PoolState

IDLE_SECONDS = 0.05
# Under load, background work takes at most 1/(1 + REST_MIN) of the time, and backs off from there.
# With 4 a split ran at 80 MiB/s beside 4,000 client I/Os a second, and their p99 was seven times
# that without it (docs/performance.md).
REST_MIN = 20.0
REST_MAX = 64.0
# A turn of the event loop above this keeps clients waiting noticeably.
TURN_SECONDS_MAX = 0.001
BACK_OFF = 2.0
RECOVER = 0.95
# Small enough to be met seldom: at 1 MiB a message that is one message in 42 ms.
RATE_MIN_BYTES_DEFAULT = 24 << 20
# Clients may be gone long before a longer rest is over.
REST_SECONDS_MAX = 0.5


class Pace:
    """Measures client activity, and says how long to rest."""

    __slots__ = ("_busy_at", "_operations", "_rest", "_state")

    def __init__(self, state: PoolState) -> None:
        self._state = state
        self._operations = state.operations
        self._busy_at = 0.0
        self._rest = REST_MIN

    @property
    def idle(self) -> bool:
        """Whether no client did anything for IDLE_SECONDS."""
        now = perf_counter()
        if self._state.operations != self._operations:
            self._operations = self._state.operations
            self._busy_at = now
        return now - self._busy_at > IDLE_SECONDS

    async def rest(self, worked_seconds: float, work_bytes: int, rate_min_bytes: int) -> None:
        """Wait as long as a message of ``work_bytes`` that took ``worked_seconds`` asks for; at
        least one turn of the event loop.
        """
        started = perf_counter()
        await asyncio.sleep(0)
        turn = perf_counter() - started
        seconds = 0.0
        if not self.idle:
            self._rest = (
                min(REST_MAX, self._rest * BACK_OFF)
                if turn > TURN_SECONDS_MAX
                else max(REST_MIN, self._rest * RECOVER)
            )
            seconds = worked_seconds * self._rest
            if work_bytes:
                seconds = min(
                    seconds,
                    max(
                        0.0,
                        work_bytes / (rate_min_bytes or RATE_MIN_BYTES_DEFAULT) - worked_seconds,
                    ),
                )
        if seconds > turn:
            await asyncio.sleep(min(seconds - turn, REST_SECONDS_MAX))
