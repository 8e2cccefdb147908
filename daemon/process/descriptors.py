"""How this process shares out its file descriptors, so that no client can use up what others need.

Each connection takes one. The limits of iSCSI and of control connections together stay below
RLIMIT_NOFILE, with some left over for everything else: a flood of initiators finds the door closed,
and the control socket answers all the while.
"""

import os
import resource
from typing import Final, NamedTuple

# Beside what is open when the pool is: sockets that are taken only to be closed, those that close,
# a lookup, a probe of an address.
SPARE: Final = 16
# A name that is listened on has an address of each family, as a rule.
PER_LISTENER: Final = 2
# Administrators and their scripts; each may hold RESPONSE_BYTES_MAX (protocol.control.limits) for a
# moment.
CONTROL_MAX: Final = 128
CONTROL_MIN: Final = 4
# Of what is free, where that is little.
CONTROL_SHARE: Final = 8
# Where the system does not tell how many are open: the interpreter, the event loop and the pool
# have some twenty.
_OPEN_GUESS: Final = 32


class TooFewDescriptors(Exception):
    """The limit is so low that nobody could connect; the message says what to do."""


class Shares(NamedTuple):
    """How many connections of each kind there may be."""

    iscsi: int
    control: int
    nbd: int = 0


def raise_limit() -> int:
    """Raise the soft limit as far as it goes, and return it. It is low for the sake of programs
    that use select; this one does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def open_now() -> int:
    """Descriptors that are open."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return _OPEN_GUESS


def share_out(limit: int, used: int, connections_max: int, nbd_max: int = 0) -> Shares:
    """Of ``limit`` descriptors ``used`` are in use, or will be. ``connections_max`` is what iSCSI
    wants, ``nbd_max`` what NBD does; where that is too much, each has its part. Raises
    TooFewDescriptors.
    """
    free = limit - used - SPARE
    control = min(CONTROL_MAX, max(CONTROL_MIN, free // CONTROL_SHARE))
    # As many again may have been taken, in one turn of the event loop, only to be refused.
    wanted, least = connections_max + nbd_max, 2 if nbd_max else 1
    clients = min(wanted, free - 2 * control)
    nbd = max(1, clients * nbd_max // wanted) if nbd_max else 0
    if clients < least:
        needed = limit - free + 2 * CONTROL_MIN + least
        raise TooFewDescriptors(
            f"at most {limit} open files are allowed, and at least {needed} are needed: raise the"
            " limit (LimitNOFILE, ulimit -n)"
        )
    return Shares(clients - nbd, control, nbd)
