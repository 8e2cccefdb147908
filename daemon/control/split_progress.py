"""Split progress: to those that subscribed, several times a second; to the log, every few seconds.

Where no control client waits, the log alone tells how far a split is.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

from protocol.control.rows import Split

# How often splits are looked at; a progress bar seems alive at this rate.
TICK_SECONDS: Final = 0.25
# A line of the log after this long and this much progress: long splits stay readable, and a stalled
# one is no flood.
LOG_SECONDS: Final = 5.0
LOG_PERCENT: Final = 1.0

FIELDS_LOGGED: Final = (
    "name", "mode", "percent", "holes_remaining", "blocks_copied", "blocks_shared",
    "rate_bytes_per_second", "eta_seconds",
)  # fmt: skip


class _Seen:
    """What was told of one split last."""

    __slots__ = ("logged_percent", "logged_seconds", "state")

    def __init__(self, now_seconds: float, percent: float) -> None:
        self.state: str | None = None
        self.logged_seconds = now_seconds
        self.logged_percent = percent


class SplitProgress:
    """Compares each look with the one before.

    ``notify`` gets every row of a running split, and each change of state; ``log`` the rows worth a
    line. ``show`` gives the row of a split that is no longer in the list, None where there is none.
    """

    def __init__(
        self,
        show: Callable[[str], Split | None],
        notify: Callable[[Split], None],
        log: Callable[[Split], None],
    ) -> None:
        self._show = show
        self._notify = notify
        self._log = log
        self._seen: dict[str, _Seen] = {}
        self._expected: set[str] = set()

    def expect(self, name: str) -> None:
        """Something happened to this split: tell its state at the next look, even if it has begun
        and ended since the last.
        """
        self._expected.add(name)

    def look(self, rows: Sequence[Split], now_seconds: float) -> None:
        """Take the splits that are under way at this moment."""
        names = {row.name for row in rows}
        for row in rows:
            self._look_at(row, now_seconds)
        for name in (self._seen.keys() | self._expected) - names:
            self._seen.pop(name, None)
            last = self._show(name)
            if last is not None:
                self._notify(last)
        self._expected.clear()

    def _look_at(self, row: Split, now_seconds: float) -> None:
        # Before the holes have been counted, all that is known of are replaced: no progress to
        # speak of.
        name, state, percent = row.name, row.state, row.percent if row.counted else 0.0
        seen = self._seen.get(name)
        if seen is None:
            seen = self._seen[name] = _Seen(now_seconds, percent)
        if state == "running" or state != seen.state or name in self._expected:
            self._notify(row)
        seen.state = state
        due = (
            now_seconds - seen.logged_seconds >= LOG_SECONDS
            and percent - seen.logged_percent >= LOG_PERCENT
        )
        if state == "running" and due:
            self._log(row)
            seen.logged_seconds, seen.logged_percent = now_seconds, percent


def log_fields(row: Split) -> dict[str, Any]:
    """What a line of the log holds of a row."""
    return {field: getattr(row, field) for field in FIELDS_LOGGED}
