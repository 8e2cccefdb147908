"""kill -9 of a real daemon, again and again, under a client that keeps its own record of what was
acknowledged with FUA.

Meanwhile snapshots and clones are made, split and deleted. After each restart every recorded block
holds what was acknowledged last, or the write that was under way; every acknowledged snapshot is
there and reads as it did; at the end the check finds nothing. This says nothing of power loss (the
page cache survives a kill): that is what tests/crash is for.
"""

import asyncio
import os
import signal
import struct
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from daemon.admin.client import ControlClient, Unreachable
from daemon.iscsi.initiator import Initiator
from protocol.control import methods
from protocol.control.errors import ControlError
from protocol.control.parameters import SplitMode
from protocol.iscsi.errors import IscsiError
from tests.daemon.programs import Daemon

# A hundred where there is time; fewer where somebody waits at a terminal.
CYCLES = 100 if os.environ.get("CI") == "true" or os.environ.get("CLEAVED_LONG") else 10
BLOCKS = 512
BLOCK_BYTES = 4096
DISK_BYTES = 64 << 20
TARGET = "iqn.2026-01.io.cleaved:"
WRITERS = 4
MODES: tuple[SplitMode, ...] = ("copy", "share")
# Exit codes of docs/operations.md: not found, conflict.
GONE_OR_BUSY = (3, 4)


class Record:
    """What a block of one vdisk may hold: what was acknowledged last, or what was sent since."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.acknowledged: dict[int, bytes] = {}
        self.sent: dict[int, bytes] = {}

    def content(self, block: int, version: int) -> bytes:
        return struct.pack("<16sQQ", self.name.encode(), block, version) * (BLOCK_BYTES // 32)

    def may_hold(self, block: int) -> set[bytes]:
        allowed = {self.acknowledged.get(block, bytes(BLOCK_BYTES))}
        return allowed | ({self.sent[block]} if block in self.sent else set())


class Client:
    """Writes to one vdisk until the daemon dies."""

    def __init__(self, record: Record, seed: int) -> None:
        self._record = record
        self._random = Random(seed)
        self.version = seed << 32

    async def verify(self, initiator: Initiator) -> None:
        record = self._record
        for block in sorted(record.acknowledged.keys() | record.sent.keys()):
            found = bytes(await initiator.read(block * BLOCK_BYTES, BLOCK_BYTES))
            assert found in record.may_hold(block), f"{record.name} block {block}: {found[:32]!r}"
            record.acknowledged[block] = found
        record.sent.clear()

    async def write_on(self, initiator: Initiator, part: int) -> None:
        record = self._record
        while True:
            block = self._random.randrange(part, BLOCKS, WRITERS)
            self.version += 1
            content = record.sent[block] = record.content(block, self.version)
            try:
                await initiator.write(block * BLOCK_BYTES, content, fua=True)
            except (IscsiError, OSError):
                return
            record.acknowledged[block] = content
            del record.sent[block]


def administer(path: str, cycle: int, made: dict[str, bool]) -> None:
    """Snapshot, clone, split in both modes, delete, until the daemon dies. ``made`` says which
    snapshots were acknowledged.
    """
    try:
        with ControlClient(path) as control:
            turn = 0
            while True:
                turn += 1
                snapshot, clone = f"disk@s{cycle}-{turn}", f"clone{cycle}-{turn}"
                control.call(methods.SnapshotCreate(snapshots=[snapshot]))
                made[snapshot] = True
                control.call(methods.CloneCreate(snapshot=snapshot, name=clone))
                control.call(methods.SplitStart(name=clone, mode=MODES[turn & 1]))
                for old in list(made)[:-3]:
                    made.pop(old)
                    forget(control, old)
    except (Unreachable, OSError):
        return


def forget(control: ControlClient, snapshot: str) -> None:
    """Delete a snapshot and its clone; a split under way or an earlier crash may have
    been faster.
    """
    for deletion in (
        methods.VdiskDelete(name=snapshot.replace("disk@s", "clone")),
        methods.SnapshotDelete(snapshot=snapshot),
    ):
        try:
            control.call(deletion)
        except ControlError as refusal:
            if refusal.exit_code not in GONE_OR_BUSY:
                raise


async def one_cycle(daemon: Daemon, client: Client, cycle: int, made: dict[str, bool]) -> None:
    host, _, port = daemon.portal.rpartition(":")
    initiator = await Initiator.connect(host, int(port), TARGET + "disk")
    await client.verify(initiator)
    shown: list[dict[str, Any]] = await daemon.ctl("snapshot", "ls", "disk")
    names = {row["name"] for row in shown}
    assert {name for name, acknowledged in made.items() if acknowledged} <= {
        name if "@" in name else f"disk@{name}" for name in names
    }
    writers = [asyncio.create_task(client.write_on(initiator, part)) for part in range(WRITERS)]
    admin = asyncio.create_task(
        asyncio.to_thread(administer, str(daemon.control_path), cycle, made)
    )
    await asyncio.sleep(Random(cycle).uniform(0.02, 0.4))
    await daemon.stop(signal.SIGKILL)
    await asyncio.gather(*writers, admin)
    initiator.abort()


@pytest.mark.logs("")
async def test_kill_again_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = Daemon(tmp_path, "512MiB")
    await daemon.start()
    await daemon.ctl("vdisk", "create", "disk", "--size", "64MiB")
    client = Client(Record("disk"), 1)
    made: dict[str, bool] = {}
    seconds: list[float] = []
    for cycle in range(CYCLES):
        await one_cycle(daemon, client, cycle, made)
        started = time.monotonic()
        await daemon.start()
        seconds.append(time.monotonic() - started)
    async with daemon_running(daemon):
        host, _, port = daemon.portal.rpartition(":")
        async with await Initiator.connect(host, int(port), TARGET + "disk") as initiator:
            await client.verify(initiator)
        report = await daemon.ctl("pool", "check")
        assert report["ok"], report["errors"]
    assert len(client._record.acknowledged) > BLOCKS // 4, "the client hardly wrote anything"
    with capsys.disabled():
        print(
            f"\n[{CYCLES} kills, {client.version & 0xFFFFFFFF} FUA writes, restart to serving"
            f" {sorted(seconds)[len(seconds) // 2]:.2f} s median, {max(seconds):.2f} s longest] ",
            end="",
            file=sys.stdout,
        )


class daemon_running:  # noqa: N801 -- used like a function
    """Stops the daemon in order at the end."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def __aenter__(self) -> Daemon:
        return self._daemon

    async def __aexit__(self, *_: object) -> None:
        assert await self._daemon.stop() == 0
