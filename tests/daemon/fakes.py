"""A volume in memory that can be attached, the little of a pool that `Targets` asks for, and the
control service over either kind of pool.
"""

import asyncio
from collections.abc import Collection
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin
from uuid import UUID, uuid5

import msgspec

from daemon.control.context import Context
from daemon.control.service import ControlService
from daemon.iscsi.listener import IscsiListener
from daemon.nbd.sessions import NbdSessions
from daemon.pool.space_watch import SpaceWatch
from daemon.process.addresses import Address
from daemon.targets.administration import TargetAdministration
from daemon.targets.directory import Targets
from daemon.targets.reservation_store import ReservationStore
from protocol.control import calls
from protocol.control.rows import Kind, Split
from protocol.iscsi.node import SessionView
from protocol.volume import BlockVolume
from storage.errors import NotFound
from storage.pool import Pool
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

    def names_of_uuids(self, wanted: Collection[bytes]) -> dict[bytes, str]:
        return {
            volume.uuid.bytes: name
            for name, volume in self.volumes.items()
            if volume.uuid.bytes in wanted
        }

    def names(self) -> list[str]:
        return sorted(self.volumes)

    def snapshot_names(self, vdisk: str) -> list[str]:
        return [name.partition("@")[2] for name in self.names() if name.startswith(f"{vdisk}@")]

    def names_alike(self, name: str) -> list[str]:
        return sorted(found for found in self.volumes if found.lower() == name.lower())

    def names_with_case(self) -> set[str]:
        return {name.lower() for name in self.volumes if name != name.lower()}

    def volume(self, name: str) -> AttachableMemory:
        if name not in self.volumes:
            raise NotFound(f"there is no vdisk {name}")
        return self.volumes[name]


class RecordedWire:
    """A listener without sockets: records what open sessions would be told."""

    protocol = "recorded"

    def __init__(self) -> None:
        self.addresses: list[Address] = []
        self.space_lows = 0
        self.resized: list[BlockVolume] = []
        self.deleted: list[UUID] = []
        self.luns: list[tuple[str, str, int, str]] = []
        self.ended: list[SessionView] = []

    async def listen(self, address: Address) -> None:
        self.addresses.append(address)

    async def stop(self, timeout_seconds: float) -> None:
        self.addresses.clear()

    def space_low(self) -> None:
        self.space_lows += 1

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


def control_service(
    pool: Pool | MemoryPool, targets: Targets, wire: RecordedWire | IscsiListener
) -> ControlService:
    """The service; over a pool in memory, with the methods that ask only for volumes."""
    context = Context(
        pool=cast("Pool", pool),
        pool_path="/pool",
        targets=targets,
        administration=TargetAdministration(targets),
        reservations=ReservationStore(pool),
        iscsi=wire,
        nbd=NbdSessions(targets.sessions.take_number),
        listeners=[wire],
        space=SpaceWatch(80, lambda: None),
    )
    return ControlService(context)


async def call(service: ControlService, method: str, **params: object) -> Any:
    """A call as a client makes it."""
    return await service.call(calls.validate(method, params))


def example(kind: type[Kind], **changes: Any) -> Kind:
    """A row with these values, and in all other keys the least that there can be."""
    fields = msgspec.structs.fields(kind)
    return kind(**{**{field.name: _least(field.type) for field in fields}, **changes})


def _least(kind: Any) -> Any:
    """Null where that is possible, else zero or empty, or the first of several literals."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _least(inner[0])
    if origin is Literal:
        return inner[0]
    if origin in {Union, UnionType}:
        return None if NoneType in inner else _least(inner[0])
    return (origin or kind)()


def split_row(**changes: Any) -> Split:
    """A split that is under way."""
    usual = {
        "name": "web1",
        "holes_total": 1000,
        "holes_remaining": 600,
        "counted": True,
        "blocks_copied": 400,
        "percent": 40.0,
        "eta_seconds": 12.0,
    }
    return example(Split, **{**usual, **changes})
