"""Targets that were created, and their LUNs. Kept in the pool's configuration, section ``targets``.

A LUN names its vdisk by UUID, so that renaming the vdisk changes nothing; a vdisk has at most one
LUN in a target.
"""

from collections.abc import Iterator
from typing import Final

import msgspec

from daemon.pool.sections import Configurable, Section, Versioned
from protocol.control.limits import LUN_MAX
from protocol.scsi.limits import FIRST_TARGET_PORT, TARGET_PORT_MAX
from storage.errors import Conflict, NotFound

SECTION: Final = "targets"
# All of them are in memory, and looked through at each discovery.
TARGETS_MAX: Final = 4096


class StoredTarget(msgspec.Struct, frozen=True):
    """LUN to the vdisk's UUID (32 hex digits). ``port`` is the relative port identifier of its
    target port; of earlier versions 0.
    """

    luns: dict[int, str] = {}
    port: int = 0


class StoredTargets(Versioned, frozen=True, kw_only=True):
    """The section: by iSCSI name, in lower case. ``last_port`` was given last: registrations name
    ports, so none comes back soon.
    """

    targets: dict[str, StoredTarget] = {}
    last_port: int = FIRST_TARGET_PORT


class TargetTable:
    """The table, and its changes. Names are full iSCSI names in lower case. All changes raise what
    the pool raises, too.
    """

    def __init__(self, pool: Configurable) -> None:
        self._section = Section(pool, SECTION, StoredTargets())
        # Of the same table the same numbers come at each start; with the first change they are
        # stored.
        self._section.value = _numbered(self._section.value)
        self._places: dict[str, list[tuple[str, int]]] = {}
        self._places_are_of: StoredTargets | None = None

    @property
    def targets(self) -> dict[str, StoredTarget]:
        """All of them, by name."""
        return self._section.value.targets

    def port_of(self, name: str) -> int:
        """Relative port identifier of a target: its own for a created one, and the same for each
        vdisk's own target.
        """
        found = self.targets.get(name)
        return FIRST_TARGET_PORT if found is None else found.port

    def places_of(self, uuid: str) -> list[tuple[str, int]]:
        """Target and LUN of everywhere that a vdisk is mapped."""
        stored = self._section.value
        if self._places_are_of is not stored:
            self._places_are_of = stored
            self._places = {}
            for name, target in stored.targets.items():
                for lun, disk in target.luns.items():
                    self._places.setdefault(disk, []).append((name, lun))
        return self._places.get(uuid, [])

    async def create(self, name: str) -> None:
        """A target without LUNs. Raises Conflict."""

        def change(stored: StoredTargets) -> StoredTargets:
            if name in stored.targets:
                raise Conflict(f"target {name} exists already")
            if len(stored.targets) >= TARGETS_MAX:
                raise Conflict(
                    f"there are {TARGETS_MAX} targets, which is the most: remove one first"
                )
            return _with_target(stored, name)

        await self._section.change(change)

    async def remove(self, name: str) -> None:
        """Raises NotFound."""

        def change(stored: StoredTargets) -> StoredTargets:
            _find(stored, name)
            return msgspec.structs.replace(
                stored,
                targets={
                    other: target for other, target in stored.targets.items() if other != name
                },
            )

        await self._section.change(change)

    async def map(self, name: str, uuid: str, lun: int | None) -> int:
        """Give a vdisk a LUN, the lowest free one for None; returns it. Raises
        NotFound, Conflict.
        """
        chosen: list[int] = []

        def change(stored: StoredTargets) -> StoredTargets:
            luns = _find(stored, name).luns
            if uuid in luns.values():
                raise Conflict(f"that vdisk is a LUN of target {name} already")
            if len(luns) > LUN_MAX:
                raise Conflict(
                    f"target {name} has no LUN free: cleavectl target create makes another target"
                )
            number = (
                lun
                if lun is not None
                else next(free for free in range(LUN_MAX + 1) if free not in luns)
            )
            if number in luns:
                raise Conflict(
                    f"LUN {number} of target {name} is taken: choose another, or give none for the"
                    " lowest that is free"
                )
            chosen.append(number)
            return _with_luns(stored, name, {**luns, number: uuid})

        await self._section.change(change)
        return chosen[0]

    async def unmap(self, name: str, lun: int) -> None:
        """Raises NotFound."""

        def change(stored: StoredTargets) -> StoredTargets:
            luns = _find(stored, name).luns
            if lun not in luns:
                raise NotFound(f"target {name} has no LUN {lun}")
            return _with_luns(
                stored, name, {number: disk for number, disk in luns.items() if number != lun}
            )

        await self._section.change(change)


def _find(stored: StoredTargets, name: str) -> StoredTarget:
    found = stored.targets.get(name)
    if found is None:
        raise NotFound(
            f"there is no target {name}; cleavectl target ls shows those that were created"
        )
    return found


def _with_luns(stored: StoredTargets, name: str, luns: dict[int, str]) -> StoredTargets:
    changed = msgspec.structs.replace(stored.targets[name], luns=dict(sorted(luns.items())))
    return msgspec.structs.replace(stored, targets={**stored.targets, name: changed})


def _with_target(stored: StoredTargets, name: str) -> StoredTargets:
    port = next(_free_ports(stored))
    return msgspec.structs.replace(
        stored, targets={**stored.targets, name: StoredTarget(port=port)}, last_port=port
    )


def _free_ports(stored: StoredTargets) -> Iterator[int]:
    """Those that no target has; what was given last comes last."""
    taken, port = (
        {target.port for target in stored.targets.values()} | {FIRST_TARGET_PORT},
        stored.last_port,
    )
    while True:
        port = port % TARGET_PORT_MAX + 1
        if port not in taken:
            yield port


def _numbered(stored: StoredTargets) -> StoredTargets:
    """Targets of earlier versions get their ports, in the order of their names."""
    missing = sorted(name for name, target in stored.targets.items() if not target.port)
    ports = dict(zip(missing, _free_ports(stored), strict=False))
    numbered = {
        name: msgspec.structs.replace(stored.targets[name], port=port)
        for name, port in ports.items()
    }
    last_port = max([stored.last_port, *ports.values()])
    return (
        msgspec.structs.replace(stored, targets={**stored.targets, **numbered}, last_port=last_port)
        if missing
        else stored
    )
