"""Which iSCSI targets there are, and who may use them. Satisfies
`protocol.iscsi.node.TargetDirectory`.

Every vdisk is the target TARGET_PREFIX + NAME (`TargetNames`), with the vdisk as LUN 0; beside
those there are the targets that were created, with LUNs mapped into them
(`daemon.targets.administration`). Nothing is kept for a vdisk that nobody uses or configured: the
pool's names are its targets.

A vdisk without a list of initiators of its own, mapped into targets that have one, is for those
initiators alone: its own target is no way around the lists.
"""

import re
from typing import NamedTuple
from uuid import UUID

from daemon.pool.volumes import AttachableVolume, Volumes
from daemon.process.config import Chap
from daemon.process.logs import get_log
from daemon.targets.access import AccessControl
from daemon.targets.mapped_volumes import MappedVolumes, names_of
from daemon.targets.names import TARGET_PREFIX, TargetNames
from daemon.targets.sessions import OpenSession, OpenSessions
from daemon.targets.table import TargetTable
from protocol.iscsi.chap import ChapSecrets
from protocol.iscsi.node import SessionView, TargetDefinition
from protocol.names import ISCSI_NAME
from protocol.scsi.limits import FIRST_TARGET_PORT
from storage.errors import Conflict, NotFound


class Found(NamedTuple):
    """A target as it is now. ``key`` is what `AccessControl` and this room know it by."""

    key: str
    name: str
    luns: dict[int, AttachableVolume]


class Targets:
    """The directory that the wire asks, over what is stored about targets, and the record of its
    sessions.
    """

    def __init__(self, pool: Volumes, chap: Chap | None, open_access: bool = True) -> None:
        self._pool = pool
        self.access = AccessControl(pool, chap, open_access)
        self.table = TargetTable(pool)
        self.names = TargetNames(pool, self.table)
        self.mapped = MappedVolumes(pool, self.table)
        self.sessions = OpenSessions()

    def load(self) -> None:
        """Find the vdisks that are mapped, at start; log what is missing, and colliding names."""
        self.names.log_collisions()
        self.mapped.load()

    # --- What the wire asks (TargetDirectory) -----------------------------------------------------

    def names_for(self, initiator_name: str, portal: str) -> list[str]:
        """What this initiator may use, through every portal."""
        named = self.with_lists() | self.mapped.names()
        restricted = {
            name: keys for uuid, name in named.items() if (keys := self.lists_of_vdisk(uuid))
        }
        names = [
            name for name, keys in restricted.items() if self.access.allows(keys, initiator_name)
        ]
        if self.access.open_access:
            names += [name for name in self._pool.names() if name not in restricted]
        created = [
            name for name in self.table.targets if self.access.allows([name], initiator_name)
        ]
        return sorted(self.names.announced_all(names) + created)

    def open_target(self, target_name: str, initiator_name: str) -> TargetDefinition | None:
        """The target, if this initiator may use it; snapshots are no targets."""
        found = self.find(target_name)
        if found is None or not self._allows(found.key, initiator_name):
            return None
        return TargetDefinition(
            found.name,
            dict(found.luns),
            self.access.secrets_for(initiator_name),
            self.table.port_of(found.name),
        )

    def target_ports(self, uuid: UUID) -> list[int]:
        """That of the vdisk's own target, and those of the targets that it is mapped into."""
        return [
            FIRST_TARGET_PORT,
            *(self.table.port_of(name) for name, _ in self.table.places_of(uuid.hex)),
        ]

    def discovery_chap(self, initiator_name: str) -> ChapSecrets | None:
        """What an initiator must prove before it is shown names; None: nothing."""
        return self.access.secrets_for(initiator_name)

    def session_opened(self, session: SessionView) -> None:
        """Attach the vdisks of the target for as long as the session lives."""
        found = self.find(session.target_name) if session.target_name else None
        key, volumes = (None, {}) if found is None else (found.key, found.luns)
        _log_session("session.opened", self.sessions.opened(session, key, volumes))

    def session_closed(self, session: SessionView) -> None:
        """Detach. No command of the session can touch its vdisks any more."""
        _log_session("session.closed", self.sessions.closed(session))

    # --- Finding ----------------------------------------------------------------------------------

    def find(self, target_name: str) -> Found | None:
        """By iSCSI name, in any case. None where there is no such target: never was, or deleted or
        renamed while somebody logged in.
        """
        named = self.names.find(target_name)
        if named is None:
            return None
        if named.vdisk is not None:
            volume = self._pool.volume(named.vdisk)
            return Found(volume.uuid.hex, named.name, {0: volume})
        return Found(named.name, named.name, self.mapped.luns_of(named.name))

    def named(self, reference: str) -> Found:
        """By what an administrator writes: an iSCSI name, or the NAME after TARGET_PREFIX. Raises
        NotFound, Conflict (it means several).
        """
        found = self.find(full_name(reference))
        if found is None:
            alike = [named.name for named in self.names.alike(full_name(reference))]
            if alike:
                raise Conflict(
                    f"{reference} may be {' or '.join(alike)}: spell it as one of them, and rename"
                    " one, as iSCSI names have no case"
                )
            raise NotFound(
                f"there is no target {reference}; cleavectl target ls and cleavectl vdisk ls show"
                " them"
            )
        return found

    # --- Who may ----------------------------------------------------------------------------------

    def with_lists(self) -> dict[str, str]:
        """Names of the vdisks that have a list of their own, by UUID."""
        # What has a dot is the name of a created target, one that is no more perhaps; a UUID has
        # none.
        return names_of(self._pool, {key for key in self.access.acls if "." not in key})

    def lists_of_vdisk(self, uuid: str) -> list[str]:
        """Keys of the lists that say who may use a vdisk's own target; none where it is as open as
        the configuration says.
        """
        acls = self.access.acls
        if uuid in acls:
            return [uuid]
        return [name for name, _ in self.table.places_of(uuid) if name in acls] if acls else []

    def open_to_everybody(self, uuid: str) -> bool:
        """Whether a vdisk may be used by clients that prove nothing, not even a name."""
        return (
            self.access.open_access
            and self.access.secrets_of_others() is None
            and not self.lists_of_vdisk(uuid)
        )

    def _allows(self, key: str, initiator_name: str) -> bool:
        if key in self.table.targets:
            return self.access.allows([key], initiator_name)
        # Of a created target that is no more only its name is left, and a UUID has no dot.
        return "." not in key and self.access.allows(self.lists_of_vdisk(key), initiator_name)

    def no_longer_allowed(self) -> list[SessionView]:
        """Open sessions whose initiators may not use their targets any more."""
        return [
            session.view
            for session in self.sessions
            if session.key is not None
            and not self._allows(session.key, session.view.initiator_name)
        ]


def full_name(reference: str) -> str:
    """The iSCSI name that a reference stands for."""
    return reference if re.fullmatch(ISCSI_NAME, reference) else TARGET_PREFIX + reference


def _log_session(event: str, session: OpenSession) -> None:
    get_log().info(
        event,
        id=session.number,
        initiator=session.view.initiator_name,
        target=session.view.target_name,
        address=session.view.peer_address,
    )
