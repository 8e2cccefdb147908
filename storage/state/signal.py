"""A signal: something that happens in a lower room, for objects of the rooms above to hear of."""

from collections.abc import Callable


class Signal:
    """Both sides know the signal, and not each other. Listeners are called in the order in which
    they came, in the step that sends.
    """

    __slots__ = ("_listeners",)

    def __init__(self) -> None:
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called whenever the signal is sent."""
        self._listeners.append(listener)

    def send(self) -> None:
        """It has happened."""
        for listener in self._listeners:
            listener()
