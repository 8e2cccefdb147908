"""What clients, administrators and the log are told when the device fails: a whole daemon, real
sockets, planted faults.
"""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from structlog.testing import capture_logs

from daemon.admin.client import ControlClient
from daemon.iscsi.initiator import Initiator
from daemon.process.config import build
from daemon.server import Daemon
from daemon.targets.names import TARGET_PREFIX
from protocol.control import methods
from protocol.control.definition import Method, Result
from protocol.iscsi.initiator.task import CommandFailed
from protocol.scsi.sense import DATA_PROTECT, MEDIUM_ERROR
from storage.device import open_device
from storage.pool import Pool
from tests.daemon.programs import PROGRAM_SECONDS_MAX
from tests.storage.devices import READ, SYNC, WRITE, Fault, FaultyDevice

BLOCK = 4096
SECTOR = 512
DISK_BYTES = 8 << 20
DATA = bytes(range(256)) * 16
WRITE_ERROR = (MEDIUM_ERROR, 0x0C, 0x00)
READ_ERROR = (MEDIUM_ERROR, 0x11, 0x00)
WRITE_PROTECTED = (DATA_PROTECT, 0x27, 0x00)
SPACE_ALLOCATION_FAILED = (DATA_PROTECT, 0x27, 0x07)


class Served(NamedTuple):
    """A daemon, a session with its vdisk ``disk``, and its device."""

    path: Path
    client: Initiator
    device: FaultyDevice
    pool: Pool
    log: list[Any]

    async def ctl(self, call: Method[Result]) -> Result:
        def answer() -> Result:
            with ControlClient(str(self.path / "control")) as control:
                return control.call(call)

        return await asyncio.to_thread(answer)

    def fail_next(self, operation: str, number: int = errno.EIO, *, forever: bool = False) -> None:
        self.device.faults = [Fault(operation, self.device.calls[operation] + 1, number, forever)]

    def events(self, name: str) -> list[Any]:
        return [line for line in self.log if line["event"] == name]


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[Served]:
    await asyncio.to_thread(Pool.create, str(path / "pool"), 64 << 20)
    devices: list[FaultyDevice] = []

    def open_faulty(name: str) -> FaultyDevice:
        devices.append(FaultyDevice(open_device(name)))
        return devices[0]

    config = build(
        {
            "pool": {"path": str(path / "pool")},
            "iscsi": {"listen": ["127.0.0.1:0"]},
            "control": {"path": str(path / "control")},
        }
    )
    with capture_logs() as log, mock.patch("storage.pool.pool.open_device", open_faulty):
        daemon = await Daemon.open(config)
        try:
            await daemon.start()
            await daemon._pool.vdisk_create("disk", DISK_BYTES)
            address = daemon._iscsi.addresses[0]
            async with await Initiator.connect(
                address.host, address.port, f"{TARGET_PREFIX}disk"
            ) as client:
                yield Served(path, client, devices[0], daemon._pool, log)
        finally:
            devices[0].faults = []
            await asyncio.wait_for(daemon.stop(), PROGRAM_SECONDS_MAX)


async def refused(work: Any) -> tuple[int, int, int]:
    """The sense that a command ends with: key, code, qualifier."""
    with pytest.raises(CommandFailed) as caught:
        await work
    assert caught.value.status == 0x02, "not CHECK CONDITION"
    return caught.value.key, caught.value.asc, caught.value.ascq


async def information_of(work: Any) -> int | None:
    """The INFORMATION field of fixed-format sense, None where it is not valid (SPC-4 4.5.3)."""
    with pytest.raises(CommandFailed) as caught:
        await work
    sense = caught.value.sense
    assert sense[0] & 0x7F == 0x70
    return int.from_bytes(sense[3:7], "big") if sense[0] & 0x80 else None


@pytest.mark.parametrize("command", ["flush", "fua write"])
async def test_a_failed_sync_is_told_to_everybody(tmp_path: Path, command: str) -> None:
    async with served(tmp_path) as daemon:
        client = daemon.client
        await client.write(0, DATA, fua=True)
        await client.write(BLOCK, DATA)
        daemon.fail_next(SYNC)
        # The one that met it: the data did not get to the medium.
        assert (
            await refused(
                client.flush() if command == "flush" else client.write(BLOCK, DATA, fua=True)
            )
            == WRITE_ERROR
        )
        # Nothing after it is acknowledged, though the device syncs again: what a failed sync left
        # out is not known.
        for later in (
            client.write(0, DATA),
            client.write(0, DATA, fua=True),
            client.flush(),
            client.unmap(0, BLOCK),
            client.write_zeros(0, BLOCK),
        ):
            assert await refused(later) == WRITE_PROTECTED
        assert bytes(await client.read(0, BLOCK)) == DATA
        assert await client.capacity_bytes() == DISK_BYTES
        shown = await daemon.ctl(methods.PoolShow())
        assert shown.read_only and shown.read_only_reason is not None
        assert "the device failed to make data durable" in shown.read_only_reason
        (event,) = daemon.events("pool.read_only")
        assert event["log_level"] == "error" and event["reason"] == shown.read_only_reason
    # What was acknowledged is there after a restart, on a device that is sound again.
    async with reopened(tmp_path) as client:
        assert bytes(await client.read(0, BLOCK)) == DATA
        await client.write(0, DATA[::-1], fua=True)


