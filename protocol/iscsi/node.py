"""The iSCSI target node: what all connections share, that is targets, sessions and logical units.

A daemon implements `TargetDirectory` and makes one `TargetNode` over it.
"""

import errno
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol
from uuid import UUID

from protocol.iscsi.chap import Challenges, ChapSecrets
from protocol.iscsi.errors import OutOfResources
from protocol.scsi.kept_state import StateKeeper, keeping, restore
from protocol.scsi.limits import FIRST_TARGET_PORT, PHYSICAL_BLOCK_EXPONENT
from protocol.scsi.logical_unit import LogicalUnit, Nexus
from protocol.scsi.reservations import ANY_TARGET_PORT, NexusId
from protocol.scsi.task import TransportTask
from protocol.turns import Turns
from protocol.volume import BlockVolume

_TSIH_MAX = 0xFFFF
# Clients of other protocols, all together: no iSCSI name is like this.
OTHERS: Final = NexusId("", ANY_TARGET_PORT)


@dataclass(frozen=True, slots=True)
class TargetDefinition:
    """One target as one initiator may use it: its volumes by LUN, and the CHAP that it asks for
    (None: nothing).

    ``port`` is the relative port identifier of its one target port: of all targets that a volume is
    mapped into, each has another.
    """

    name: str
    luns: dict[int, BlockVolume]
    chap: ChapSecrets | None = None
    port: int = FIRST_TARGET_PORT


class SessionView(Protocol):
    """What `TargetDirectory` is told of a session. The object is the same at opening and at
    closing.
    """

    @property
    def initiator_name(self) -> str:
        """ISCSI name of the initiator, in lower case (`protocol.names`)."""

    @property
    def target_name(self) -> str:
        """ISCSI name of the target; empty for a discovery session."""

    @property
    def peer_address(self) -> str:
        """Where the initiator connected from, HOST:PORT."""

    def describe(self) -> dict[str, object]:
        """State and counters, with stable keys."""


class TargetDirectory(Protocol):
    """What the daemon knows: targets, access, portals. Every method returns at once."""

    def names_for(self, initiator_name: str, portal: str) -> list[str]:
        """Names of the targets that this initiator may discover through this portal."""

    def open_target(self, target_name: str, initiator_name: str) -> TargetDefinition | None:
        """The target for this initiator; None where it does not exist or must not be seen.

        ``target_name`` is as the initiator wrote it, in any case (`protocol.names`). The definition
        holds the name that is announced.
        """

    def target_ports(self, uuid: UUID) -> Collection[int]:
        """Relative port identifiers of all targets through which this volume can be reached."""

    def discovery_chap(self, initiator_name: str) -> ChapSecrets | None:
        """What a discovery session of this initiator must prove; None for nothing."""

    def session_opened(self, session: SessionView) -> None:
        """A normal session has logged in."""

    def session_closed(self, session: SessionView) -> None:
        """The session has ended, and none of its commands can touch a volume any more."""


SessionKey = tuple[str, int, str]


class NodeSession(SessionView, Protocol):
    """A session as the node keeps it, for reinstatement."""

    def reinstated(self, quiet: Callable[[], None]) -> None:
        """End at once, and call ``quiet`` when no command of this session can touch a volume any
        more.
        """

    def terminated(self) -> None:
        """End at once, after what is to be sent."""

    def lun_mapped(self, lun: int, unit: LogicalUnit) -> None:
        """The session's target has one logical unit more."""

    def lun_unmapped(self, lun: int) -> None:
        """The session's target has that logical unit no more; commands under way end as they would
        have.
        """


