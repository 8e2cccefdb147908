"""The process as the interpreter and the system see it: tuned for one event loop thread that must
not stall and a few I/O threads, with standard descriptors that are safe, and in touch with systemd.
"""

import gc
import os
import socket
import sys
from typing import Final

# The I/O threads hold the GIL for microseconds between their system calls, but a thread that wants
# it back waits for this interval (default 5 ms) whenever another computes: the event loop would
# stall for as long (design invariant 8).
SWITCH_INTERVAL_SECONDS: Final = 0.0005
# A collection walks 4 objects a microsecond, and the node cache alone may be 200,000 objects.
# Nothing on the hot path makes rings of references, so: the young are collected 5,000 at a time
# (about 1 ms), twice that at most with the middle generation, and the old never by themselves, but
# when nobody is served (`collect_old`).
GC_THRESHOLDS: Final = (5_000, 1, 1_000_000)
_STANDARD_DESCRIPTORS: Final = 3


def hold_standard_descriptors() -> None:
    """Call before anything is opened: where the daemon was started without standard input, output
    or error (``2>&-``), the pool would become that descriptor, and what is written to it, the log
    for one, would go into the pool.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < _STANDARD_DESCRIPTORS:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def tune_start() -> None:
    """Call before any thread is started, and before what is large is imported and read: next to
    nothing of it is garbage, and looking for some took a quarter of the time that a log full of
    changes takes to be replayed.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    gc.disable()


def tune_memory() -> None:
    """Call when start-up is over: what lives now (modules, tables) lives to the end and is never
    walked again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    gc.enable()


def collect_old() -> None:
    """Collect everything, in up to 50 ms: call it when no client waits."""
    gc.collect()


def notify_systemd(state: str) -> None:
    """Send ``READY=1``, ``STOPPING=1`` or the like (sd_notify(3)); without NOTIFY_SOCKET, nothing.
    An unreachable socket is not our failure: systemd notices by its own timeout.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
        try:
            notifier.sendto(state.encode(), address)
        except FileNotFoundError:
            return
