"""Around one plan: time that moves only when somebody waits, identities and clocks that are the
same each time, small caches.
"""

import asyncio
import itertools
import selectors
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final
from unittest import mock

from storage.tree.node import NODE_BYTES
from tests.crash.determinism import CLOCKED, VirtualLoop, repeatable
from tests.fuzz.store.plan import CACHE_NODES, Plan

# What a look at the clock costs, in virtual seconds.
TICK_SECONDS: Final = 2e-5
# And a turn of the event loop.
TURN_SECONDS: Final = 1e-5
# After so many in which nobody waited for a time, somebody turns in a circle: it has to be found
# out within seconds of ours.
TURNS_MAX: Final = 2000
LONG_TURN_SECONDS: Final = 2e-3


class Loop(VirtualLoop):
    """Each turn takes some time: a background work that only takes turns until something has
    happened would wait for ever otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        inner = self._virtual
        select = inner.select

        self._turns = 0

        def timed(timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            self._turns = 0 if timeout else self._turns + 1
            inner.passed_seconds += TURN_SECONDS if self._turns < TURNS_MAX else LONG_TURN_SECONDS
            return select(timeout)

        inner.select = timed  # type: ignore[method-assign]


@contextmanager
def circumstances(plan: Plan, loop: VirtualLoop) -> Iterator[None]:
    """Everything that is drawn or measured comes from the plan; a small cache is allowed."""
    ticks = itertools.count(1)

    def clock() -> float:
        return loop.time() + next(ticks) * TICK_SECONDS

    with ExitStack() as stack:
        stack.enter_context(repeatable())
        for module in CLOCKED:
            stack.enter_context(mock.patch(f"{module}.perf_counter", clock))
        stack.enter_context(mock.patch("storage.tree.node.CACHE_NODES_MIN", min(CACHE_NODES)))
        # A thread takes real time, in which virtual time would run away.
        stack.enter_context(mock.patch("storage.slicer.LARGE_ARRAY", 1 << 62))
        yield


def cache_bytes(plan: Plan) -> int:
    return plan.cache_nodes * NODE_BYTES


async def end_all_tasks() -> None:
    """The process is gone. In the order in which they began: a set of tasks has another one in each
    process.
    """
    while tasks := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
        for task in sorted(tasks, key=lambda task: int(task.get_name().removeprefix("Task-"))):
            task.cancel()
        await asyncio.sleep(0)
