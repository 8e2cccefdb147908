"""A whole daemon on a file system that is full: what clients, administrators and the log are told,
and that it ends by itself.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from daemon.iscsi.initiator import Initiator
from daemon.targets.names import TARGET_PREFIX
from protocol.iscsi.initiator.task import CommandFailed
from storage.pool import Pool
from tests.daemon.programs import PROGRAM_SECONDS_MAX, Daemon
from tests.storage.mounts import host

pytestmark = pytest.mark.needs("file systems")
MIB = 1 << 20
TEST_UNIT_READY = bytes(6)
SOFT_THRESHOLD_REACHED = (0x6, 0x38, 0x07)
SPACE_ALLOCATION_FAILED = (0x7, 0x27, 0x07)


async def connect(daemon: Daemon) -> Initiator:
    name, _, port = daemon.portal.rpartition(":")
    disk = await Initiator.connect(name, int(port), f"{TARGET_PREFIX}a")
    assert await sense(disk) == (0x6, 0x29, 0x00)
    return disk


async def sense(disk: Initiator) -> tuple[int, int, int] | None:
    try:
        await disk._once(lambda done: disk._connection.submit(0, TEST_UNIT_READY, done))
    except CommandFailed as error:
        return error.key, error.asc, error.ascq
    return None


async def write_until_refused(disk: Initiator) -> tuple[int, int, int]:
    for number in range(400):
        try:
            await disk.write((100 + number) * MIB, b"\x11" * MIB)
        except CommandFailed as error:
            return error.key, error.asc, error.ascq
    raise AssertionError("the host is never full")


async def until(daemon: Daemon, key: str, value: Any) -> dict[str, Any]:
    async with asyncio.timeout(PROGRAM_SECONDS_MAX):
        while (shown := await daemon.ctl("pool", "show"))[key] != value:
            pass
    return dict(shown)


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
async def test_a_daemon_on_a_full_host(tmp_path: Path, kind: str) -> None:
    with host(kind, tmp_path) as under:
        await asyncio.to_thread(Pool.create, under.pool_path, 1 << 30)
        (tmp_path / "pool").symlink_to(under.pool_path)
        async with Daemon(tmp_path) as daemon:
            await daemon.ctl("vdisk", "create", "a", "--size", "1GiB")
            async with await connect(daemon) as disk:
                for number in range(20):
                    await disk.write(number * MIB, b"\x22" * MIB)
                await daemon.ctl("snapshot", "create", "a@s")
                for number in range(20):
                    await disk.write(number * MIB, b"\x33" * MIB)
                under.fill()
                assert await write_until_refused(disk) == SPACE_ALLOCATION_FAILED
                shown = await daemon.ctl("pool", "show")
                assert (
                    shown["host_full"]
                    and shown["available_limited_by"] == "host"
                    and shown["available_bytes"] < MIB
                )
                assert not shown["full"] and shown["space_warning_percent"] is None
                assert await sense(disk) == SOFT_THRESHOLD_REACHED
                await disk.flush()
        # It stopped in order, and starts and serves although nothing has changed.
        async with Daemon(tmp_path) as daemon:
            async with await connect(daemon) as disk:
                assert bytes(await disk.read(19 * MIB, 4096)) == b"\x33" * 4096
                await daemon.ctl("snapshot", "rm", "a@s")
                await until(daemon, "host_full", value=False)
                await disk.write(0, b"\x44" * MIB, fua=True)
                assert not (await daemon.ctl("pool", "show"))["read_only"]
            events = daemon.events()
        told = [event["event"] for event in events]
        assert told.count("pool.host_full") >= 1 and told.count("pool.read_only") == 0
        assert (
            next(event["level"] for event in events if event["event"] == "pool.host_full")
            == "error"
        )
        assert [
            event["log_records"] for event in daemon.events() if event["event"] == "pool.closed"
        ] == [0, 0]
