"""File descriptors: clients cannot use them up, and administration goes on whatever they do."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from daemon.iscsi.initiator import Initiator
from daemon.process.descriptors import (
    CONTROL_MAX,
    CONTROL_MIN,
    SPARE,
    Shares,
    TooFewDescriptors,
    share_out,
)
from daemon.targets.names import TARGET_PREFIX
from protocol.iscsi.initiator.task import ConnectionEnded
from tests.daemon.programs import Daemon, cleaved

OPEN_FILES_MAX = 64


@pytest.mark.parametrize("limit", [48, 64, 128, 256, 1024, 4096, 65536, 1 << 30])
@pytest.mark.parametrize("wanted", [1, 256, 65536])
def test_all_connections_together_stay_below_the_limit(limit: int, wanted: int) -> None:
    used = 20
    shares = share_out(limit, used, wanted)
    assert used + SPARE + shares.iscsi + 2 * shares.control <= limit
    assert 1 <= shares.iscsi <= wanted and CONTROL_MIN <= shares.control <= CONTROL_MAX


def test_plenty_is_not_shared_out() -> None:
    assert share_out(4096, 20, 256) == Shares(256, CONTROL_MAX)
    assert share_out(4096, 20, 256, 64) == Shares(256, CONTROL_MAX, 64)
    scarce = share_out(100, 20, 256, 256)
    assert abs(scarce.iscsi - scarce.nbd) <= 1 and scarce.nbd > 10


def test_too_few() -> None:
    needed = 20 + SPARE + 2 * CONTROL_MIN + 1
    with pytest.raises(
        TooFewDescriptors, match=f"{needed - 1} open files are allowed, and at least {needed}"
    ):
        share_out(needed - 1, 20, 256)
    assert share_out(needed, 20, 256) == Shares(1, CONTROL_MIN)


async def test_the_control_socket_answers_while_clients_take_all_connections(
    tmp_path: Path,
) -> None:
    async with Daemon(tmp_path, open_files_max=OPEN_FILES_MAX) as daemon:
        (limited,) = [
            event for event in daemon.events() if event["event"] == "iscsi.connections_limited"
        ]
        allowed = limited["allowed"]
        assert 8 <= allowed < OPEN_FILES_MAX and limited["open_files_max"] == OPEN_FILES_MAX
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        host, _, port = daemon.portal.rpartition(":")
        disk = await Initiator.connect(host, int(port), f"{TARGET_PREFIX}a")
        clients = [socket.create_connection((host, int(port))) for _ in range(2 * OPEN_FILES_MAX)]
        while not any(event["event"] == "iscsi.refused" for event in daemon.events()):
            await asyncio.sleep(0.01)
        for number in range(4):  # each command is a connection of its own
            await daemon.ctl("vdisk", "create", f"more-{number}", "--size", "1MiB")
        together = await asyncio.gather(
            *(daemon.try_ctl("vdisk", "ls") for _ in range(CONTROL_MIN))
        )
        assert {result.status for result in together} == {0}
        await disk.write(0, b"\1" * 4096)
        assert len(os.listdir(f"/proc/{daemon.pid}/fd")) < OPEN_FILES_MAX
        refused = [
            event["reason"] for event in daemon.events() if event["event"] == "iscsi.refused"
        ]
        assert refused[0] == f"{allowed} connections, as many as the limit of open files allows"
        for client in clients:
            client.close()
        while True:  # there is room again
            try:
                again = await Initiator.connect(host, int(port), f"{TARGET_PREFIX}a")
                break
            except (
                OSError,
                ConnectionEnded,
            ):  # closed as one too many while the daemon has not seen the others leave
                await asyncio.sleep(0.01)
        assert bytes(await again.read(0, 4096)) == b"\1" * 4096
        for initiator in (disk, again):
            await initiator.close()
        assert not [event for event in daemon.events() if event["event"] == "iscsi.accept_failed"]


async def test_a_soft_limit_is_raised_to_the_hard_one(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon._limited = ("sh", "-c", 'ulimit -S -n "$0" && exec "$@"', str(OPEN_FILES_MAX))
    async with daemon:
        assert "iscsi.connections_limited" not in daemon.log()


async def test_a_limit_that_is_too_low_is_named(tmp_path: Path) -> None:
    options = (
        "serve",
        "--pool",
        str(tmp_path / "pool"),
        "--pool-size",
        "64MiB",
        "--control",
        str(tmp_path / "c"),
        "--iscsi",
        "127.0.0.1:0",
    )
    result = await cleaved(*options, open_files_max=30)
    assert (
        result.status == 1
        and "at most 30 open files are allowed" in result.messages
        and "LimitNOFILE" in result.messages
    )
