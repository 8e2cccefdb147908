"""The NBD connections that use an export: what is shown of them, and the volumes that they keep."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from daemon.pool.volumes import AttachableVolume
from daemon.process.logs import get_log
from protocol.control import rows
from protocol.nbd.connection import NbdConnection
from protocol.nbd.export import Attached


@dataclass(frozen=True, slots=True)
class NbdSession:
    """One connection in its transmission phase. Its number is of the same row as those of iSCSI.

    ``ended`` is set when none of its requests can touch the volume.
    """

    number: int
    connection: NbdConnection
    volume: AttachableVolume
    local: str
    may: Callable[[], bool]
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def label(self) -> str:
        """As errors name it."""
        return f"NBD client {self.connection.peer_address} (session {self.number})"

    def row(self) -> rows.Session:
        """As `session ls` shows it."""
        described = self.connection.describe()
        return rows.row_of(
            rows.Session,
            {
                "id": self.number,
                "type": "nbd",
                "initiator": "",
                "target": described["export"],
                "address": described["address"],
                "portal": self.local,
                "tsih": 0,
                "state": described["state"],
                "header_digest": False,
                "data_digest": False,
                "commands_in_flight": described["requests_in_flight"],
                "commands": described["requests"],
                "read_bytes": described["read_bytes"],
                "write_bytes": described["write_bytes"],
            },
        )


class NbdSessions:
    """All of them. ``take_number`` gives each a number that no session of any protocol has had."""

    def __init__(self, take_number: Callable[[], int]) -> None:
        self._take_number = take_number
        self._sessions: dict[Attached, NbdSession] = {}

    def __iter__(self) -> Iterator[NbdSession]:
        return iter(self._sessions.values())

    def opened(
        self,
        connection: NbdConnection,
        volume: AttachableVolume,
        local: str,
        may: Callable[[], bool],
    ) -> None:
        """The connection uses the volume from now on, for as long as it ``may``."""
        session = NbdSession(self._take_number(), connection, volume, local, may)
        volume.attach(session.label)
        self._sessions[connection] = session
        _log("nbd.opened", session)

    def closed(self, connection: Attached) -> None:
        """Nothing of the connection is at the volume any more."""
        session = self._sessions.pop(connection)
        session.volume.detach(session.label)
        session.ended.set()
        _log("nbd.closed", session)

    def find(self, number: int) -> NbdSession | None:
        """By its number."""
        return next((session for session in self if session.number == number), None)

    def count_using(self, name: str) -> int:
        """How many use the vdisk or snapshot of this name."""
        return sum(session.volume.name == name for session in self)

    def end_shut_out(self) -> int:
        """End those whose clients may not use their exports any more; how many there were."""
        found = [session for session in self if not session.may()]
        for session in found:
            session.connection.shutdown("this client may not use the export any more")
        return len(found)

    def resized(self, volume: object) -> None:
        """End those whose volume has become smaller than they were told."""
        for session in self:
            inner = session.connection.session
            shrunk = inner is not None and session.volume.size_bytes < inner.size_bytes
            if session.volume is volume and shrunk:
                session.connection.shutdown(f"{session.volume.name} has shrunk")


def _log(event: str, session: NbdSession) -> None:
    get_log().info(
        event,
        id=session.number,
        export=session.volume.name,
        address=session.connection.peer_address,
    )
