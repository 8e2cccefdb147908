"""Which iSCSI targets there are, who may use them, and who does. Satisfies
`protocol.iscsi.node.TargetDirectory`.

Every vdisk is the target TARGET_PREFIX + NAME (`TargetNames`), with the vdisk as LUN 0; beside
those there are the targets that were created, with LUNs mapped into them. Nothing is kept for a
vdisk that nobody uses or configured: the pool's names are its targets.

A vdisk without a list of initiators of its own, mapped into targets that have one, is for those
initiators alone: its own target is no way around the lists.
"""

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

from daemon.pool.interface import AttachableVolume, Row, Volumes
from daemon.process.config import Chap
from daemon.process.logs import get_log
from daemon.targets.access import AccessControl
from daemon.targets.names import TARGET_PREFIX, TargetNames
from daemon.targets.table import TargetTable
from protocol.control.limits import ISCSI_NAME_CHARACTERS_MAX
from protocol.control.methods import ISCSI_NAME
from protocol.iscsi.chap import ChapSecrets
from protocol.iscsi.node import SessionView, TargetDefinition
from protocol.names import fold
from protocol.scsi.limits import FIRST_TARGET_PORT
from storage.errors import Conflict, NotFound, RequestError
from storage.vdisks.counters import Counters

VDISK, TARGET = "vdisk", "target"


class Found(NamedTuple):
    """A target as it is now. ``key`` is what `AccessControl` and this module know it by."""

    key: str
    name: str
    luns: dict[int, AttachableVolume]


@dataclass(frozen=True, slots=True)
class _Session:
    """What an open session holds: its number, its target's key, and the volumes that it attached,
    by LUN.

    The number is the session's ``id`` wherever one is shown, in errors and in the log too. No
    session ever has that of another.
    """

    number: int
    initiator: str
    key: str | None
    volumes: dict[int, AttachableVolume]
    ended: asyncio.Event

    @property
    def label(self) -> str:
        """As errors name it."""
        return f"{self.initiator} (session {self.number})"


