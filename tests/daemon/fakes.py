"""A volume in memory that can be attached, and the little of a pool that `Targets` asks for."""

import asyncio
from collections.abc import Collection
from typing import Any
from uuid import UUID, uuid5

from protocol.iscsi.node import SessionView
from protocol.volume import BlockVolume
from storage.errors import NotFound
from storage.vdisks.counters import Counters
from tests.protocol.memory_volume import MemoryVolume

NAMESPACE = UUID(int=0)


class AttachableMemory(MemoryVolume):
    """Knows its sessions, and has counters for a test to set."""

    def __init__(self, name: str, size_bytes: int) -> None:
        super().__init__(size_bytes, name, uuid5(NAMESPACE, name))
        self.labels: list[str] = []
        self.counters = Counters()

    def attach(self, label: str) -> None:
        self.labels.append(label)

    def detach(self, label: str) -> None:
        self.labels.remove(label)


class MemoryPool:
    """Volumes by name."""

    def __init__(self, **sizes: int) -> None:
        self.volumes = {
            name: AttachableMemory(name, size_bytes) for name, size_bytes in sizes.items()
        }
        self.sections: dict[str, bytes] = {}
        self.error: Exception | None = None
        self.stores = 0

    def configuration(self, section: str) -> bytes:
        return self.sections.get(section, b"")

    async def configure(self, section: str, value: bytes) -> None:
        """Takes a turn of the event loop, as a pool does; raises ``error`` if that is set."""
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        self.stores += 1
        self.sections[section] = value

    async def vdisk_list(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "uuid": str(volume.uuid)}
            for name, volume in sorted(self.volumes.items())
        ]

    def names_of_uuids(self, wanted: Collection[bytes]) -> dict[bytes, str]:
        return {
            volume.uuid.bytes: name
            for name, volume in self.volumes.items()
            if volume.uuid.bytes in wanted
        }

    def names(self) -> list[str]:
        return sorted(self.volumes)

    def names_alike(self, name: str) -> list[str]:
        return sorted(found for found in self.volumes if found.lower() == name.lower())

    def names_with_case(self) -> set[str]:
        return {name.lower() for name in self.volumes if name != name.lower()}

    def volume(self, name: str) -> AttachableMemory:
        if name not in self.volumes:
            raise NotFound(f"there is no vdisk {name}")
        return self.volumes[name]


class RecordedWire:
    """Records what open sessions would be told."""

    def __init__(self) -> None:
        self.resized: list[BlockVolume] = []
        self.deleted: list[UUID] = []
        self.luns: list[tuple[str, str, int, str]] = []
        self.ended: list[SessionView] = []

    def portals(self) -> list[str]:
        return ["127.0.0.1:3260"]

    def volume_resized(self, volume: BlockVolume) -> None:
        self.resized.append(volume)

    def volume_deleted(self, uuid: UUID) -> None:
        self.deleted.append(uuid)

    def lun_mapped(self, target_name: str, lun: int, volume: BlockVolume) -> None:
        self.luns.append(("mapped", target_name, lun, volume.name))

    def lun_unmapped(self, target_name: str, lun: int, volume: BlockVolume) -> None:
        self.luns.append(("unmapped", target_name, lun, volume.name))

    def end_sessions(self, sessions: list[SessionView]) -> None:
        self.ended += sessions
