"""A Linux kernel's iSCSI initiator with file systems on cleaved's disks: data verified by fio,
trim, growth, and a split under a mounted file system.
"""

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.programs import Daemon
from tests.guest.file_systems import Mounted
from tests.guest.machine import Machine
from tests.guest.open_iscsi import OpenIscsi, sessions

MIB = 1 << 20
# mkfs.xfs refuses anything below 300 MiB.
DISK_MIB = 384
FILE_MIB = 16
# fio writes at random, reads everything back and compares, bypassing the page cache: the compared
# data comes from the daemon.
FIO = (
    "fio --name=verify --directory={directory} --size=16m --rw=randwrite --bsrange=4k-128k"
    " --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1 --end_fsync=1 2>&1"
)
# The poll for a state, short enough for a test not to miss it.
POLLS_MAX = 400
POLL_SECONDS = 0.1

pytestmark = [pytest.mark.client("qemu-system-x86_64", "fio"), pytest.mark.needs("Linux guest")]


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    for _ in range(POLLS_MAX):
        if await condition():
            return
        await asyncio.sleep(POLL_SECONDS)
    raise AssertionError(f"never: {what}")


async def used_bytes(daemon: Daemon, vdisk: str) -> int:
    shown: dict[str, Any] = await daemon.ctl("vdisk", "show", vdisk)
    return int(shown["used_bytes"])


async def checked(daemon: Daemon) -> None:
    assert (await daemon.ctl("pool", "check", "--verify-data"))["errors"] == []


@asynccontextmanager
async def guest(
    directory: Path, *options: str, expected: str = "(?!)"
) -> AsyncIterator[tuple[Daemon, Machine, OpenIscsi]]:
    """Start a daemon and a guest. At the end there must be no session, no complaint of the guest's
    kernel (except expected ones), and no finding in the pool check.
    """
    async with Daemon(directory, pool_size="4GiB", options=options) as daemon:
        async with Machine(directory, expected) as machine:
            yield daemon, machine, OpenIscsi(machine, daemon)
            assert await sessions(daemon) == []
        await checked(daemon)


async def grow(
    daemon: Daemon, machine: Machine, initiator: OpenIscsi, disk: Mounted, device: str
) -> None:
    """Resize the vdisk under a mounted file system, and let both grow into it."""
    size_bytes = 2 * DISK_MIB * MIB
    await daemon.ctl("vdisk", "resize", "disk", str(size_bytes))
    await initiator.rescan()
    assert await machine.succeed(f"blockdev --getsize64 {device}") == str(size_bytes)
    await machine.succeed(f"{disk.grow} 2>&1")
    assert int(await machine.succeed("stat -f -c %b /mnt")) * 4096 > 1.5 * DISK_MIB * MIB


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
async def test_file_system_fio_trim_and_growth(tmp_path: Path, kind: str) -> None:
    async with guest(tmp_path) as (daemon, machine, initiator):
        await daemon.ctl("vdisk", "create", "disk", "--size", f"{DISK_MIB}MiB")
        assert await initiator.discover() == ["disk"]
        device = await initiator.login("disk")
        assert [row["initiator"] for row in await sessions(daemon)] == [
            "iqn.2026-01.io.cleaved.test:guest"
        ]
        assert await machine.succeed(f"blockdev --getsize64 {device}") == str(DISK_MIB * MIB)
        disk = Mounted(kind, device, "/mnt")
        await machine.succeed(f"{disk.make} 2>&1 && {disk.mount}")
        assert "err= 0" in await machine.succeed(FIO.format(directory="/mnt"))

        await machine.succeed(f"head -c {FILE_MIB}m /dev/urandom >/mnt/big && sync")
        before_bytes = await used_bytes(daemon, "disk")
        assert before_bytes > FILE_MIB * MIB
        await machine.succeed("rm /mnt/big && sync")
        assert re.search(r"\d\d\d\.?\d* MiB", await machine.succeed("/sbin/fstrim -v /mnt"))
        assert await used_bytes(daemon, "disk") < before_bytes - (FILE_MIB - 1) * MIB

        await grow(daemon, machine, initiator, disk, device)
        assert "err= 0" in await machine.succeed(FIO.format(directory="/mnt"))
        await machine.succeed(f"{disk.unmount} && {disk.check} 2>&1")
        await initiator.logout("disk")


async def golden_and_clone(daemon: Daemon, machine: Machine, golden: Mounted) -> None:
    """Write a file with a known checksum, take a snapshot of the frozen file system and a clone of
    it from outside, and then overwrite the file.
    """
    await machine.succeed(f"{golden.make} 2>&1 && {golden.mount}")
    await machine.succeed(
        f"head -c {FILE_MIB}m /dev/urandom >/golden/data && sha256sum </golden/data >/tmp/sum"
    )
    await machine.succeed("sync && fsfreeze --freeze /golden")
    await daemon.ctl("snapshot", "create", "golden@v1")
    await machine.succeed("fsfreeze --unfreeze /golden")
    await daemon.ctl("clone", "create", "golden@v1", "web")
    await machine.succeed(f"dd if=/dev/zero of=/golden/data bs=1M count={FILE_MIB} conv=fsync 2>&1")


SAME_DATA = "echo 3 >/proc/sys/vm/drop_caches && sha256sum </web/data | cmp - /tmp/sum"


async def has_written(daemon: Daemon, vdisk: str, writes: int) -> bool:
    return int((await daemon.ctl("stats", vdisk))["writes"]) > writes


async def start_fio(daemon: Daemon, machine: Machine, vdisk: str) -> None:
    """Start rounds of fio on /web in the background; return once it writes."""
    before = (await daemon.ctl("stats", vdisk))["writes"]
    await machine.succeed("fio-rounds /web >/tmp/rounds 2>&1 &")
    await until(lambda: has_written(daemon, vdisk, before + 100), "fio writes")