@dataclass(slots=True)
class TargetNode:
    """Registry of sessions and logical units of one daemon.

    Logical units live as long as they are in use (`LogicalUnit.in_use`), so that all sessions of
    one volume share state and unit attentions.
    """

    directory: TargetDirectory
    # Addresses that SendTargets tells an initiator, by the one that it asks through, which comes
    # first.
    portals: Callable[[str], list[str]] = lambda portal: [portal]
    keeper: StateKeeper | None = None
    # What initiators are told of physical blocks (`LogicalUnit`). Some accept only disks whose
    # physical blocks have 512 bytes.
    physical_block_exponent: int = PHYSICAL_BLOCK_EXPONENT
    # Called before a session is ended because its initiator port logs in again, with the old
    # session and the new one.
    taken_over: Callable[[SessionView, SessionView], None] = lambda _older, _newer: None
    # The daemon gives it the event loop's ``call_soon``.
    turns: Turns = field(default_factory=Turns)
    challenges: Challenges = field(default_factory=Challenges)
    sessions: dict[SessionKey, NodeSession] = field(default_factory=dict)
    units: dict[UUID, LogicalUnit] = field(default_factory=dict)
    _last_tsih: int = 0
    _tsihs: set[int] = field(default_factory=set)

    def take_tsih(self) -> int:
        """A free TSIH (target session identifying handle). Raises OutOfResources."""
        if len(self._tsihs) >= _TSIH_MAX:
            raise OutOfResources("no session handle is free")
        while True:
            self._last_tsih = self._last_tsih % _TSIH_MAX + 1
            if self._last_tsih not in self._tsihs:
                self._tsihs.add(self._last_tsih)
                return self._last_tsih

    def release_tsih(self, tsih: int) -> None:
        """The session with this TSIH has ended."""
        self._tsihs.discard(tsih)

    def unit_for(self, volume: BlockVolume) -> LogicalUnit:
        """The logical unit over ``volume``, shared by all who use it."""
        unit = self.units.get(volume.uuid)
        if unit is None or not unit.in_use:
            unit = self.units[volume.uuid] = self._new_unit(volume)
        elif not unit.nexuses:
            unit.volume = volume  # the unit was unused; the daemon may have opened its volume anew
            unit.refresh_capacity()
        return unit

    def recall(self, volume: BlockVolume) -> None:
        """A client of another protocol begins to use a volume: have its unit if there are
        registrations from before a restart, so that `errno_for_others` knows of them.
        """
        self._forget_unused(self.unit_for(volume))

    def errno_for_others(self, uuid: UUID, writes: bool) -> int:
        """0, or why clients of other protocols may not read, or write, a volume now. To its
        reservations they are an I_T nexus that is not registered.
        """
        unit = self.units.get(uuid)
        if unit is None:
            return 0
        if unit.sanitization is not None:
            return errno.EBUSY
        if unit.reservations.forbids(OTHERS, writes) or (writes and unit.write_protected):
            return errno.EPERM
        return 0

    def _new_unit(self, volume: BlockVolume) -> LogicalUnit:
        unit = LogicalUnit(
            volume,
            self.physical_block_exponent,
            self.turns,
            partial(self.directory.target_ports, volume.uuid),
            None if self.keeper is None else keeping(self.keeper),
        )
        kept = None if self.keeper is None else self.keeper.kept(volume.uuid)
        if kept is not None:
            restore(unit, **kept)
        return unit

    def open_nexus(
        self, definition: TargetDefinition, initiator_port: str, tasks: Collection[TransportTask]
    ) -> Nexus:
        """A nexus with all LUNs of the target mapped. ``tasks`` are its commands under way, as the
        session's table has them.
        """
        nexus = Nexus(initiator_port, definition.name, definition.port, tasks)
        for lun, volume in sorted(definition.luns.items()):
            nexus.map(lun, self.unit_for(volume))
        return nexus

    def close_nexus(self, nexus: Nexus) -> None:
        """Unmap all LUNs, and forget units that are not in use any more."""
        units = [mapped.unit for mapped in nexus.units.values()]
        nexus.close()
        for unit in units:
            self._forget_unused(unit)

    def _forget_unused(self, unit: LogicalUnit) -> None:
        if not unit.in_use and self.units.get(unit.uuid) is unit:
            del self.units[unit.uuid]
            unit.retire()

    def volume_deleted(self, uuid: UUID) -> None:
        """Drop its unit, with the state that outlives sessions (`LogicalUnit.in_use`)."""
        unit = self.units.pop(uuid, None)
        if unit is not None:
            unit.retire()

    def lun_mapped(self, target_name: str, lun: int, volume: BlockVolume) -> None:
        """A target has one LUN more: its open sessions get it, and are told that their list of LUNs
        has changed.
        """
        for session in self._sessions_of(target_name):
            session.lun_mapped(lun, self.unit_for(volume))

    def lun_unmapped(self, target_name: str, lun: int, volume: BlockVolume) -> None:
        """A target has a LUN less: its open sessions lose it, and are told on those
        that they keep.
        """
        for session in self._sessions_of(target_name):
            session.lun_unmapped(lun)
        unit = self.units.get(volume.uuid)
        if unit is not None:
            self._forget_unused(unit)

    def _sessions_of(self, target_name: str) -> list[NodeSession]:
        return [session for session in self.sessions.values() if session.target_name == target_name]

    def reinstate(self, key: SessionKey, newer: SessionView, ready: Callable[[], None]) -> None:
        """Call ``ready`` once no older session of the same initiator port and target exists (RFC
        7143 6.3.5).
        """
        older = self.sessions.get(key)
        if older is None:
            ready()
        else:
            # It stays registered until it is quiet; by then another login of the port may have come
            # first.
            self.taken_over(older, newer)
            older.reinstated(lambda: self.reinstate(key, newer, ready))

    def register(self, key: SessionKey, session: NodeSession) -> None:
        """A session has entered the full feature phase."""
        self.sessions[key] = session
        self.directory.session_opened(session)

    def unregister(self, key: SessionKey, session: NodeSession, tsih: int) -> None:
        """A registered session has ended, and is quiet."""
        if self.sessions.get(key) is session:
            del self.sessions[key]
        self.release_tsih(tsih)
        self.directory.session_closed(session)

    def soft_threshold_reached(self) -> None:
        """The pool behind all volumes is filling up: every nexus is told by a unit attention."""
        for unit in self.units.values():
            unit.soft_threshold_reached()

    def terminate_target(self, target_name: str) -> None:
        """End all sessions of a target (TARGET COLD RESET, RFC 7143 11.5.1)."""
        for session in self._sessions_of(target_name):
            session.terminated()

    def volume_resized(self, volume: BlockVolume) -> None:
        """Tell every nexus at once; without this call each notices at its next command that is not
        a plain READ or WRITE.
        """
        unit = self.units.get(volume.uuid)
        if unit is not None:
            unit.refresh_capacity()
