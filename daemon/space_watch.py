"""Says when a thin pool is filling up: once in the log and to every initiator, and again only after it was well below.

Clients wrote what they were promised room for; the pool has less. The earlier somebody learns of that, the more can be done.
"""

from collections.abc import Callable
from typing import Final

from daemon.logs import get_log

# How far below the threshold the use has to fall before it is told again: a pool at the threshold is not to ring all day.
REARM_PERCENT: Final = 5


class SpaceWatch:
    """``reached`` is called each time the use rises to ``threshold_percent``."""

    def __init__(self, threshold_percent: int, reached: Callable[[], None]) -> None:
        self._threshold_percent = threshold_percent
        self._reached = reached
        self._armed = True

    def look(self, used_bytes: int, available_bytes: int) -> None:
        """The pool's space now. Call it every second or so."""
        percent = 100 * used_bytes / max(1, used_bytes + available_bytes)
        if percent < self._threshold_percent - REARM_PERCENT:
            self._armed = True
        elif self._armed and percent >= self._threshold_percent:
            self._armed = False
            fields = {"used_bytes": used_bytes, "available_bytes": available_bytes, "percent": round(percent, 1)}
            get_log().warning("pool.filling", **fields)
            self._reached()
