"""The iSCSI target node: what all connections share. Which targets there are, which sessions, and their logical units.

A daemon implements `TargetDirectory` and makes one `TargetNode` over it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from protocol.iscsi.chap import Challenges, ChapSecrets
from protocol.iscsi.errors import OutOfResources
from protocol.scsi.logical_unit import LogicalUnit, Nexus
from protocol.volume import BlockVolume

_TSIH_MAX = 0xFFFF


@dataclass(frozen=True, slots=True)
class TargetDefinition:
    """One target as one initiator may use it: its volumes by LUN, and the CHAP that it asks for (None: nothing)."""

    name: str
    luns: dict[int, BlockVolume]
    chap: ChapSecrets | None = None


class SessionView(Protocol):
    """What `TargetDirectory` is told of a session. The object is the same at opening and at closing."""

    @property
    def initiator_name(self) -> str:
        """ISCSI name of the initiator."""

    @property
    def target_name(self) -> str:
        """ISCSI name of the target; empty for a discovery session."""

    def describe(self) -> dict[str, object]:
        """State and counters, with stable keys."""


class TargetDirectory(Protocol):
    """What the daemon knows: targets, access, portals. Every method returns at once."""

    def names_for(self, initiator_name: str, portal: str) -> list[str]:
        """Names of the targets that this initiator may discover through this portal."""

    def open_target(self, target_name: str, initiator_name: str) -> TargetDefinition | None:
        """The target for this initiator; None where it does not exist or must not be seen."""

    def discovery_chap(self, initiator_name: str) -> ChapSecrets | None:
        """What a discovery session of this initiator must prove; None for nothing."""

    def session_opened(self, session: SessionView) -> None:
        """A normal session has logged in."""

    def session_closed(self, session: SessionView) -> None:
        """The session has ended, and none of its commands can touch a volume any more."""


SessionKey = tuple[str, int, str]


class NodeSession(SessionView, Protocol):
    """A session as the node keeps it, for reinstatement."""

    def reinstated(self, drained: Callable[[], None]) -> None:
        """End at once, and call ``drained`` when no command of this session can touch a volume any more."""


@dataclass(slots=True)
class TargetNode:
    """Registry of sessions and logical units of one daemon.

    Logical units live as long as a nexus uses them or is registered with them (SPC-4 5.13), so that all sessions of one volume
    share state and unit attentions.
    """

    directory: TargetDirectory
    challenges: Challenges = field(default_factory=Challenges)
    sessions: dict[SessionKey, NodeSession] = field(default_factory=dict)
    units: dict[UUID, LogicalUnit] = field(default_factory=dict)
    _last_tsih: int = 0
    _tsihs: set[int] = field(default_factory=set)

    def take_tsih(self) -> int:
        """A session handle that no session has. Raises OutOfResources."""
        if len(self._tsihs) >= _TSIH_MAX:
            raise OutOfResources("no session handle is free")
        while True:
            self._last_tsih = self._last_tsih % _TSIH_MAX + 1
            if self._last_tsih not in self._tsihs:
                self._tsihs.add(self._last_tsih)
                return self._last_tsih

    def release_tsih(self, tsih: int) -> None:
        """The session of this handle has ended."""
        self._tsihs.discard(tsih)

    def unit_for(self, volume: BlockVolume) -> LogicalUnit:
        """The logical unit over ``volume``, shared by all who use it."""
        unit = self.units.get(volume.uuid)
        if unit is None or not (unit.nexuses or unit.reservations.registrations):
            unit = self.units[volume.uuid] = LogicalUnit(volume)
        elif not unit.nexuses:
            unit.volume = volume  # only reservations kept the unit; the daemon may have opened its volume anew
            unit.refresh_capacity()
        return unit

    def open_nexus(self, definition: TargetDefinition, initiator_port: str) -> Nexus:
        """A nexus with all LUNs of the target mapped."""
        nexus = Nexus(initiator_port, definition.name)
        for lun, volume in sorted(definition.luns.items()):
            nexus.map(lun, self.unit_for(volume))
        return nexus

    def close_nexus(self, nexus: Nexus) -> None:
        """Unmap, and forget units that nobody uses any more."""
        units = [mapped.unit for mapped in nexus.units.values()]
        nexus.close()
        for unit in units:
            if not (unit.nexuses or unit.reservations.registrations) and self.units.get(unit.uuid) is unit:
                del self.units[unit.uuid]

    def reinstate(self, key: SessionKey, ready: Callable[[], None]) -> None:
        """Call ``ready`` once no older session of the same initiator port and target exists (RFC 7143 6.3.5)."""
        older = self.sessions.pop(key, None)
        if older is None:
            ready()
        else:
            older.reinstated(ready)

    def register(self, key: SessionKey, session: NodeSession) -> None:
        """A session has entered the full feature phase."""
        self.sessions[key] = session
        self.directory.session_opened(session)

    def unregister(self, key: SessionKey, session: NodeSession, tsih: int) -> None:
        """A registered session has ended and drained."""
        if self.sessions.get(key) is session:
            del self.sessions[key]
        self.release_tsih(tsih)
        self.directory.session_closed(session)

    def volume_resized(self, volume: BlockVolume) -> None:
        """Tell every nexus at once; without this call each notices at its next command that is not a plain READ or WRITE."""
        unit = self.units.get(volume.uuid)
        if unit is not None:
            unit.refresh_capacity()
