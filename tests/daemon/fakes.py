"""A volume in memory and the little of a pool that `Targets` asks for."""

from collections.abc import Callable
from uuid import UUID, uuid5

from protocol.volume import Buffer, Completion, ReadCompletion
from storage.errors import NotFound

NAMESPACE = UUID(int=0)


class MemoryVolume:
    """A BlockVolume over a bytearray. ``held`` completions of flushes wait for the test when ``hold_flushes`` is set."""

    def __init__(self, name: str, size_bytes: int) -> None:
        self.name = name
        self.uuid = uuid5(NAMESPACE, name)
        self.data = bytearray(size_bytes)
        self.read_only = False
        self.labels: list[str] = []
        self.hold_flushes = False
        self.held: list[Completion] = []
        self.reads = self.writes = self.read_bytes = self.written_bytes = self.trims = self.flushes = 0

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def attach(self, label: str) -> None:
        self.labels.append(label)

    def detach(self, label: str) -> None:
        self.labels.remove(label)

    def try_read(self, offset_bytes: int, length_bytes: int) -> Buffer | None:
        self.reads += 1
        return bytes(self.data[offset_bytes : offset_bytes + length_bytes])

    def read(self, offset_bytes: int, length_bytes: int, done: ReadCompletion) -> None:
        done(self.try_read(offset_bytes, length_bytes), None)

    def write(self, offset_bytes: int, data: Buffer, fua: bool, done: Completion) -> None:
        self.writes += 1
        self.data[offset_bytes : offset_bytes + len(data)] = data
        done(None)

    def settle(self) -> None:
        pass

    def unmap(self, offset_bytes: int, length_bytes: int, done: Completion) -> None:
        self.write_zeros(offset_bytes, length_bytes, False, done)

    def write_zeros(self, offset_bytes: int, length_bytes: int, fua: bool, done: Completion) -> None:
        self.trims += 1
        self.data[offset_bytes : offset_bytes + length_bytes] = bytes(length_bytes)
        done(None)

    def flush(self, done: Completion) -> None:
        self.flushes += 1
        if self.hold_flushes:
            self.held.append(done)
        else:
            done(None)


class MemoryPool:
    """Volumes by name."""

    on_event: Callable[..., None]

    def __init__(self, **sizes: int) -> None:
        self.volumes = {name: MemoryVolume(name, size_bytes) for name, size_bytes in sizes.items()}

    def names(self) -> list[str]:
        return sorted(self.volumes)

    def volume(self, name: str) -> MemoryVolume:
        if name not in self.volumes:
            raise NotFound(f"there is no vdisk {name}")
        return self.volumes[name]
