"""Says when a thin pool is filling up: once in the log and to every initiator, and again only after it was well below.

Clients wrote what they were promised room for; the pool has less. The earlier somebody learns of that, the more can be done.
"""

from collections.abc import Callable
from typing import Final

from daemon.logs import get_log
from daemon.pool_interface import Row
from daemon.units import format_size

# How far below the threshold the use has to fall before it is told again: a pool at the threshold is not to ring all day.
REARM_PERCENT: Final = 5
# With less than this a pool is as good as full: a few blocks come and go with each consistency point, and one write of a client takes more.
FULL_BYTES: Final = 1 << 20


class SpaceWatch:
    """``reached`` is called each time the use rises to ``threshold_percent``."""

    def __init__(self, threshold_percent: int, reached: Callable[[], None]) -> None:
        self._threshold_percent = threshold_percent
        self._reached = reached
        self._armed = True

    def look(self, used_bytes: int, available_bytes: int) -> None:
        """The pool's space now. Call it every second or so."""
        percent = percent_used(used_bytes, available_bytes)
        if percent < self._threshold_percent - REARM_PERCENT:
            self._armed = True
        elif self._armed and percent >= self._threshold_percent:
            self._armed = False
            fields = {"used_bytes": used_bytes, "available_bytes": available_bytes, "percent": round(percent, 1)}
            get_log().warning("pool.filling", **fields)
            self._reached()


def percent_used(used_bytes: int, available_bytes: int) -> float:
    """Of what vdisks may take: the pool's own reserve does not count."""
    return 100 * used_bytes / max(1, used_bytes + available_bytes)


def space_warnings(shown: Row, threshold_percent: int) -> list[str]:
    """What to tell somebody who asks for more on a pool (as ``show`` describes it) that is full or nearly so: sentences, or nothing."""
    available = shown["available_bytes"]
    percent = percent_used(shown["used_bytes"], available)
    has_room = available >= FULL_BYTES
    if has_room and percent < threshold_percent:
        return []
    if has_room:
        cause = f"the pool is {percent:.0f} % full: writes will be refused when the last {format_size(available)} are taken"
    else:
        cause = "the pool is full: writes will be refused until there is room"
    if shown["deleted_images"]:
        return [f"{cause}; what was deleted is still being freed: cleavectl pool show tells when there is room"]
    return [f"{cause}; delete snapshots or vdisks that nobody needs: cleavectl snapshot ls and cleavectl vdisk ls show them"]
