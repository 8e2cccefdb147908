"""Operations of administrators that are under way on a pool: a pool that closes ends them, and
answers, before the device goes.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from storage.errors import VolumeClosed

P = ParamSpec("P")
T = TypeVar("T")


class Operations:
    """The tasks that are within an operation of the pool."""

    __slots__ = ("_emptied", "_ended", "_tasks", "closed")

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        # Those that were ended from here, and not by their callers.
        self._ended: set[asyncio.Task[Any]] = set()
        self._emptied = asyncio.Event()
        self.closed = False

    async def carry_out(self, work: Coroutine[Any, Any, T]) -> T:
        """The outcome of ``work``. Raises VolumeClosed when the pool closes before its end, or has
        closed.
        """
        if self.closed:
            work.close()
            raise VolumeClosed("the pool is closing: nothing is taken any more")
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await work
        except asyncio.CancelledError:
            if task in self._ended and not task.uncancel():
                raise VolumeClosed("the pool is closing: this was not finished") from None
            raise
        finally:
            self._tasks.discard(task)
            self._ended.discard(task)
            if not self._tasks:
                self._emptied.set()

    async def end(self) -> None:
        """End everything that is under way, and take nothing more."""
        self.closed = True
        await asyncio.sleep(0)  # what was done in this very moment is answered as done
        self._emptied.clear()
        self._ended |= self._tasks
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await self._emptied.wait()


class HasOperations(Protocol):
    """What has operations that end when it closes."""

    operations: Operations


S = TypeVar("S", bound=HasOperations)


def ends_at_close(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """An operation that a pool ends when it closes (``Operations.carry_out``)."""

    @wraps(method)
    async def carried_out(self: S, /, *arguments: P.args, **options: P.kwargs) -> T:
        return await self.operations.carry_out(method(self, *arguments, **options))

    return carried_out