@asynccontextmanager
async def reopened(path: Path) -> AsyncIterator[Initiator]:
    config = build(
        {
            "pool": {"path": str(path / "pool")},
            "iscsi": {"listen": ["127.0.0.1:0"]},
            "control": {"path": str(path / "control")},
        }
    )
    with capture_logs():
        daemon = await Daemon.open(config)
        try:
            await daemon.start()
            address = daemon._iscsi.addresses[0]
            async with await Initiator.connect(
                address.host, address.port, f"{TARGET_PREFIX}disk"
            ) as client:
                yield client
        finally:
            await asyncio.wait_for(daemon.stop(), PROGRAM_SECONDS_MAX)


async def test_a_device_without_space(tmp_path: Path) -> None:
    """The host's file system is full: that write alone is refused, and the pool goes on."""
    async with served(tmp_path) as daemon:
        client = daemon.client
        await client.write(0, DATA)
        daemon.fail_next(WRITE, errno.ENOSPC)
        assert await refused(client.write(BLOCK, DATA)) == SPACE_ALLOCATION_FAILED
        assert bytes(await client.read(BLOCK, BLOCK)) == bytes(BLOCK)
        await client.write(BLOCK, DATA, fua=True)
        assert bytes(await client.read(BLOCK, BLOCK)) == DATA
        assert not (await daemon.ctl(methods.PoolShow())).read_only


async def test_a_full_pool(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        client = daemon.client
        await daemon.pool.vdisk_resize("disk", 256 << 20)
        piece, at = bytes(range(1, 256)) * 4112 + bytes(16), 0
        assert len(piece) == 1 << 20
        while True:
            try:
                await client.write(at, piece)
            except CommandFailed:
                break
            at += len(piece)
        assert await refused(client.write(at, piece)) == SPACE_ALLOCATION_FAILED
        assert bytes(await client.read(0, 1 << 20)) == piece
        await client.flush()
        assert not (await daemon.ctl(methods.PoolShow())).read_only


async def test_a_failed_write(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        await daemon.client.write(0, DATA)
        daemon.fail_next(WRITE)
        assert await refused(daemon.client.write(0, DATA[::-1])) == WRITE_ERROR
        assert bytes(await daemon.client.read(0, BLOCK)) == DATA


async def test_a_read_that_fails_once_is_repeated(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        await daemon.client.write(0, DATA)
        daemon.fail_next(READ)
        assert bytes(await daemon.client.read(0, BLOCK)) == DATA


@pytest.mark.parametrize(
    ("first", "sectors", "lba"), [(0, 8, 0), (0, 64, 0), (3, 5, 3), (13, 20, 13)]
)
async def test_a_device_that_reads_nothing(
    tmp_path: Path, first: int, sectors: int, lba: int
) -> None:
    """The first sector that the client asked for is the first that could not be read."""
    async with served(tmp_path) as daemon:
        await daemon.client.write(0, DATA * 8)
        daemon.fail_next(READ, forever=True)
        assert await information_of(daemon.client.read(first * SECTOR, sectors * SECTOR)) == lba
        assert await refused(daemon.client.read(first * SECTOR, sectors * SECTOR)) == READ_ERROR
        await daemon.client.write(0, DATA)  # of whole blocks, which wants no reading


async def test_one_unreadable_block_is_named(tmp_path: Path) -> None:
    """Its neighbours, in the same run on the device, are read."""
    async with served(tmp_path) as daemon:
        await daemon.client.write(0, DATA * 8)
        with bad_block(daemon, fbn=5):
            assert await information_of(daemon.client.read(0, 8 * BLOCK)) == 40
            assert await information_of(daemon.client.read(42 * SECTOR, 2 * SECTOR)) == 42
            assert bytes(await daemon.client.read(0, 5 * BLOCK)) == DATA * 5
            assert bytes(await daemon.client.read(6 * BLOCK, 2 * BLOCK)) == DATA * 2


def bad_block(daemon: Served, fbn: int) -> Any:
    """While it lasts, every read that takes in this block's place on the device fails."""
    offset, device = vbn_of(daemon, fbn) * BLOCK, daemon.device
    inner_try, inner_read = device.try_readv, device.readv

    def covers(buffers: Any, offset_bytes: int) -> bool:
        return offset_bytes <= offset < offset_bytes + sum(map(len, buffers))

    def try_readv(buffers: Any, offset_bytes: int) -> bool:
        if covers(buffers, offset_bytes):
            raise device._error(Fault(READ))
        return inner_try(buffers, offset_bytes)

    def readv(buffers: Any, offset_bytes: int) -> Any:
        if covers(buffers, offset_bytes):
            failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            failed.set_exception(device._error(Fault(READ)))
            return failed
        return inner_read(buffers, offset_bytes)

    return mock.patch.multiple(device, try_readv=try_readv, readv=readv)


def vbn_of(daemon: Served, fbn: int) -> int:
    node = daemon.pool.volume("disk").image.tree.peek(fbn >> 8)
    assert node is not None
    return int(node.q[(fbn & 255) * 2])


async def test_a_damaged_block_is_named_to_the_client_and_in_the_log(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        await daemon.client.write(0, DATA * 8, fua=True)
        with (tmp_path / "pool").open("r+b") as pool:
            pool.seek(vbn_of(daemon, 5) * BLOCK + 1000)
            pool.write(b"rot")
        assert await refused(daemon.client.read(0, 8 * BLOCK)) == READ_ERROR
        assert await information_of(daemon.client.read(5 * BLOCK, BLOCK)) == 40
        assert bytes(await daemon.client.read(0, 5 * BLOCK)) == DATA * 5
        events = daemon.events("block.damaged")
        assert len(events) == 2 and all(
            event["offset_bytes"] == 5 * BLOCK and event["log_level"] == "error" for event in events
        )
        await daemon.client.write(5 * BLOCK, DATA)  # a new block takes its place
        assert bytes(await daemon.client.read(0, 8 * BLOCK)) == DATA * 8
