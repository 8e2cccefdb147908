"""Says when a thin pool, or the host under it, is running out of room: once for each threshold, in
the log and to every initiator.

Clients wrote what they were promised room for; the pool has less. The earlier somebody learns of
that, the more can be done. A threshold that was reached is reported again only after the use was
well below it.
"""

from collections.abc import Callable
from typing import Any, Final

from daemon.process.logs import log_at
from daemon.process.units import format_size

# How far below a threshold the use has to fall before it is told again: a pool at the threshold is
# not to ring all day.
REARM_PERCENT: Final = 5
# After the threshold that is configured, which may be early, these say that it is urgent.
WARNING_PERCENTS: Final = (90, 95)
# Less than a thousandth is left: a write of more than that is refused already.
FULL_PERCENT: Final = 99.9
# With less than this a pool is as good as full: a few blocks come and go with each consistency
# point, and one write of a client takes more.
FULL_BYTES: Final = 1 << 20


class Threshold:
    """One share of the space that data can take. ``reached`` from when it is used so far until the
    use is well below it.
    """

    def __init__(self, event: str, percent: float, level: str = "warning", **fields: Any) -> None:
        self.event = event
        self.percent = percent
        self.level = level
        self.fields = fields
        self.reached = False

    def rises(self, percent: float) -> bool:
        """Whether it is reached now, and was not before."""
        if self.reached:
            self.reached = percent >= self.percent - REARM_PERCENT
            return False
        self.reached = percent >= self.percent
        return self.reached


class SpaceWatch:
    """``reached`` is called each time the use rises to one of the thresholds: every initiator is to
    be told.
    """

    def __init__(self, threshold_percent: int, reached: Callable[[], None]) -> None:
        self.threshold_percent = threshold_percent
        self._reached = reached
        # At the last look.
        self._percent = 0.0
        self._thresholds = [
            Threshold("pool.filling", threshold_percent),
            *(
                Threshold("pool.space_warning", percent, threshold_percent=percent)
                for percent in WARNING_PERCENTS
            ),
            Threshold("pool.full", FULL_PERCENT, "error"),
        ]

    def look(self, used_bytes: int, available_bytes: int) -> None:
        """The pool's space now. Call it every second or so."""
        percent = self._percent = percent_used(used_bytes, available_bytes)
        risen = [threshold for threshold in self._thresholds if threshold.rises(percent)]
        for threshold in risen:
            fields = {
                "used_bytes": used_bytes,
                "available_bytes": available_bytes,
                "percent": round(percent, 1),
                **threshold.fields,
            }
            log_at(threshold.level, threshold.event, **fields)
        if risen:
            self._reached()

    def shown(self) -> dict[str, Any]:
        """Two keys of ``pool show``: whether the pool is full, and the highest of the warnings'
        thresholds that it is above.
        """
        reached = [percent for percent in WARNING_PERCENTS if self._percent >= percent]
        return {
            "full": self._percent >= FULL_PERCENT,
            "space_warning_percent": max(reached, default=None),
        }


def percent_used(used_bytes: int, available_bytes: int) -> float:
    """Of what vdisks may take: the pool's own reserve does not count."""
    return 100 * used_bytes / max(1, used_bytes + available_bytes)


def space_warnings(
    used_bytes: int, available_bytes: int, deleted_images: int, threshold_percent: int
) -> list[str]:
    """Warnings for a request that will want room, where the pool is full or nearly so: sentences,
    or nothing.
    """
    percent = percent_used(used_bytes, available_bytes)
    has_room = available_bytes >= FULL_BYTES
    if has_room and percent < threshold_percent:
        return []
    if has_room:
        cause = (
            f"the pool is {percent:.0f} % full: writes will be refused when the last"
            f" {format_size(available_bytes)} are taken"
        )
    else:
        cause = "the pool is full: writes will be refused until there is room"
    if deleted_images:
        remedy = (
            "what was deleted is still being freed: cleavectl pool show tells when there is room"
        )
    else:
        remedy = (
            "delete snapshots or vdisks that nobody needs: cleavectl snapshot ls and"
            " cleavectl vdisk ls show them"
        )
    return [f"{cause}; {remedy}"]
