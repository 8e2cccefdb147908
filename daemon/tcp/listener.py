"""What the daemon asks of each protocol that it serves. A new protocol is one class that satisfies
`Listener`, made in `daemon.server`.
"""

from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

from daemon.process.addresses import Endpoint
from protocol.volume import BlockVolume


class ListenFailed(Exception):
    """An address cannot be listened on; the message says which, why, and what to do."""


class Listener(Protocol):
    """All sockets and connections of one protocol."""

    @property
    def protocol(self) -> str:
        """Its name, as the ready line, the log and the configuration have it."""

    @property
    def addresses(self) -> Sequence[Endpoint]:
        """Where it listens, with the ports that were really taken."""

    async def stop(self, timeout_seconds: float) -> None:
        """Take no more connections, give what is in flight ``timeout_seconds`` to end, then
        close.
        """

    def volume_resized(self, volume: BlockVolume) -> None:
        """Tell the clients of a volume that it has another size."""

    def volume_deleted(self, uuid: UUID) -> None:
        """Keep nothing for a volume that is no more."""

    def space_low(self) -> None:
        """Tell all clients that the pool, or its host, is running out of room."""
