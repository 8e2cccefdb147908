"""What a connection asks of the process around it."""

from collections.abc import Callable
from typing import Protocol

from protocol.volume import Buffer


class Transport(Protocol):
    """The socket's side. None of these methods calls the connection before it returns, except
    ``send``, which may call ``pause_writing``.
    """

    def send(self, buffers: list[Buffer]) -> None:
        """Write the buffers, in order."""

    def wake(self) -> None:
        """Call ``flush_output`` once, soon."""

    def turn(self, step: Callable[[], None]) -> None:
        """Call ``step`` in a turn of the event loop of its own; the steps of all connections take
        turns.
        """

    def set_reading(self, wanted: bool) -> None:
        """Read from the socket, or leave what comes in the kernel. A new connection reads."""

    def start_tls(self) -> None:
        """Wrap the socket in TLS, and call ``tls_started`` when the TLS handshake has succeeded. If
        it fails, close the socket (``connection_lost`` follows).
        """

    def close(self) -> None:
        """Close when everything that was sent has been written; ``connection_lost`` follows."""