class Targets:
    """The directory that the wire asks, and the record of its sessions. Sessions attach the volumes
    that they use; so do mappings.
    """

    def __init__(self, pool: Volumes, chap: Chap | None, open_access: bool = True) -> None:
        self._pool = pool
        self.access = AccessControl(pool, chap, open_access)
        self.table = TargetTable(pool)
        self.names = TargetNames(pool, self.table)
        # Volumes of the vdisks that are mapped into created targets, by UUID: who holds a volume
        # sees its vdisk renamed. Of those that only have a list, of which there may be as many as
        # vdisks, nothing is held.
        self._held: dict[str, AttachableVolume] = {}
        self._sessions: dict[SessionView, _Session] = {}
        self._numbers = itertools.count(1)
        self._in_making: Counter[tuple[str, str]] = Counter()

    async def load(self) -> None:
        """Find the vdisks that are mapped, at start. One that is no more is logged, and its LUN
        absent; so are colliding names.
        """
        self.names.log_collisions()
        for name in self._names_of(
            {uuid for target in self.table.targets.values() for uuid in target.luns.values()}
        ).values():
            self._hold(self._pool.volume(name))
        for name, target in self.table.targets.items():
            for lun, uuid in target.luns.items():
                if uuid in self._held:
                    self._held[uuid].attach(_mapping_label(name))
                else:
                    get_log().warning("target.lun_missing", target=name, lun=lun, vdisk_uuid=uuid)

    def _hold(self, volume: AttachableVolume) -> None:
        self._held[volume.uuid.hex] = volume

    def _let_go(self, volume: AttachableVolume) -> None:
        """It was taken out of a target."""
        if not self.table.places_of(volume.uuid.hex):
            self._held.pop(volume.uuid.hex, None)

    def _names_of(self, uuids: set[str]) -> dict[str, str]:
        """Names of vdisks by their UUIDs, as they are called now."""
        return (
            {
                raw.hex(): name
                for raw, name in self._pool.names_of_uuids(
                    {bytes.fromhex(uuid) for uuid in uuids}
                ).items()
            }
            if uuids
            else {}
        )

    def _with_lists(self) -> dict[str, str]:
        """Names of the vdisks that have a list of their own, by UUID."""
        # What has a dot is the name of a created target, one that is no more perhaps; a UUID has
        # none.
        return self._names_of({key for key in self.access.acls if "." not in key})

    # --- What the wire asks (TargetDirectory) -----------------------------------------------------

    def names_for(self, initiator_name: str, portal: str) -> list[str]:
        """What this initiator may use, through every portal."""
        named = self._with_lists() | {uuid: volume.name for uuid, volume in self._held.items()}
        restricted = {
            name: keys for uuid, name in named.items() if (keys := self._lists_of_vdisk(uuid))
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
        """Names are shown to those only who prove who they are, where that is asked of them."""
        return self.access.secrets_for(initiator_name)

    def session_opened(self, session: SessionView) -> None:
        """Attach the vdisks of the target for as long as the session lives."""
        found = self.find(session.target_name) if session.target_name else None
        key, volumes = (None, {}) if found is None else (found.key, found.luns)
        opened = _Session(
            next(self._numbers), session.initiator_name, key, volumes, asyncio.Event()
        )
        for volume in opened.volumes.values():
            volume.attach(opened.label)
        self._sessions[session] = opened
        get_log().info(
            "session.opened",
            id=opened.number,
            initiator=session.initiator_name,
            target=session.target_name,
            address=session.peer_address,
        )

    def session_closed(self, session: SessionView) -> None:
        """Detach. No command of the session can touch its vdisks any more."""
        opened = self._sessions.pop(session)
        for volume in opened.volumes.values():
            volume.detach(opened.label)
        opened.ended.set()
        get_log().info(
            "session.closed",
            id=opened.number,
            initiator=session.initiator_name,
            target=session.target_name,
            address=session.peer_address,
        )

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
        luns = self.table.targets[named.name].luns.items()
        return Found(
            named.name,
            named.name,
            {lun: self._held[uuid] for lun, uuid in luns if uuid in self._held},
        )

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

    def _lists_of_vdisk(self, uuid: str) -> list[str]:
        """Keys of the lists that say who may use a vdisk's own target; none where it is as open as
        the configuration says.
        """
        acls = self.access.acls
        if uuid in acls:
            return [uuid]
        return [name for name, _ in self.table.places_of(uuid) if name in acls] if acls else []

    def _allows(self, key: str, initiator_name: str) -> bool:
        if key in self.table.targets:
            return self.access.allows([key], initiator_name)
        # Of a created target that is no more only its name is left, and a UUID has no dot.
        return "." not in key and self.access.allows(self._lists_of_vdisk(key), initiator_name)

    # --- Created targets --------------------------------------------------------------------------

    @contextmanager
    def claim(self, kind: str, name: str, volume: AttachableVolume | None = None) -> Iterator[None]:
        """While a VDISK or a TARGET is made: vdisks and created targets share one space of names,
        without case. Raises Conflict.

        ``volume`` is of the vdisk that shall get this name, where there is one already.
        """
        other = TARGET if kind == VDISK else VDISK
        self._check_unused(name, None if volume is None else volume.uuid.hex)
        if volume is not None:
            self._check_leaves_nobody_behind(volume)
        name = fold(name)
        if self._in_making[other, name] or (
            kind == VDISK and TARGET_PREFIX + name in self.table.targets
        ):
            raise Conflict(
                f"there is a {other} {name}, and both would be the target {TARGET_PREFIX}{name}:"
                " choose another name"
            )
        self._in_making[kind, name] += 1
        try:
            yield
        finally:
            self._in_making[kind, name] -= 1
            if not self._in_making[kind, name]:
                del self._in_making[kind, name]

    def _check_unused(self, name: str, key: str | None) -> None:
        """Raise Conflict while sessions came by this name to what had it then: they would log in
        again to another disk, and write on.
        """
        users = [opened for opened in self._came_by(name) if opened.key != key]
        if users:
            raise Conflict(
                f"{_labels(users)} came by the name {name} to another disk: {_to_end(users)}, or"
                " choose another name"
            )

    def _check_leaves_nobody_behind(self, volume: AttachableVolume) -> None:
        """Raise Conflict while sessions use a vdisk by a name that is to go and another has in
        another case: they would find that.
        """
        others = [
            named.name
            for named in self.names.alike(TARGET_PREFIX + volume.name)
            if named.vdisk != volume.name
        ]
        users = sorted(
            opened.label for opened in self._came_by(volume.name) if opened.key == volume.uuid.hex
        )
        if others and users:
            raise Conflict(
                f"{', '.join(users)} would find {others[0]} instead of {volume.name} when they"
                " connect again: end those sessions first"
            )

    def _came_by(self, name: str) -> list[_Session]:
        full = fold(TARGET_PREFIX + name)
        return [
            opened
            for session, opened in self._sessions.items()
            if fold(session.target_name) == full
        ]

    async def create(self, reference: str) -> Found:
        """A target without LUNs. Raises RequestError, Conflict, and what the pool raises."""
        name = fold(full_name(reference))
        if len(name) > ISCSI_NAME_CHARACTERS_MAX:
            raise RequestError(
                f"{name} has {len(name)} characters, and an iSCSI name has at most"
                f" {ISCSI_NAME_CHARACTERS_MAX}"
            )
        with self.claim(TARGET, name.removeprefix(TARGET_PREFIX)):
            vdisk = next(
                (named.vdisk for named in self.names.alike(name) if named.vdisk is not None), None
            )
            if vdisk is not None:
                raise Conflict(f"{name} is the target of vdisk {vdisk}: choose another name")
            await self.table.create(name)
        return self.named(name)

    async def remove(self, reference: str) -> str:
        """Remove a created target with its LUNs and its list; the vdisks stay. Raises NotFound,
        Conflict (it has sessions).
        """
        found = self._created(reference)
        users = [opened for opened in self._sessions.values() if opened.key == found.key]
        if users:
            raise Conflict(f"target {found.name} is in use by {_labels(users)}: {_to_end(users)}")
        await self.table.remove(found.name)
        for volume in found.luns.values():
            volume.detach(_mapping_label(found.name))
            self._let_go(volume)
        await self.access.clear(found.key)
        return found.name

    def _created(self, reference: str) -> Found:
        found = self.named(reference)
        if found.key not in self.table.targets:
            raise Conflict(
                f"{found.name} is a vdisk's own target, which has that one LUN: cleavectl target"
                " create makes others"
            )
        return found

    async def map(
        self, reference: str, volume: AttachableVolume, lun: int | None
    ) -> tuple[str, int]:
        """Give a vdisk a LUN of a created target; its name and the LUN. Raises NotFound, Conflict,
        and what the pool raises.
        """
        name = self._created(reference).name
        while_mapping = f"a mapping into {name} ({next(self._numbers)})"
        volume.attach(while_mapping)  # from here on it cannot be deleted
        try:
            number = await self.table.map(name, volume.uuid.hex, lun)
            self._hold(volume)
            volume.attach(_mapping_label(name))
        finally:
            volume.detach(while_mapping)
        for opened in self._sessions.values():
            if opened.key == name:
                opened.volumes[number] = volume
                volume.attach(opened.label)
        return name, number

    async def unmap(
        self, reference: str, vdisk: str | None, lun: int | None
    ) -> tuple[str, int, AttachableVolume | None]:
        """Take a LUN, named by its vdisk or its number, out of a created target; the volume is None
        where its vdisk is missing.

        Raises NotFound, Conflict, and what the pool raises.
        """
        found = self._created(reference)
        if vdisk is not None:
            lun = next(
                (number for number, volume in found.luns.items() if volume.name == vdisk), None
            )
            if lun is None:
                raise NotFound(f"vdisk {vdisk} is not mapped into target {found.name}")
        assert lun is not None
        await self.table.unmap(found.name, lun)
        volume = found.luns.get(lun)
        if volume is not None:
            volume.detach(_mapping_label(found.name))
            self._let_go(volume)
        for opened in self._sessions.values():
            if opened.key == found.key and lun in opened.volumes:
                opened.volumes.pop(lun).detach(opened.label)
        return found.name, lun, volume

    # --- Access -----------------------------------------------------------------------------------

    async def allow(self, reference: str, initiators: list[str]) -> Found:
        """Put initiators on a target's list. Raises NotFound, Conflict, and what the
        pool raises.
        """
        found = self.named(reference)
        await self.access.add(found.key, initiators)
        return found

    async def forget(self, volume: AttachableVolume) -> None:
        """The vdisk was deleted. Raises what the pool raises."""
        if volume.uuid.hex in self.access.acls:
            await self.access.clear(volume.uuid.hex)

    def check_unmapped(self, volume: AttachableVolume) -> None:
        """Raise Conflict where a vdisk that is to be deleted is mapped into a target."""
        places = [
            f"LUN {lun} of target {name}" for name, lun in self.table.places_of(volume.uuid.hex)
        ]
        if places:
            raise Conflict(
                f"vdisk {volume.name} is {' and '.join(places)}: cleavectl target unmap takes"
                " it out"
            )

    def check_unused(self, volume: AttachableVolume) -> None:
        """Raise Conflict where sessions use a vdisk that is to be deleted."""
        users = [opened for opened in self._sessions.values() if volume in opened.volumes.values()]
        if users:
            raise Conflict(f"vdisk {volume.name} is in use by {_labels(users)}: {_to_end(users)}")

    def no_longer_allowed(self) -> list[SessionView]:
        """Open sessions whose initiators may not use their targets any more."""
        return [
            session
            for session, opened in self._sessions.items()
            if opened.key is not None and not self._allows(opened.key, session.initiator_name)
        ]

    # --- What the control service asks ------------------------------------------------------------

    def target_name(self, vdisk: str) -> str:
        """The iSCSI name of a vdisk's target."""
        return self.names.announced(vdisk)

    def access_to(self, volume: AttachableVolume, initiator: str | None) -> Row:
        """Who may use a vdisk's own target, and what must be proved there: by ``initiator``, or by
        whoever may.

        ``initiator`` in the answer is the one asked for, else the only one that may; ``allowed`` is
        false where its login, or any, would be refused; ``chap_user`` is null where there is none,
        or not the same for all.
        """
        keys = self._lists_of_vdisk(volume.uuid.hex)
        listed = self.access.listed(keys)
        if initiator is None and listed is not None and len(listed) == 1:
            (initiator,) = listed
        if initiator is None:
            allowed = self.access.open_access if listed is None else bool(listed)
            secrets = (
                [self.access.secrets_of_others()]
                if listed is None
                else [self.access.secrets_for(name) for name in listed]
            )
        else:
            allowed = self.access.allows(keys, initiator)
            secrets = [self.access.secrets_for(initiator)]
        users = {None if found is None else found.user for found in secrets}
        chap_user = users.pop() if len(users) == 1 else None
        chap = any(found is not None for found in secrets)
        return {
            "initiators": listed,
            "initiator": initiator,
            "allowed": allowed,
            "chap": chap,
            "chap_user": chap_user,
        }

    def describe(self, name: str) -> Row:
        """A created target: its LUNs, its list (None: it has none), and how many
        sessions use it.
        """
        luns = [
            {
                "lun": lun,
                "vdisk": self._held[uuid].name if uuid in self._held else None,
                "uuid": uuid,
            }
            for lun, uuid in self.table.targets[name].luns.items()
        ]
        sessions = sum(1 for opened in self._sessions.values() if opened.key == name)
        return {
            "target": name,
            "luns": luns,
            "initiators": self.access.acls.get(name),
            "sessions": sessions,
        }

    def lists(self) -> list[Row]:
        """Every target that has a list of initiators, sorted by name."""
        names = {uuid: self.names.announced(name) for uuid, name in self._with_lists().items()}
        names |= {name: name for name in self.table.targets}
        rows: list[Row] = [
            {"target": names[key], "initiators": initiators}
            for key, initiators in self.access.acls.items()
            if key in names
        ]
        return sorted(rows, key=lambda row: str(row["target"]))

    def sessions(self) -> list[Row]:
        """One row a session, sorted by target and initiator."""
        rows: list[dict[str, Any]] = [
            {"id": opened.number, **session.describe()}
            for session, opened in self._sessions.items()
        ]
        return sorted(rows, key=lambda row: (str(row.get("target")), str(row.get("initiator"))))

    def session(self, number: int) -> tuple[SessionView, asyncio.Event]:
        """By its ``id``; the event is set when it has ended, and none of its commands can touch a
        volume. Raises NotFound.
        """
        for session, opened in self._sessions.items():
            if opened.number == number:
                return session, opened.ended
        raise NotFound(
            f"there is no session {number}: cleavectl session ls shows those that are open"
        )

    def stats(self, vdisk: str) -> Row:
        """Counters of one vdisk since the daemon started. Raises NotFound."""
        volume = self._pool.volume(vdisk)
        using = sum(
            1
            for opened in self._sessions.values()
            for used in opened.volumes.values()
            if used.name == vdisk
        )
        return {"name": vdisk, **_row(volume.counters), "sessions": using}


def full_name(reference: str) -> str:
    """The iSCSI name that a reference stands for."""
    return reference if re.fullmatch(ISCSI_NAME, reference) else TARGET_PREFIX + reference


def _labels(sessions: Iterable[_Session]) -> str:
    return ", ".join(sorted(opened.label for opened in sessions))


def _to_end(sessions: list[_Session]) -> str:
    """What an administrator does about sessions that are in the way."""
    if len(sessions) == 1:
        return f"end that session first (cleavectl session end {sessions[0].number})"
    return "end those sessions first (cleavectl session end ID, for each)"


def _mapping_label(target_name: str) -> str:
    return f"target {target_name}"


def _row(counters: Counters) -> Row:
    transfers = {
        "reads": counters.reads,
        "writes": counters.writes,
        "read_bytes": counters.read_bytes,
    }
    return {
        **transfers,
        "written_bytes": counters.written_bytes,
        "trims": counters.trims,
        "flushes": counters.flushes,
    }
