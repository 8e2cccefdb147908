"""The control service: nothing of the protocol is left unanswered, and every error of the pool has a code."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from daemon.reservation_store import ReservationStore
from daemon.service import ControlService, control_error
from daemon.space_watch import SpaceWatch
from daemon.targets import Targets
from protocol.control import errors, methods
from protocol.control.errors import ControlError
from storage.errors import (
    BlockDamaged,
    Conflict,
    DeviceFailed,
    NotFound,
    OutOfRange,
    PoolFull,
    PoolReadOnly,
    RequestError,
    StorageError,
    VolumeClosed,
)
from storage.pool import Pool
from tests.daemon.fakes import RecordedWire
from tests.storage.devices import MemoryDevice

MIB = 1 << 20


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[Pool]:
    device = MemoryDevice(64 * MIB)
    await Pool.format(device)
    found = await Pool.open_on(device)
    yield found
    await found.close()


@pytest.fixture
def wire() -> RecordedWire:
    return RecordedWire()


@pytest.fixture
def service(pool: Pool, wire: RecordedWire) -> ControlService:
    return ControlService(pool, "/pool", Targets(pool, None), ReservationStore(pool), wire, SpaceWatch(80, lambda: None))


async def call(service: ControlService, method: str, **params: object) -> object:
    return await service.call(method, methods.validate(method, params))


async def test_every_method_is_answered(service: ControlService) -> None:
    answered_by_the_connection = {"rpc.list", "rpc.subscribe"}
    assert service.method_names == methods.METHODS.keys() - answered_by_the_connection


def subclasses(kind: type[StorageError]) -> Iterator[type[StorageError]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from subclasses(subclass)


@pytest.mark.parametrize("kind", list(subclasses(StorageError)))
def test_every_error_of_the_pool_has_a_known_code_and_keeps_its_words(kind: type[StorageError]) -> None:
    try:
        raise kind("the cause; the next step")
    except StorageError as error:
        found = control_error(error)
    assert found.code in errors.EXIT_CODES
    assert found.message == "the cause; the next step"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (NotFound, "not_found"),
        (Conflict, "conflict"),
        (OutOfRange, "out_of_range"),
        (RequestError, "invalid_params"),
        (PoolFull, "pool_full"),
        (PoolReadOnly, "read_only"),
        (VolumeClosed, "closing"),
        (BlockDamaged, "damaged"),
        (DeviceFailed, "device_failed"),
        (StorageError, "failed"),
    ],
)
def test_codes(kind: type[StorageError], code: str) -> None:
    assert control_error(kind("x")).code == code


async def test_a_resize_is_told_to_the_wire(service: ControlService, wire: RecordedWire) -> None:
    await call(service, "vdisk.create", name="a", size_bytes=MIB)
    await call(service, "vdisk.resize", name="a", size_bytes=2 * MIB)
    assert [(volume.name, volume.size_bytes) for volume in wire.resized] == [("a", 2 * MIB)]


async def test_a_deletion_is_told_to_the_wire(service: ControlService, wire: RecordedWire, pool: Pool) -> None:
    await call(service, "vdisk.create", name="a", size_bytes=MIB)
    uuid = pool.volume("a").uuid
    await call(service, "vdisk.rm", name="a")
    assert wire.deleted == [uuid]


async def test_a_clone_that_is_split_at_once(service: ControlService) -> None:
    await call(service, "vdisk.create", name="a", size_bytes=MIB)
    await call(service, "snapshot.create", snapshots=["a@s"])
    await call(service, "clone.create", snapshot="a@s", name="b", split=True)
    split = await call(service, "split.show", name="b")
    assert isinstance(split, dict)
    assert split["state"] in {"running", "done"}


async def test_a_snapshot_marked_goes_with_its_last_split(service: ControlService) -> None:
    await call(service, "vdisk.create", name="a", size_bytes=MIB)
    await call(service, "snapshot.create", snapshots=["a@s"])
    await call(service, "clone.create", snapshot="a@s", name="b")
    with pytest.raises(ControlError) as caught:
        await call(service, "snapshot.rm", snapshot="a@s")
    assert caught.value.code == errors.CONFLICT
    assert "b" in caught.value.message
    assert await call(service, "snapshot.rm", snapshot="a@s", after_split=True) == {"name": "a@s", "deleted": False}


async def test_what_clients_need_to_connect(service: ControlService, tmp_path: Path) -> None:
    await call(service, "vdisk.create", name="a", size_bytes=MIB)
    assert await call(service, "connect", name="a") == {
        "name": "a",
        "target": "iqn.2026-01.io.cleaved:a",
        "lun": 0,
        "portals": ["127.0.0.1:3260"],
        "chap": False,
    }
