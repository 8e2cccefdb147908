"""What the daemon does on each signal. One that nobody decided on would end it in the middle, by
the kernel's default.

- The order to stop: every signal whose default is to end the process, but those below. So a
  terminal that is closed (SIGHUP), Ctrl-C, SIGQUIT, a UPS (SIGPWR), a limit of processor time and a
  mistyped number all stop the daemon in order. A second one changes nothing.
- Ignored and logged: SIGUSR1 and SIGUSR2. Tools that rotate logs or ask for statistics send them,
  and disks must not go away for that.
- Left as they are: faults of the process itself, where nothing that it would still write could be
  trusted; what does not end a process; SIGPIPE and SIGXFSZ, which Python ignores, so that the write
  itself fails; SIGKILL.
"""

import asyncio
import signal
from collections.abc import Callable
from typing import Final

from daemon.process.logs import get_log

IGNORED: Final = frozenset((signal.SIGUSR1, signal.SIGUSR2))
_FAULTS: Final = frozenset(
    (
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGSEGV,
        signal.SIGSYS,
    )
)
_NOT_ENDING: Final = frozenset(
    (
        signal.SIGCHLD,
        signal.SIGCONT,
        signal.SIGSTOP,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGURG,
        signal.SIGWINCH,
    )
)
_IGNORED_BY_PYTHON: Final = frozenset((signal.SIGPIPE, signal.SIGXFSZ))
LEFT: Final = _FAULTS | _NOT_ENDING | _IGNORED_BY_PYTHON | {signal.SIGKILL}
# Whatever else there is, the real-time signals included.
STOPPING: Final = frozenset(signal.valid_signals()) - IGNORED - LEFT
# These stop the daemon even where it was started with them ignored: a shell does that with SIGINT
# to what it starts with `&`.
_NEVER_IGNORED: Final = frozenset((signal.SIGTERM, signal.SIGINT))


def name_of(number: int) -> str:
    """``SIGHUP``; for a real-time signal without a name, ``signal 40``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def take_over(loop: asyncio.AbstractEventLoop, stop: Callable[[str], None]) -> None:
    """From now on signals that mean it call ``stop`` with their name. Call it before anything is
    opened that wants an orderly end.
    """
    for number in STOPPING:
        # nohup(1) starts a program with SIGHUP ignored: so it shall outlive its terminal.
        if number in _NEVER_IGNORED or signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, stop, name_of(number))
    for number in IGNORED:
        loop.add_signal_handler(number, _ignore, name_of(number))


def _ignore(name: str) -> None:
    get_log().info("signal.ignored", signal=name)
