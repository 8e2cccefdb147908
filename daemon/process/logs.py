"""The log: structlog to stderr, JSON lines or text for a terminal. Event names are stable and stand
in docs/operations.md.

Nothing is logged per I/O. A line that cannot be written (the terminal is closed, the reader of a
pipe has gone, the disk is full) is lost: no disk stops for it. What Python's own logging says
(asyncio's complaints) comes out as ``python.log``.
"""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, TextIO, cast

import structlog

Log = structlog.typing.FilteringBoundLogger

LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
# Different reasons that `Repeats` logs one by one until its tick; a stranger can make up as many as
# he wants.
REASONS_MAX: Final = 20
_OTHER_REASONS: Final = "other reasons"


STDOUT: Final = 1
STDERR: Final = 2


class _Stderr:
    """What structlog writes to. Not `sys.stderr`, which raises, keeps what it could not write, and
    tries again at each line.
    """

    def write(self, text: str) -> None:
        """Write, or lose, a line."""
        _write(STDERR, text)

    def flush(self) -> None:
        """Nothing waits."""


def _write(descriptor: int, text: str) -> None:
    """Write it all, or as much as is taken."""
    left = text.encode(errors="backslashreplace")
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:
        return


def write_ready_line(line: str) -> None:
    """One line to standard output. If nobody takes it, the log has it too (``daemon.ready``)."""
    _write(STDOUT, line + "\n")


class _PythonLog(logging.Handler):
    """Hands records of the standard library's logging on."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        get_log().log(record.levelno, "python.log", **fields)


def set_up(level: str, log_format: str) -> None:
    """Configure once, at start. ``log_format``: json, text, or auto (text on a terminal)."""
    text = log_format == "text" or (log_format == "auto" and os.isatty(STDERR))
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if text:
        # Not the formatter that shows local variables: secrets may be among them.
        plain = structlog.dev.plain_traceback
        processors.append(
            structlog.dev.ConsoleRenderer(colors=os.isatty(STDERR), exception_formatter=plain)
        )
    else:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", _Stderr())),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_PythonLog()], level=max(LEVELS[level], logging.INFO), force=True)


class Repeats:
    """Warnings of one kind that strangers can cause: a flood of them must not fill the log.

    The first for a reason is logged at once, those that follow until the ``ticks``-th `tick` as a
    number, with empty fields.
    """

    def __init__(self, event: str, ticks: int = 1) -> None:
        self._event = event
        self._ticks = itertools.cycle(range(1 - ticks, 1))
        self._times: Counter[str] = Counter()

    def log(self, reason: str, **fields: str) -> None:
        """Once more."""
        if reason not in self._times and len(self._times) >= REASONS_MAX:
            reason = _OTHER_REASONS
        self._times[reason] += 1
        if self._times[reason] == 1:
            get_log().warning(self._event, reason=reason, times=1, **fields)

    def tick(self) -> None:
        """Some time has passed: tell of what came beside what was logged."""
        if next(self._ticks):
            return
        for reason, times in self._times.items():
            if times > 1:
                get_log().warning(self._event, reason=reason, times=times - 1)
        self._times.clear()


def get_log() -> Log:
    """The daemon's one logger."""
    log: Log = structlog.get_logger()
    return log


def log_at(level: str, event: str, **fields: Any) -> None:
    """Log at a level that is data: "error", "warning" or "info"."""
    log = get_log()
    levels: dict[str, Callable[..., Any]] = {
        "error": log.error,
        "warning": log.warning,
        "info": log.info,
    }
    levels[level](event, **fields)
