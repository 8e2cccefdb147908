"""How an operation waits for what a step needs: the step is tried, what it found missing is brought
and held, and it is tried again.

A step that needs several blocks in memory, or blocks to write to, is a plain function: it takes all
of it in one go, between two turns of the event loop, or answers None and has changed nothing. Where
it met something that has to be waited for, it has left in ``PoolState.missing`` what brings that.
Each attempt gets further, since what was brought is held until the step is taken: with the smallest
cache, and however many operations wait at once, each of them ends.

So nothing is ever resolved in two halves with a wait between them: an operation that looks through
a clone at its backing store sees both as of one moment, and one that changes a node has found it in
the same step.
"""

from collections.abc import Callable
from typing import TypeVar

from storage.tree.interfaces import PoolState

T = TypeVar("T")


async def when_possible(state: PoolState, attempt: Callable[[], T | None]) -> T:
    """What ``attempt`` answers as soon as it does not answer None. Its caller goes on in the same
    step.

    Raises what the attempt raises, and BlockDamaged, DeviceFailed, PoolFull from bringing what it
    needs.
    """
    with state.cache.hold() as hold:
        while True:
            state.missing = None
            found = attempt()
            if found is not None:
                return found
            await state.take_missing()(hold)
