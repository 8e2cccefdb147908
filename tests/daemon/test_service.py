"""The control service: nothing of the protocol is left unanswered, and every error of the pool has
a code.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from daemon.control.answering import HANDLERS
from daemon.control.service import ControlService, control_error
from daemon.pool.space_watch import space_warnings
from daemon.targets.directory import Targets
from protocol.control import calls, errors, methods, rows
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
from tests.daemon.fakes import RecordedWire, call, control_service
from tests.daemon.test_targets import Session
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
def targets(pool: Pool) -> Targets:
    return Targets(pool, None)


@pytest.fixture
def service(pool: Pool, targets: Targets, wire: RecordedWire) -> ControlService:
    return control_service(pool, targets, wire)


def test_every_method_is_answered() -> None:
    answered_by_the_connection = {methods.ListMethods, methods.Subscribe}
    assert HANDLERS.keys() == set(calls.METHODS.values()) - answered_by_the_connection


def subclasses(kind: type[StorageError]) -> Iterator[type[StorageError]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from subclasses(subclass)


@pytest.mark.parametrize("kind", list(subclasses(StorageError)))
def test_every_error_of_the_pool_has_a_known_code_and_keeps_its_words(
    kind: type[StorageError],
) -> None:
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


async def test_a_deletion_is_told_to_the_wire(
    service: ControlService, wire: RecordedWire, pool: Pool
) -> None:
    await call(service, "vdisk.create", name="a", size_bytes=MIB)
    uuid = pool.volume("a").uuid
    await call(service, "vdisk.rm", name="a")
    assert wire.deleted == [uuid]


async def test_a_clone_that_is_split_at_once(service: ControlService) -> None:
    await call(service, "vdisk.create", name="a", size_bytes=MIB)
    await call(service, "snapshot.create", snapshots=["a@s"])
    await call(service, "clone.create", snapshot="a@s", name="b", split=True)
    split = await call(service, "split.show", name="b")
    assert split.state in {"running", "done"}


async def test_a_snapshot_marked_goes_with_its_last_split(service: ControlService) -> None:
    await call(service, "vdisk.create", name="a", size_bytes=MIB)
    await call(service, "snapshot.create", snapshots=["a@s"])
    await call(service, "clone.create", snapshot="a@s", name="b")
    with pytest.raises(ControlError) as caught:
        await call(service, "snapshot.rm", snapshot="a@s")
    assert caught.value.code == errors.CONFLICT
    assert "b" in caught.value.message
    marked = await call(service, "snapshot.rm", snapshot="a@s", after_split=True)
    assert marked == rows.Deleted(name="a@s", deleted=False)


async def test_what_clients_need_to_connect(service: ControlService, tmp_path: Path) -> None:
    await call(service, "vdisk.create", name="a", size_bytes=MIB)
    assert await call(service, "connect", name="a") == rows.Portal(
        name="a",
        target="iqn.2026-01.io.cleaved:a",
        lun=0,
        portals=["127.0.0.1:3260"],
        initiators=None,
        initiator=None,
        allowed=True,
        chap=False,
        chap_user=None,
        nbd=[],
        nbd_open=True,
    )


# --- Shrinking ------------------------------------------------------------------------------------


async def test_a_smaller_size_is_refused_unless_it_is_meant(
    service: ControlService, pool: Pool, wire: RecordedWire
) -> None:
    """`vdisk resize NAME smaller` cut data off without a question."""
    await call(service, "vdisk.create", name="a", size_bytes=3 * MIB)
    with pytest.raises(ControlError) as caught:
        await call(service, "vdisk.resize", name="a", size_bytes=MIB)
    assert caught.value.code == errors.CONFLICT
    assert "3 MiB (3,145,728 bytes)" in caught.value.message
    assert "cut off its last 2 MiB (2,097,152 bytes)" in caught.value.message
    assert caught.value.next_step is not None
    assert "cleavectl vdisk resize a 1048576 --shrink" in caught.value.next_step
    assert (pool.volume("a").size_bytes, wire.resized) == (3 * MIB, [])
    for size_bytes, shrink in (
        (3 * MIB, False),
        (4 * MIB, False),
        (2 * MIB, True),
        (5 * MIB, True),
    ):
        resized = await call(
            service, "vdisk.resize", name="a", size_bytes=size_bytes, shrink=shrink
        )
        assert resized.size_bytes == size_bytes


async def test_a_vdisk_that_grows_meanwhile_is_not_cut(service: ControlService) -> None:
    """The size is compared in the step in which the pool takes the vdisk for this resize."""
    await call(service, "vdisk.create", name="a", size_bytes=MIB)
    answers = await asyncio.gather(
        call(service, "vdisk.resize", name="a", size_bytes=4 * MIB),
        call(service, "vdisk.resize", name="a", size_bytes=2 * MIB),
        return_exceptions=True,
    )
    grown: Any = answers[0]
    refused: Any = answers[1]
    assert grown.size_bytes == 4 * MIB
    assert isinstance(refused, ControlError)
    assert refused.code == errors.CONFLICT


# --- A pool without room --------------------------------------------------------------------------


async def fill(pool: Pool, left_bytes: int) -> None:
    """Write to the vdisk ``full`` until so much is left; 0: until writes are refused."""
    await pool.vdisk_create("full", 1 << 30)
    volume, offset = pool.volume("full"), 0
    while pool.space()[1] > left_bytes:
        written: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        volume.write(offset, bytes(range(256)) * 16, False, written.set_result)
        volume.settle()
        if isinstance(await written, PoolFull):
            break
        offset += 4096


async def warnings_of_creating(service: ControlService) -> list[list[str]]:
    """Of everything that somebody asks for and that will want room."""
    answers = [
        await call(service, "vdisk.create", name="a", size_bytes=MIB),
        await call(service, "vdisk.resize", name="a", size_bytes=2 * MIB),
        *await call(service, "snapshot.create", snapshots=["a@s", "a@t"]),
        await call(service, "clone.create", snapshot="a@s", name="b"),
    ]
    return [answer.warnings for answer in answers]


async def test_who_creates_on_a_roomy_pool_is_not_warned(service: ControlService) -> None:
    assert await warnings_of_creating(service) == [[]] * 5


async def test_who_creates_on_a_full_pool_is_told(service: ControlService, pool: Pool) -> None:
    """vdisks, snapshots and clones were made without a word, and the first write failed."""
    await fill(pool, 0)
    for (warning,) in await warnings_of_creating(service):
        assert "the pool is full: writes will be refused until there is room" in warning
        assert "delete snapshots or vdisks" in warning


async def test_who_creates_on_a_pool_that_is_nearly_full_is_told(
    service: ControlService, pool: Pool
) -> None:
    await fill(pool, 4 * MIB)
    for (warning,) in await warnings_of_creating(service):
        assert "% full: writes will be refused when the last" in warning
        assert "MiB are taken" in warning


def test_what_is_being_freed_need_not_be_deleted_again() -> None:
    (warning,) = space_warnings(100 * MIB, 0, 1, threshold_percent=80)
    assert "still being freed" in warning
    assert "delete " not in warning
    assert space_warnings(79 * MIB, 21 * MIB, 1, threshold_percent=80) == []
    assert len(space_warnings(80 * MIB, 20 * MIB, 1, threshold_percent=80)) == 1


# --- Sessions -------------------------------------------------------------------------------------


async def test_no_such_session(service: ControlService) -> None:
    with pytest.raises(ControlError, match="no session 7: cleavectl session ls") as caught:
        await call(service, "session.end", id=7)
    assert caught.value.code == errors.NOT_FOUND


async def test_a_session_whose_commands_do_not_end_is_said_to_go_on(
    service: ControlService, targets: Targets, wire: RecordedWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.control.handlers.sessions.SESSION_END_SECONDS", 0.01)
    await call(service, "vdisk.create", name="a", size_bytes=MIB)
    session = Session("iqn.2026-01.io.cleaved:a")
    targets.session_opened(session)
    with pytest.raises(ControlError, match="commands of it are still under way"):
        await call(service, "session.end", id=1)
    assert wire.ended == [session]
    targets.session_closed(session)
