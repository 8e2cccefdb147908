"""Work in slices: how long jobs on the event loop thread stay under the stall limit (design section
6, invariant 8).
"""

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

T = TypeVar("T")

# The limit is 5 ms for everything; a slice of 1 ms leaves room for the step that oversteps it and
# for client I/O in between.
SLICE_SECONDS = 0.001
# Packing this many entries, making an array of as many Python ints, or freeing as many tuples,
# takes less than a slice.
CHUNK = 1024
# Sorting this many u64 takes about 1 ms; larger arrays go to a thread, where numpy releases the
# interpreter lock.
LARGE_ARRAY = 16384


class Slicer:
    """Gives the event loop a turn whenever the current slice is used up."""

    __slots__ = ("_until", "seconds")

    def __init__(self, seconds: float = SLICE_SECONDS) -> None:
        self.seconds = seconds
        self._until = perf_counter() + seconds

    async def breathe(self) -> None:
        """Return at once within a slice; else let other work run, and begin a new one."""
        if perf_counter() >= self._until:
            await asyncio.sleep(0)
            self._until = perf_counter() + self.seconds


async def dispose(values: list[T], slicer: Slicer) -> None:
    """Empty a list that nobody uses any more; freeing a hundred thousand tuples at once would be a
    stall.
    """
    while values:
        del values[-CHUNK:]
        await slicer.breathe()


async def in_thread_if_large(size: int, function: Callable[..., T], *arguments: object) -> T:
    """``function(*arguments)``, on a thread when its arrays hold more than LARGE_ARRAY elements."""
    if size > LARGE_ARRAY:
        return await asyncio.to_thread(function, *arguments)
    return function(*arguments)
