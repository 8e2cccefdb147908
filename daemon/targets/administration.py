"""What administrators change about targets: which there are, their LUNs, and who may use them; and
what must not change while sessions are open.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from daemon.pool.volumes import AttachableVolume
from daemon.targets.directory import Found, Targets, full_name
from daemon.targets.names import TARGET_PREFIX
from daemon.targets.sessions import how_to_end, labels
from protocol.control.limits import ISCSI_NAME_CHARACTERS_MAX
from protocol.names import fold
from storage.errors import Conflict, NotFound, RequestError

VDISK, TARGET = "vdisk", "target"


class TargetAdministration:
    """Changes of ``targets``. All raise what the pool raises, too."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._in_making: Counter[tuple[str, str]] = Counter()
        self._mappings = itertools.count(1)

    # --- Names ------------------------------------------------------------------------------------

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
            kind == VDISK and TARGET_PREFIX + name in self._targets.table.targets
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
        came = self._targets.sessions.that_came_by(TARGET_PREFIX + name)
        users = [session for session in came if session.key != key]
        if users:
            raise Conflict(
                f"{labels(users)} came by the name {name} to another disk: {how_to_end(users)}, or"
                " choose another name"
            )

    def _check_leaves_nobody_behind(self, volume: AttachableVolume) -> None:
        """Raise Conflict while sessions use a vdisk by a name that is to go and another has in
        another case: they would find that.
        """
        full = TARGET_PREFIX + volume.name
        others = [
            named.name for named in self._targets.names.alike(full) if named.vdisk != volume.name
        ]
        came = self._targets.sessions.that_came_by(full)
        users = [session for session in came if session.key == volume.uuid.hex]
        if others and users:
            raise Conflict(
                f"{labels(users)} would find {others[0]} instead of {volume.name} when they connect"
                " again: end those sessions first"
            )

    # --- Created targets and their LUNs -----------------------------------------------------------

    async def create(self, reference: str) -> Found:
        """A target without LUNs. Raises RequestError, Conflict."""
        name = fold(full_name(reference))
        if len(name) > ISCSI_NAME_CHARACTERS_MAX:
            raise RequestError(
                f"{name} has {len(name)} characters, and an iSCSI name has at most"
                f" {ISCSI_NAME_CHARACTERS_MAX}"
            )
        with self.claim(TARGET, name.removeprefix(TARGET_PREFIX)):
            alike = self._targets.names.alike(name)
            vdisk = next((named.vdisk for named in alike if named.vdisk is not None), None)
            if vdisk is not None:
                raise Conflict(f"{name} is the target of vdisk {vdisk}: choose another name")
            await self._targets.table.create(name)
        return self._targets.named(name)

    async def remove(self, reference: str) -> str:
        """Remove a created target with its LUNs and its list; the vdisks stay. Raises NotFound,
        Conflict (it has sessions).
        """
        targets = self._targets
        found = self._created(reference)
        users = targets.sessions.of(found.key)
        if users:
            raise Conflict(f"target {found.name} is in use by {labels(users)}: {how_to_end(users)}")
        await targets.table.remove(found.name)
        for volume in found.luns.values():
            targets.mapped.unmapped(found.name, volume)
        await targets.access.clear(found.key)
        return found.name

    def _created(self, reference: str) -> Found:
        found = self._targets.named(reference)
        if found.key not in self._targets.table.targets:
            raise Conflict(
                f"{found.name} is a vdisk's own target, which has that one LUN: cleavectl target"
                " create makes others"
            )
        return found

    async def map(
        self, reference: str, volume: AttachableVolume, lun: int | None
    ) -> tuple[str, int]:
        """Give a vdisk a LUN of a created target: its name and the number. Raises NotFound,
        Conflict.
        """
        targets = self._targets
        name = self._created(reference).name
        while_mapping = f"a mapping into {name} ({next(self._mappings)})"
        volume.attach(while_mapping)  # from here on it cannot be deleted
        try:
            number = await targets.table.map(name, volume.uuid.hex, lun)
            targets.mapped.mapped(name, volume)
        finally:
            volume.detach(while_mapping)
        targets.sessions.lun_mapped(name, number, volume)
        return name, number

    async def unmap(
        self, reference: str, vdisk: str | None, lun: int | None
    ) -> tuple[str, int, AttachableVolume | None]:
        """Take a LUN, named by its vdisk or its number, out of a created target; the volume is None
        where its vdisk is missing. Raises NotFound, Conflict.
        """
        targets = self._targets
        found = self._created(reference)
        if vdisk is not None:
            lun = next(
                (number for number, volume in found.luns.items() if volume.name == vdisk), None
            )
            if lun is None:
                raise NotFound(f"vdisk {vdisk} is not mapped into target {found.name}")
        assert lun is not None
        await targets.table.unmap(found.name, lun)
        volume = found.luns.get(lun)
        if volume is not None:
            targets.mapped.unmapped(found.name, volume)
        targets.sessions.lun_unmapped(found.key, lun)
        return found.name, lun, volume

    # --- Access -----------------------------------------------------------------------------------

    async def allow(self, reference: str, initiators: list[str]) -> Found:
        """Put initiators on a target's list; from the first one on, it is for nobody else. Raises
        NotFound, Conflict.
        """
        found = self._targets.named(reference)
        await self._targets.access.add(found.key, initiators)
        return found

    async def disallow(self, reference: str, initiator: str) -> Found:
        """Take an initiator off a target's list; an empty list lets nobody in. Raises NotFound,
        Conflict.
        """
        found = self._targets.named(reference)
        await self._targets.access.remove(found.key, initiator)
        return found

    async def clear_list(self, reference: str) -> Found:
        """Remove a target's list, if it has one. Raises NotFound, Conflict."""
        found = self._targets.named(reference)
        await self._targets.access.clear(found.key)
        return found

    # --- Vdisks -----------------------------------------------------------------------------------

    def check_deletable(self, volume: AttachableVolume) -> None:
        """Raise Conflict where a vdisk that is to be deleted is mapped into a target, or in use."""
        name = volume.name
        places = [
            f"LUN {lun} of target {target}"
            for target, lun in self._targets.table.places_of(volume.uuid.hex)
        ]
        if places:
            raise Conflict(
                f"vdisk {name} is {' and '.join(places)}: cleavectl target unmap takes it out"
            )
        users = self._targets.sessions.using(volume)
        if users:
            raise Conflict(f"vdisk {name} is in use by {labels(users)}: {how_to_end(users)}")

    async def forget(self, volume: AttachableVolume) -> None:
        """The vdisk was deleted."""
        if volume.uuid.hex in self._targets.access.acls:
            await self._targets.access.clear(volume.uuid.hex)
