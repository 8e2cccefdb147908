"""The backdoor message handler: one task that carries out messages, one after the other, at the
pace that clients leave it.

A message is a small piece of a longer work (one split, one reclaim). While its work has more to do
it goes to the back of the queue, so several works share the handler fairly. What a message raises
ends its work, and the work decides what that means.
"""

import asyncio
from collections import deque
from contextlib import suppress
from contextvars import ContextVar
from time import perf_counter
from typing import Protocol

from storage.backdoor.pace import Pace
from storage.errors import StorageError, as_storage_error
from storage.state.pool_state import PoolState

# True within a message, and in the tasks that it starts.
in_background: ContextVar[bool] = ContextVar("in_background", default=False)


class Work(Protocol):
    """Something long that is done in small messages."""

    @property
    def rate_min_bytes(self) -> int:
        """Guaranteed under load, bytes a second; 0 = the default."""

    @property
    def rate_max_bytes(self) -> int:
        """Ceiling, bytes a second; 0 = none."""

    async def message(self, idle: bool) -> int | None:
        """Do the next piece (a larger one when ``idle``). Returns the bytes that it moved, or None
        when nothing is left to do.
        """

    async def failed(self, error: StorageError) -> None:
        """The last message raised this; the work is no longer in the queue."""


class BackdoorMessageHandler:
    """Holds the queue of works. ``messages`` counts what was carried out."""

    __slots__ = (
        "_not_before",
        "_pace",
        "_queue",
        "_state",
        "_stopping",
        "_task",
        "_wake",
        "messages",
    )

    def __init__(self, state: PoolState) -> None:
        self._state = state
        self._pace = Pace(state)
        self._queue: deque[Work] = deque()
        # When a work with a ceiling may have its next message (perf_counter); it keeps no other
        # work waiting.
        self._not_before: dict[Work, float] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self.messages = 0

    def start(self) -> None:
        """Begin to carry out messages in the background."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End; a message that is under way is abandoned where it waits, which leaves only what the
        next start goes on from.
        """
        # asyncio.wait_for swallows a cancellation that meets the end of what it waits for
        # (python/cpython#86296); the flag stays.
        self._stopping = True
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def holds(self, kind: type[object]) -> bool:
        """Whether a work of that kind is in the queue, or has a message under way."""
        return any(isinstance(work, kind) for work in self._queue)

    def post(self, work: Work) -> None:
        """Put a work into the queue, if it is not there. None is taken any more once the handler
        stops: nobody must wait for it.
        """
        if work not in self._queue and not self._stopping:
            self._queue.append(work)
        self._wake.set()

    def withdraw(self, work: Work) -> None:
        """Take a work out of the queue, if it is there."""
        self._not_before.pop(work, None)
        with suppress(ValueError):
            self._queue.remove(work)

    async def _run(self) -> None:
        in_background.set(True)
        while not self._stopping:
            work = self._next()
            if work is not None:
                await self._carry_out(work)
            else:
                self._wake.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._seconds_to_next())

    def _next(self) -> Work | None:
        """The first work that may have a message now; none on a pool that takes no changes."""
        if self._state.read_only_reason is not None:
            return None
        now = perf_counter()
        return next((work for work in self._queue if self._not_before.get(work, now) <= now), None)

    def _seconds_to_next(self) -> float | None:
        """How long until a ceiling lets a work go on; None while only a new work can change
        anything.
        """
        if not self._queue or self._state.read_only_reason is not None:
            return None
        return max(
            0.0, min(self._not_before.get(work, 0.0) for work in self._queue) - perf_counter()
        )

    async def _carry_out(self, work: Work) -> None:
        """One message. The work stays listed while it runs, so that posting it again
        has no effect.
        """
        started = perf_counter()
        moved: int | None = None
        try:
            # A ceiling is kept in small steps, not in bursts.
            moved = await work.message(self._pace.idle and not work.rate_max_bytes)
        except Exception as error:  # noqa: BLE001
            # Whatever it was: one work must not end all the others.
            self.withdraw(work)
            await work.failed(as_storage_error(error))
        else:
            listed = work in self._queue
            self.withdraw(work)
            if moved is not None and listed:
                self._queue.append(work)
                if moved and work.rate_max_bytes:
                    self._not_before[work] = started + moved / work.rate_max_bytes
        self.messages += 1
        await self._pace.rest(perf_counter() - started, moved or 0, work.rate_min_bytes)
