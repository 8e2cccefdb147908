"""The open iSCSI sessions: what each of them holds, and the number by which people know it."""

import asyncio
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from daemon.pool.volumes import AttachableVolume
from protocol.control import rows
from protocol.iscsi.node import SessionView
from protocol.names import fold
from storage.errors import NotFound


@dataclass(frozen=True, slots=True)
class OpenSession:
    """One session: its number, its target's key, and the volumes that it attached, by LUN.

    The number is the session's ``id`` wherever one is shown, in errors and in the log too. No
    session ever has that of another. ``ended`` is set when none of its commands can touch a volume.
    """

    number: int
    view: SessionView
    key: str | None
    volumes: dict[int, AttachableVolume]
    ended: asyncio.Event

    @property
    def label(self) -> str:
        """As errors name it."""
        return f"{self.view.initiator_name} (session {self.number})"


class OpenSessions:
    """All of them. Each attaches the volumes that it may use for as long as it lives."""

    def __init__(self) -> None:
        self._sessions: dict[SessionView, OpenSession] = {}
        self._numbers = itertools.count(1)

    def take_number(self) -> int:
        """A number that no session has had."""
        return next(self._numbers)

    def __iter__(self) -> Iterator[OpenSession]:
        return iter(self._sessions.values())

    def opened(
        self, view: SessionView, key: str | None, volumes: dict[int, AttachableVolume]
    ) -> OpenSession:
        """A session has logged in to the target of this key; None: to none."""
        session = OpenSession(self.take_number(), view, key, volumes, asyncio.Event())
        for volume in volumes.values():
            volume.attach(session.label)
        self._sessions[view] = session
        return session

    def closed(self, view: SessionView) -> OpenSession:
        """A session has ended."""
        session = self._sessions.pop(view)
        for volume in session.volumes.values():
            volume.detach(session.label)
        session.ended.set()
        return session

    def lun_mapped(self, key: str, lun: int, volume: AttachableVolume) -> None:
        """The target of this key has one LUN more."""
        for session in self.of(key):
            session.volumes[lun] = volume
            volume.attach(session.label)

    def lun_unmapped(self, key: str, lun: int) -> None:
        """The target of this key has a LUN less."""
        for session in self.of(key):
            if lun in session.volumes:
                session.volumes.pop(lun).detach(session.label)

    def of(self, key: str) -> list[OpenSession]:
        """Those with the target of this key."""
        return [session for session in self if session.key == key]

    def using(self, volume: AttachableVolume) -> list[OpenSession]:
        """Those that attached this volume."""
        return [session for session in self if volume in session.volumes.values()]

    def count_using(self, vdisk: str) -> int:
        """How many LUNs of open sessions are this vdisk."""
        return sum(used.name == vdisk for session in self for used in session.volumes.values())

    def that_came_by(self, target_name: str) -> list[OpenSession]:
        """Those that logged in by this name, in any case."""
        folded = fold(target_name)
        return [session for session in self if fold(session.view.target_name) == folded]

    def find(self, number: int) -> OpenSession:
        """By its number. Raises NotFound."""
        for session in self:
            if session.number == number:
                return session
        raise NotFound(
            f"there is no session {number}: cleavectl session ls shows those that are open"
        )

    def rows(self) -> list[rows.Session]:
        """One row a session, sorted by target and initiator."""
        found = rows.rows_of(
            rows.Session,
            [
                {"id": session.number, "type": "iscsi", **session.view.describe()}
                for session in self
            ],
        )
        return sorted(found, key=lambda row: (row.target, row.initiator))


def labels(sessions: Iterable[OpenSession]) -> str:
    """As errors name them."""
    return ", ".join(sorted(session.label for session in sessions))


def how_to_end(sessions: list[OpenSession]) -> str:
    """What an administrator does about sessions that are in the way."""
    if len(sessions) == 1:
        return f"end that session first (cleavectl session end {sessions[0].number})"
    return "end those sessions first (cleavectl session end ID, for each)"
