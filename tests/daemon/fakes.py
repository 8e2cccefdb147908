"""A volume in memory that can be attached, and the little of a pool that `Targets` asks for."""

from uuid import UUID, uuid5

from storage.errors import NotFound
from tests.protocol.memory_volume import MemoryVolume

NAMESPACE = UUID(int=0)


class AttachableMemory(MemoryVolume):
    """Knows its sessions, and has counters for a test to set."""

    def __init__(self, name: str, size_bytes: int) -> None:
        super().__init__(size_bytes, name, uuid5(NAMESPACE, name))
        self.labels: list[str] = []
        self.reads = self.writes = self.read_bytes = self.written_bytes = self.trims = 0

    def attach(self, label: str) -> None:
        self.labels.append(label)

    def detach(self, label: str) -> None:
        self.labels.remove(label)


class MemoryPool:
    """Volumes by name."""

    def __init__(self, **sizes: int) -> None:
        self.volumes = {name: AttachableMemory(name, size_bytes) for name, size_bytes in sizes.items()}

    def names(self) -> list[str]:
        return sorted(self.volumes)

    def volume(self, name: str) -> AttachableMemory:
        if name not in self.volumes:
            raise NotFound(f"there is no vdisk {name}")
        return self.volumes[name]
