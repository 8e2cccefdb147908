"""How the interpreter is tuned for one event loop thread that must not stall, and a few I/O threads."""

import gc
import sys
from typing import Final

# The I/O threads hold the GIL for microseconds between their system calls, but a thread that wants it back waits for this
# interval (default 5 ms) whenever another computes: the event loop would stall for as long (design invariant 8).
SWITCH_INTERVAL_SECONDS: Final = 0.0005
# Nothing on the hot path makes reference cycles: what a collection finds is rare, and what it walks (the node cache) is
# large. So it comes seldom, and the oldest generation hardly ever.
GC_THRESHOLDS: Final = (50_000, 20, 100)


def tune_threads() -> None:
    """Call before any thread is started."""
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)


def tune_memory() -> None:
    """Call when start-up is over: what lives now (modules, tables) lives to the end and is never walked again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
