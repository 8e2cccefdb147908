"""Progress of a split that a command waits for: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Protocol, Self

from daemon.process.units import format_duration, format_size
from protocol.control.limits import BLOCK_BYTES
from protocol.control.rows import Split

# A plain line is written after this long or after this much progress, whichever comes first, so
# that a log stays short.
LINE_SECONDS: Final = 5.0
LINE_PERCENT: Final = 10.0
# The rate is that of the last few seconds: a pace that falls under load should show.
RATE_SECONDS: Final = 5.0


class RateMeter:
    """Bytes a second over the last RATE_SECONDS."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._samples: list[tuple[float, int]] = []

    def rate_bytes(self, done_bytes: int) -> float:
        """Take a sample and give the rate, 0 until there are two."""
        moment = self._now()
        self._samples.append((moment, done_bytes))
        while len(self._samples) > 2 and self._samples[0][0] < moment - RATE_SECONDS:
            self._samples.pop(0)
        since, before = self._samples[0]
        return (done_bytes - before) / (moment - since) if moment > since else 0.0


class ProgressView(Protocol):
    """Shows the rows that ``split.show`` and ``split.progress`` give."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def update(self, split: Split) -> None:
        """Show a newer state."""


class PlainView:
    """Lines on stderr, for logs and pipes."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._meter = RateMeter(now)
        self._last_seconds = float("-inf")
        self._last_percent = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def update(self, split: Split) -> None:
        """Write a line when it is time for one."""
        if split.state == "running" and not split.counted:
            return  # the holes are being counted: nothing to show yet
        rate = self._meter.rate_bytes(done_bytes(split))
        percent, state = split.percent, split.state
        due = (
            self._now() - self._last_seconds >= LINE_SECONDS
            or percent - self._last_percent >= LINE_PERCENT
        )
        if not due and state == "running":
            return
        self._last_seconds, self._last_percent = self._now(), percent
        remaining = format_size(split.holes_remaining * BLOCK_BYTES)
        line = (
            f"split {split.name}: {state}, {percent:.1f} %, {remaining} remaining,"
            f" {format_size(rate)}/s"
        )
        if split.eta_seconds is not None:
            line += f", ETA {format_duration(split.eta_seconds)}"
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class BarView:
    """A bar with rate, remaining and ETA, on a terminal."""

    def __init__(self, name: str) -> None:
        from rich.console import Console  # noqa: PLC0415 -- costs 60 ms: only where a bar is drawn
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
        )
        from rich.table import Column  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        class Fields(ProgressColumn):
            """Rate, remaining and ETA as the daemon counts them."""

            def render(self, task: Task) -> Text:
                return Text(str(task.fields.get("shown", "")))

        self._meter = RateMeter()
        # The bar takes what the figures leave, so that the line fits a terminal of 80 columns.
        bar = BarColumn(bar_width=None, table_column=Column(ratio=1))
        fixed = Column(no_wrap=True)
        columns = (
            TextColumn("{task.description}"),
            bar,
            TextColumn("{task.percentage:>5.1f} %"),
            Fields(table_column=fixed),
        )
        self._progress: Progress = Progress(*columns, console=Console(stderr=True), expand=True)
        self._task = self._progress.add_task(f"split {name}", total=100.0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, split: Split) -> None:
        """Redraw the bar."""
        if split.state == "running" and not split.counted:
            self._progress.update(self._task, shown="counting")
            return
        rate = self._meter.rate_bytes(done_bytes(split))
        eta = split.eta_seconds
        shown = (
            f"{format_size(rate)}/s, {format_size(split.holes_remaining * BLOCK_BYTES)} remaining"
        )
        shown += "" if eta is None else f", ETA {format_duration(eta)}"
        self._progress.update(self._task, completed=split.percent, shown=shown)


def progress_view(name: str) -> ProgressView:
    """The view that fits stderr."""
    return BarView(name) if sys.stderr.isatty() else PlainView()


def done_bytes(split: Split) -> int:
    """How much of the split is done, in bytes of the clone."""
    return (split.holes_total - split.holes_remaining) * BLOCK_BYTES
