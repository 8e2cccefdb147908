"""Long commands take turns: each turn of the event loop runs one piece of one of them, of whatever
session.

A piece is at most `protocol.scsi.limits.PIECE_BYTES`, some tenths of a millisecond; between two of
them every session is served.
"""

from collections import deque
from collections.abc import Callable

Step = Callable[[], None]


class Turns:
    """The queue of pieces of one daemon. ``call_soon`` is the event loop's; without one, as in
    tests, a piece follows another at once.

    Invariant: ``_going`` is True exactly while a piece runs or a turn for the next one has been
    asked for.
    """

    __slots__ = ("_going", "_steps", "call_soon")

    def __init__(self, call_soon: Callable[[Step], object] | None = None) -> None:
        self.call_soon = call_soon
        self._steps: deque[Step] = deque()
        self._going = False

    def take(self, step: Step) -> None:
        """Call ``step`` when it is its turn: first come, first served."""
        self._steps.append(step)
        if not self._going:
            self._going = True
            self._go_on()

    def _go_on(self) -> None:
        if self.call_soon is not None:
            self.call_soon(self._turn)
            return
        while self._steps:
            self._steps.popleft()()
        self._going = False

    def _turn(self) -> None:
        step = self._steps.popleft()
        try:
            step()
        finally:
            self._going = bool(self._steps)
            if self._going:
                self._go_on()
