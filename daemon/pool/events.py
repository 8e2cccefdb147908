"""The pool's events: each becomes a line of the log, with the same name and fields, and then goes
to those that watch.
"""

from collections.abc import Callable
from typing import Any, Final

from daemon.process.logs import log_at

# Events that somebody should look at; all others are logged at level info.
EVENT_LEVELS: Final = {
    "pool.read_only": "error",
    "pool.host_full": "error",
    "pool.closed_on_full_host": "warning",
    "block.damaged": "error",
    "image.damaged": "error",
    "log.record_damaged": "error",
    "log.record_mended": "warning",
    "log.unreadable": "warning",
    "references.crowded": "warning",
    "pool.cp_number_high": "warning",
    "reclaim.failed": "error",
    "scrub.damaged": "error",
    "scrub.failed": "error",
    "split.failed": "error",
    "split.lost": "error",
    "log.unknown_image": "warning",
    "superblock.repaired": "warning",
    "device.discard_failed": "warning",
}

Watcher = Callable[[str, dict[str, Any]], None]


class PoolEvents:
    """What a pool is opened with, and tells of each event. It exists before the pool does, so that
    the events of its opening are logged; watchers come later.
    """

    def __init__(self) -> None:
        self._watchers: list[Watcher] = []

    def watch(self, watcher: Watcher) -> None:
        """Call ``watcher`` with name and fields of each event from now on."""
        self._watchers.append(watcher)

    def __call__(self, event: str, **fields: Any) -> None:
        """The pool tells of an event."""
        log_event(event, **fields)
        for watcher in self._watchers:
            watcher(event, fields)


def log_event(event: str, **fields: Any) -> None:
    """The pool's events are the log's: same names, same fields."""
    level = EVENT_LEVELS.get(event, "info")
    if event == "split.paused" and fields.get("reason"):
        level = "warning"  # not by an operator
    log_at(level, event, **fields)
