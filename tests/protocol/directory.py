"""A target directory for tests: a dict of targets, and a record of the sessions; and a keeper of
what outlives a restart.
"""

from typing import Any
from uuid import UUID

from protocol.iscsi.chap import ChapSecrets
from protocol.iscsi.node import SessionView, TargetDefinition, TargetNode
from protocol.volume import BlockVolume, Completion

TARGET = "iqn.2026-01.io.cleaved:disk"
INITIATOR = "iqn.2026-01.io.example:host"


class MemoryDirectory:
    """``targets`` by name; one CHAP for all of them, or none."""

    def __init__(
        self,
        volumes: dict[int, BlockVolume],
        chap: ChapSecrets | None = None,
        discovery: ChapSecrets | None = None,
    ) -> None:
        self.targets = {TARGET: volumes}
        self.chap = chap
        self.discovery = discovery
        self.opened: list[SessionView] = []
        self.closed: list[SessionView] = []

    def names_for(self, initiator_name: str, portal: str) -> list[str]:
        return sorted(self.targets)

    def open_target(self, target_name: str, initiator_name: str) -> TargetDefinition | None:
        name = target_name.lower()
        volumes = self.targets.get(name)
        return (
            None
            if volumes is None
            else TargetDefinition(name, volumes, self.chap, list(self.targets).index(name) + 1)
        )

    def target_ports(self, uuid: UUID) -> list[int]:
        return [
            port
            for port, volumes in enumerate(self.targets.values(), 1)
            if uuid in {volume.uuid for volume in volumes.values()}
        ]

    def discovery_chap(self, initiator_name: str) -> ChapSecrets | None:
        return self.discovery

    def session_opened(self, session: SessionView) -> None:
        self.opened.append(session)

    def session_closed(self, session: SessionView) -> None:
        self.closed.append(session)


class RecordedNode(TargetNode):
    """A node whose directory is known to be this one."""

    directory: MemoryDirectory


def recorded(
    volumes: dict[int, BlockVolume],
    chap: ChapSecrets | None = None,
    discovery: ChapSecrets | None = None,
) -> RecordedNode:
    """A node over a `MemoryDirectory`."""
    return RecordedNode(MemoryDirectory(volumes, chap, discovery))


class Keeper:
    """Keeps what it is given; completions wait while ``held`` is a list."""

    def __init__(self) -> None:
        self.states: dict[UUID, dict[str, Any] | None] = {}
        self.held: list[Completion] | None = None
        self.error: Exception | None = None

    def kept(self, uuid: UUID) -> dict[str, Any] | None:
        return self.states.get(uuid)

    def keep(self, uuid: UUID, state: dict[str, Any] | None, done: Completion) -> None:
        self.states[uuid] = state
        if self.held is None:
            done(self.error)
        else:
            self.held.append(done)
