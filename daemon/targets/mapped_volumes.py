"""The volumes of the vdisks that are mapped into created targets.

They are held, so that a vdisk that is renamed is still known, and attached, so that none is deleted
under its target. Of vdisks that only have a list, of which there may be as many as vdisks, nothing
is held.
"""

from collections.abc import Collection

from daemon.pool.volumes import AttachableVolume, Volumes
from daemon.process.logs import get_log
from daemon.targets.table import TargetTable


class MappedVolumes:
    """By UUID (32 hex digits)."""

    def __init__(self, pool: Volumes, table: TargetTable) -> None:
        self._pool = pool
        self._table = table
        self._held: dict[str, AttachableVolume] = {}

    def load(self) -> None:
        """Find the vdisks that are mapped, at start. One that is no more is logged, and its LUN is
        absent.
        """
        targets = self._table.targets
        mapped = {uuid for target in targets.values() for uuid in target.luns.values()}
        for uuid, vdisk in names_of(self._pool, mapped).items():
            self._held[uuid] = self._pool.volume(vdisk)
        for name, target in targets.items():
            for lun, uuid in target.luns.items():
                if uuid in self._held:
                    self._held[uuid].attach(_label(name))
                else:
                    get_log().warning("target.lun_missing", target=name, lun=lun, vdisk_uuid=uuid)

    def luns_of(self, target: str) -> dict[int, AttachableVolume]:
        """The LUNs of a created target whose vdisks are there."""
        luns = self._table.targets[target].luns.items()
        return {lun: self._held[uuid] for lun, uuid in luns if uuid in self._held}

    def names(self) -> dict[str, str]:
        """Names of the vdisks, as they are called now."""
        return {uuid: volume.name for uuid, volume in self._held.items()}

    def mapped(self, target: str, volume: AttachableVolume) -> None:
        """The table has it as a LUN of this target now."""
        self._held[volume.uuid.hex] = volume
        volume.attach(_label(target))

    def unmapped(self, target: str, volume: AttachableVolume) -> None:
        """The table does not have it in this target any more."""
        volume.detach(_label(target))
        if not self._table.places_of(volume.uuid.hex):
            self._held.pop(volume.uuid.hex, None)


def names_of(pool: Volumes, uuids: Collection[str]) -> dict[str, str]:
    """Names of vdisks by their UUIDs, as they are called now."""
    if not uuids:
        return {}
    found = pool.names_of_uuids({bytes.fromhex(uuid) for uuid in uuids})
    return {raw.hex(): name for raw, name in found.items()}


def _label(target: str) -> str:
    return f"target {target}"
