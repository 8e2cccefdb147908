"""``stats --watch``: counters as rates, one line (or one JSON document) an interval."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

from daemon.process.units import format_size
from protocol.control.rows import COUNTERS, Stats

HEADER_LINES: Final = (
    20  # the names come again after so many lines, so that they stay on the screen
)


def watch_stats(sample: Callable[[], Stats], interval_seconds: float, output: str) -> None:
    """Print until interrupted."""
    before, since = sample(), time.monotonic()
    lines = 0
    try:
        while True:
            time.sleep(interval_seconds)
            now, moment = sample(), time.monotonic()
            rates = rates_between(before, now, moment - since)
            if output == "json":
                sys.stdout.write(json.dumps(rates) + "\n")
            else:
                if lines % HEADER_LINES == 0:
                    sys.stdout.write(_line([f"{column}/s" for column in COUNTERS]))
                sys.stdout.write(_line([_cell(column, rates[column]) for column in COUNTERS]))
            sys.stdout.flush()
            before, since, lines = now, moment, lines + 1
    except KeyboardInterrupt:
        return


def rates_between(before: Stats, now: Stats, seconds: float) -> dict[str, float]:
    """What happened a second, counter by counter."""
    return {key: round((getattr(now, key) - getattr(before, key)) / seconds, 1) for key in COUNTERS}


def _cell(column: str, rate: float) -> str:
    return format_size(rate) if column.endswith("_bytes") else f"{rate:.0f}"


def _line(cells: Sequence[str]) -> str:
    return "".join(cell.rjust(17) for cell in cells) + "\n"
