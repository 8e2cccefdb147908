"""The state machine of a split: which command leads from which state to which. The table is all
there is.

A split begins ``running``. It is ``paused`` by its owner or by a full pool (the reason says which),
and goes on with ``resume``. ``done`` means that the association is released. ``failed`` (a damaged
block behind the clone, a failed device) and ``cancelled`` keep what was done so far; from all
three, and from ``none``, ``start`` begins anew while there is a backing store.
"""

from storage.errors import Conflict
from storage.layout import (
    SPLIT_CANCELLED,
    SPLIT_DONE,
    SPLIT_FAILED,
    SPLIT_NONE,
    SPLIT_PAUSED,
    SPLIT_RUNNING,
    SPLIT_STATES,
)

TRANSITIONS: dict[tuple[int, str], int] = {
    (SPLIT_NONE, "start"): SPLIT_RUNNING,
    (SPLIT_DONE, "start"): SPLIT_RUNNING,
    (SPLIT_FAILED, "start"): SPLIT_RUNNING,
    (SPLIT_CANCELLED, "start"): SPLIT_RUNNING,
    (SPLIT_RUNNING, "pause"): SPLIT_PAUSED,
    (SPLIT_PAUSED, "resume"): SPLIT_RUNNING,
    (SPLIT_RUNNING, "cancel"): SPLIT_CANCELLED,
    (SPLIT_PAUSED, "cancel"): SPLIT_CANCELLED,
    (SPLIT_RUNNING, "finish"): SPLIT_DONE,
    (SPLIT_RUNNING, "fail"): SPLIT_FAILED,
}


def after(state: int, command: str, name: str) -> int:
    """The state that ``command`` leads to. Raises Conflict when it is not possible now."""
    following = TRANSITIONS.get((state, command))
    if following is None:
        possible = sorted(
            word
            for (at, word), _ in TRANSITIONS.items()
            if at == state and word in ("start", "pause", "resume", "cancel")
        )
        words = (
            f"possible now: {', '.join(possible)}"
            if possible
            else "nothing can be done with it now"
        )
        raise Conflict(
            f"the split of {name} is {SPLIT_STATES[state]} and cannot {command}: {words}"
        )
    return following
