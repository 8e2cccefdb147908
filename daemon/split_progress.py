"""Split progress: to those that subscribed, several times a second; to the log, every few seconds or percent.

Where no control client waits, the log alone tells how far a split is.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

Row = dict[str, Any]

# How often splits are looked at; a progress bar seems alive at this rate.
TICK_SECONDS: Final = 0.25
# A line of the log after this long or this much progress, whichever comes last: long splits stay readable, short ones brief.
LOG_SECONDS: Final = 5.0
LOG_PERCENT: Final = 1.0

FIELDS_LOGGED: Final = ("name", "mode", "percent", "holes_remaining", "blocks_copied", "blocks_shared", "eta_seconds")


class _Seen(NamedTuple):
    state: str
    logged_seconds: float
    logged_percent: float


class SplitProgress:
    """Compares each look with the one before. ``notify`` gets every row that may have changed, ``log`` those worth a line."""

    def __init__(self, notify: Callable[[Row], None], log: Callable[[Row], None]) -> None:
        self._notify = notify
        self._log = log
        self._seen: dict[str, _Seen] = {}
        self._looked = False

    def look(self, rows: list[Row], now_seconds: float) -> None:
        """Take the pool's ``split_list()`` of this moment."""
        names = set()
        for row in rows:
            names.add(row["name"])
            self._look_at(row, now_seconds)
        for name in self._seen.keys() - names:
            del self._seen[name]
        self._looked = True

    def _look_at(self, row: Row, now_seconds: float) -> None:
        before = self._seen.get(row["name"])
        state, percent = row["state"], row["percent"]
        if before is None:
            self._seen[row["name"]] = _Seen(state, now_seconds, percent)
            # A short split may begin and end between two looks. On the very first look all are old, and nobody waits for them.
            if self._looked:
                self._notify(row)
            return
        if state == "running" or state != before.state:
            self._notify(row)
        due = now_seconds - before.logged_seconds >= LOG_SECONDS and percent - before.logged_percent >= LOG_PERCENT
        if state == "running" and due:
            self._log(row)
            self._seen[row["name"]] = _Seen(state, now_seconds, percent)
        elif state != before.state:
            self._seen[row["name"]] = _Seen(state, now_seconds, percent)


def log_fields(row: Row) -> Row:
    """What a line of the log holds of a row."""
    return {field: row[field] for field in FIELDS_LOGGED if field in row}