async def stop_fio(machine: Machine) -> None:
    """Let the current round of fio finish; every round must have verified what it read."""
    await machine.succeed("touch /tmp/stop; wait $! || { cat /tmp/rounds; false; }")


@pytest.mark.parametrize(
    ("kind", "mode", "digest"),
    [("ext4", "share", "None"), ("xfs", "copy", "CRC32C")],
)
async def test_split_of_a_mounted_clone_while_fio_verifies(
    tmp_path: Path, kind: str, mode: str, digest: str
) -> None:
    digests = {"node.conn[0].iscsi.HeaderDigest": digest, "node.conn[0].iscsi.DataDigest": digest}
    async with guest(tmp_path) as (daemon, machine, initiator):
        await daemon.ctl("vdisk", "create", "golden", "--size", f"{DISK_MIB}MiB")
        golden = Mounted(kind, await initiator.login("golden", **digests), "/golden")
        await golden_and_clone(daemon, machine, golden)
        clone = Mounted(kind, await initiator.login("web", **digests), "/web")
        assert (await initiator.negotiated()).count(f"DataDigest: {digest}") == 2
        await machine.succeed(f"{clone.mount} && {SAME_DATA}")

        # Slow enough that several rounds of fio run during the split; sharing moves no data, and
        # has no rate.
        await start_fio(daemon, machine, "web")
        pace = ["--max-rate", "3MiB/s"] if mode == "copy" else []
        before = await daemon.ctl("stats", "web")
        split = await daemon.ctl("split", "start", "web", "--wait", "--mode", mode, *pace)
        assert mode == "share" or (await daemon.ctl("stats", "web"))["reads"] > before["reads"]
        await machine.succeed(SAME_DATA)
        await stop_fio(machine)
        assert (split["state"], split["holes_remaining"]) == ("done", 0)
        assert split["blocks_copied" if mode == "copy" else "blocks_shared"] > (FILE_MIB - 1) * 256
        assert (await daemon.ctl("vdisk", "show", "web"))["backing"] is None
        await daemon.ctl("snapshot", "rm", "golden@v1")

        await machine.succeed(
            f"{clone.unmount} && {clone.check} 2>&1 && {clone.mount} && {SAME_DATA} &&"
            f" {clone.unmount}"
        )
        await machine.succeed(f"{golden.unmount} && {golden.check} 2>&1")
        await initiator.logout("web")
        await initiator.logout("golden")


async def test_initiator_comes_back_after_kill_9_while_fio_verifies(tmp_path: Path) -> None:
    """The daemon dies with commands in flight, which the kernel resends to the next daemon. With
    the disk's write cache switched off, everything acknowledged is durable. (With the cache on,
    only flushed data would have to be, which is less than fio requires.)
    """
    async with guest(tmp_path, expected="detected conn error") as (daemon, machine, initiator):
        await daemon.ctl("vdisk", "create", "disk", "--size", f"{DISK_MIB}MiB")
        device = await initiator.login("disk")
        cache_type = f"/sys/block/{device[5:]}/device/scsi_disk/*/cache_type"
        await machine.succeed(f"echo write through | tee {cache_type}")
        disk = Mounted("ext4", device, "/web")
        await machine.succeed(f"{disk.make} 2>&1 && {disk.mount}")
        await start_fio(daemon, machine, "disk")
        portal = daemon.portal
        for _ in range(2):
            await daemon.stop(signal.SIGKILL)
            await daemon.start(portal)
            await until(lambda: has_written(daemon, "disk", 100), "fio writes again")
        await stop_fio(machine)
        await initiator.rescan()  # the kernel reads the disk's cache mode again
        assert await machine.succeed(f"cat {cache_type}") == "write through"
        await machine.succeed(f"{disk.unmount} && {disk.check} 2>&1")
        await initiator.logout("disk")


CHAP = """
[iscsi.chap]
user = "guest"
secret = "a secret of its own"
mutual_user = "cleaved"
mutual_secret = "what the target says"
"""


async def test_mutual_chap(tmp_path: Path) -> None:
    (tmp_path / "chap.toml").touch(mode=0o600)
    (tmp_path / "chap.toml").touch(0o600)  # the daemon refuses secrets that others may read
    (tmp_path / "chap.toml").write_text(CHAP)
    one_way = {"node.session.auth.authmethod": "CHAP", "node.session.auth.username": "guest"}
    right = {"node.session.auth.password": "a secret of its own"}
    mutual = {
        "node.session.auth.username_in": "cleaved",
        "node.session.auth.password_in": "what the target says",
    }
    async with guest(
        tmp_path, "--config", str(tmp_path / "chap.toml"), expected="detected conn error"
    ) as (daemon, machine, initiator):
        await daemon.ctl("vdisk", "create", "disk", "--size", "8MiB")
        for wrong in ({}, {**one_way, "node.session.auth.password": "another one here"}):
            reply = await initiator.try_login("disk", **wrong)
            assert reply.status != 0 and "authorization failure" in reply.output
            assert await sessions(daemon) == []
        reply = await initiator.try_login(
            "disk",
            **one_way,
            **right,
            **{**mutual, "node.session.auth.password_in": "no such secret"},
        )
        assert reply.status != 0
        device = await initiator.login("disk", **one_way, **right, **mutual)
        await machine.succeed(
            f"head -c 1m /dev/urandom >/tmp/data && dd if=/tmp/data of={device} bs=1M conv=fsync"
            " 2>&1"
        )
        await machine.succeed(
            f"echo 3 >/proc/sys/vm/drop_caches && head -c 1m {device} | cmp - /tmp/data"
        )
        await initiator.logout("disk")
