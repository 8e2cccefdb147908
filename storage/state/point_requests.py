"""Requests for consistency points: what asks for one, and what takes them, both know this object
and not each other.
"""

import asyncio
from collections.abc import Callable

from storage.errors import VolumeClosed

AtFreeze = Callable[[], None]


class PointRequests:
    """``waiting`` are those that no freeze has taken up yet, oldest first; ``wake`` is set when
    there is something to do. ``served``: consistency points are taken since the pool was opened.
    """

    __slots__ = ("_closed", "served", "waiting", "wake")

    def __init__(self) -> None:
        self.waiting: list[tuple[AtFreeze | None, asyncio.Future[None]]] = []
        self.wake = asyncio.Event()
        self.served = False
        self._closed = False

    def request(self, at_freeze: AtFreeze | None = None) -> asyncio.Future[None]:
        """A Future for a consistency point whose freeze comes after this call. ``at_freeze`` runs
        in the freeze, before the epochs change places; what it raises is raised to the caller, and
        its consistency point goes on without it.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._closed:
            future.set_exception(closing())
            return future
        self.waiting.append((at_freeze, future))
        self.wake.set()
        return future

    def want(self) -> None:
        """Ask for a consistency point soon, without waiting for it."""
        self.wake.set()

    def close(self) -> None:
        """No consistency point will be taken any more."""
        self._closed = True
        for _, future in self.waiting:  # those that came during the last one
            if not future.done():
                future.set_exception(closing())


def closing() -> VolumeClosed:
    """What a request is answered with that comes too late."""
    return VolumeClosed("the pool is closing: nothing is taken any more")
