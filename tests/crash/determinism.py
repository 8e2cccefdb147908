"""Makes a pool's life repeatable to the byte: time that moves only when somebody waits, identities
from a counter, clocks that count.

Two runs of one workload then leave the same bytes on the device. That is what lets crash states of
different workloads be told apart by their hash, and a failure be replayed by its name alone. It
also makes waiting free: a sleep of the pool costs a turn of the loop.
"""

import asyncio
import itertools
import selectors
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest import mock
from uuid import UUID

T = TypeVar("T")

# What one look at the clock costs, in virtual seconds: small against every limit of the pool (the
# smallest is 1 ms), and not zero, so that work in slices has its breaks.
TICK_SECONDS = 20e-6
# Real time to wait for a thread before a loop with nothing left to do is called hanging.
THREAD_SECONDS = 5.0
# Virtual seconds after which something hangs: the pool's own timers go on for ever, so that nothing
# else would tell.
PATIENCE_SECONDS = 120.0
# Modules of the pool that measure durations.
CLOCKED = (
    "storage.slicer",
    "storage.backdoor.handler",
    "storage.backdoor.pace",
    "storage.consistency.consistency_point",
    "storage.split.job",
)


class Hang(AssertionError):
    """Somebody waits, and nothing is left that could wake him."""


class _VirtualSelector(selectors.BaseSelector):
    """Never sleeps: asked to wait for a time, it says that the time has passed."""

    def __init__(self) -> None:
        self._inner = selectors.DefaultSelector()
        self.passed_seconds = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            ready = self._inner.select(THREAD_SECONDS)
            if not ready:
                raise Hang("every task waits, and no timer is set")
            return ready
        if timeout > 0:
            self.passed_seconds += timeout
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def close(self) -> None:
        self._inner.close()

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time moves only when nothing is left to do now. Raises Hang where a real
    one would wait for ever.
    """

    def __init__(self) -> None:
        self._virtual = _VirtualSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.passed_seconds


@contextmanager
def repeatable(first: int = 1) -> Iterator[None]:
    """Identities, timestamps and durations come from counters within, beginning with ``first``: no
    two parts of a pool's life share one.
    """
    identities, nanoseconds, ticks = (
        itertools.count(first),
        itertools.count(first),
        itertools.count(1),
    )

    def identity() -> UUID:
        return UUID(int=next(identities))

    def timestamp() -> int:
        return next(nanoseconds)

    def clock() -> float:
        return next(ticks) * TICK_SECONDS

    with ExitStack() as stack:
        stack.enter_context(mock.patch("uuid.uuid4", identity))
        stack.enter_context(mock.patch("time.time_ns", timestamp))
        for module in CLOCKED:
            stack.enter_context(mock.patch(f"{module}.perf_counter", clock))
        yield


def run_to_the_end(loop: VirtualLoop, work: Coroutine[Any, Any, T]) -> T:
    """The outcome of ``work``. Raises Hang when it does not come; tasks that it left behind are
    ended.
    """
    task = loop.create_task(work)
    alarm = loop.call_later(PATIENCE_SECONDS, task.cancel)
    try:
        return loop.run_until_complete(task)
    except asyncio.CancelledError:
        raise Hang("nothing moves any more") from None
    finally:
        alarm.cancel()
        loop.run_until_complete(end_all_tasks())


async def end_all_tasks() -> None:
    """The process is gone: cancel what runs. More than once, since asyncio.wait_for may miss a
    cancellation (python/cpython#86296).
    """
    while tasks := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)


class SteadyPace:
    """Stands in for storage.backdoor.pace.Pace: the background takes one small step at a time, and
    never rests.
    """

    idle = False

    async def rest(self, *worked: float) -> None:
        await asyncio.sleep(0)
