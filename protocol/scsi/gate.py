"""The gate of a logical unit: read-modify-write commands run alone among the commands that change
sectors.

COMPARE AND WRITE and ORWRITE read, and then write what depends on it (SBC-3 5.2, 5.17: one
uninterrupted operation). While one of them waits or runs, the gate is closed: other changes queue
in the order they came, and the fast path is off. It runs when the changes that were under way have
ended. Reads always pass. Writes of EXTENDED COPY come from outside, since another unit may have
received the command; they are always counted.

Invariant: while the gate is closed, ``_running`` is the number of changes that have begun and not
ended, and `leave` is called at the end of each. While it is open nothing is counted, and `leave`
does nothing.
"""

from collections import deque
from collections.abc import Callable


def _nothing() -> None:
    """The callback of a gate that is not used any more."""


class Gate:
    """``state_changed`` is called when the gate opens or closes."""

    __slots__ = ("_draining", "_exclusive", "_outside", "_queue", "_running", "_state_changed")

    def __init__(self, state_changed: Callable[[], None]) -> None:
        self._state_changed = state_changed
        self._queue: deque[tuple[Callable[[], None], bool]] = deque()
        self._exclusive = False
        self._draining = False
        self._running = 0
        self._outside = 0

    @property
    def closed(self) -> bool:
        """True while an exclusive command waits or runs."""
        return self._exclusive or bool(self._queue)

    def enter(self, start: Callable[[], None], exclusive: bool, under_way: int) -> None:
        """Call ``start`` now or when it is its turn. ``under_way``: changes that began while the
        gate was open, and will `leave`.
        """
        if not self.closed:
            self._running = under_way + self._outside
        self._queue.append((start, exclusive))
        self._state_changed()
        self._drain()

    def enter_outside(self, start: Callable[[], None]) -> None:
        """The same for a change that no task of this unit carries (a third party's copy);
        `leave_outside` ends it.
        """

        def begin() -> None:
            self._outside += 1
            start()

        if self.closed:
            self.enter(begin, exclusive=False, under_way=0)
        else:
            begin()

    def leave_outside(self) -> None:
        """Such a change has ended."""
        self._outside -= 1
        self.leave()

    def retire(self) -> None:
        """Stop calling ``state_changed``. What runs or waits goes on."""
        self._state_changed = _nothing

    def leave(self) -> None:
        """A change that the gate counts has ended."""
        if self.closed:
            self._running -= 1
            self._drain()

    def _drain(self) -> None:
        """Start what may start. A change that ends at once calls `leave`; the loop goes on instead
        of recursing.
        """
        if self._draining:
            return
        self._draining = True
        while True:
            if self._running == 0:
                self._exclusive = False
            if not self._queue or self._exclusive or (self._queue[0][1] and self._running):
                break
            start, self._exclusive = self._queue.popleft()
            self._running += 1
            start()
        self._draining = False
        if not self.closed:
            self._state_changed()
