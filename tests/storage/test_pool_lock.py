"""One process has a pool open, whatever paths lead to it: the locks on the file, on the pool's
UUID, and the owner noted in the pool.
"""

import asyncio
import errno
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.check import check_path
from storage.device import open_device, pool_lock
from storage.device.owner import Owner, decode_owner
from storage.errors import PoolLocked, PoolRefused
from storage.layout import BLOCK_BYTES, OWNER, SUPERBLOCK_VBNS
from storage.pool import Pool
from storage.superblock.superblock import decode
from tests.storage.device_makers import looped
from tests.storage.devices import MemoryDevice
from tests.storage.pools import SMALL_POOL_BYTES
from tests.storage.test_descriptor_devices import ROOT

HERE = Owner.of_this_process()
ELSEWHERE = Owner(5, b"another boot....", 7, 8, 9, "elsewhere")


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "pool")
    Pool.create(path, SMALL_POOL_BYTES)
    return path


def superblocks(path: str) -> list[bytes]:
    content = Path(path).read_bytes()
    return [content[vbn * BLOCK_BYTES :][:BLOCK_BYTES] for vbn in SUPERBLOCK_VBNS]


def owners(path: str) -> list[Owner | None]:
    found = [decode(block) for block in superblocks(path)]
    return [None if superblock is None else superblock.owner for superblock in found]


def set_owner(path: str, owner: Owner) -> None:
    with open(path, "r+b") as file:
        for vbn, block in enumerate(superblocks(path)):
            superblock = decode(block)
            assert superblock is not None
            superblock.owner = owner
            file.seek(vbn * BLOCK_BYTES)
            file.write(superblock.encode())


def copied(path: str, to: Path) -> str:
    to.write_bytes(Path(path).read_bytes())
    return str(to)


# --- Several paths to one pool ---


async def refused(path: str, words: str) -> None:
    with pytest.raises(PoolLocked, match=words):
        await Pool.open(path)
    with pytest.raises(PoolLocked, match="open"):
        check_path(path)


async def test_links_to_an_open_pool_are_refused(path: str, tmp_path: Path) -> None:
    os.link(path, tmp_path / "hard")
    os.symlink(path, tmp_path / "soft")
    pool = await Pool.open(path)
    for name in ("hard", "soft"):
        await refused(str(tmp_path / name), "in use by another process")
    await pool.close()
    for name in ("hard", "soft"):
        await (await Pool.open(str(tmp_path / name))).close()


@pytest.mark.needs("mount")
async def test_a_bind_mount_of_an_open_pool_is_refused(path: str, tmp_path: Path) -> None:
    other = str(tmp_path / "bound")
    os.mknod(other)
    await asyncio.to_thread(subprocess.run, ["mount", "--bind", path, other], check=True)
    try:
        pool = await Pool.open(path)
        await refused(other, "in use by another process")
        await pool.close()
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "--lazy", other], check=True)


@pytest.mark.needs("loop device")
async def test_a_loop_device_over_an_open_pool_is_refused_and_the_other_way_round(
    path: str,
) -> None:
    """Found from outside: a daemon on the file and one on a loop device over it both served, and
    destroyed each other's data.
    """
    with looped(path) as device:
        for first, second in ((path, device), (device, path)):
            pool = await Pool.open(first)
            await refused(
                second,
                rf"process {os.getpid()} has the pool {pool.show()['uuid']} open by another path",
            )
            with pytest.raises(PoolLocked):
                await asyncio.to_thread(Pool.create, second, SMALL_POOL_BYTES, overwrite=True)
            await pool.vdisk_create(f"by{first.replace('/', '-')}", 1 << 20)
            await pool.close()
            # What was written by the other path is found: nothing stale stays in the page cache of
            # the device.
            again = await Pool.open(second)
            assert f"by{first.replace('/', '-')}" in again.names()
            await again.close()


@pytest.mark.needs("loop device")
async def test_what_the_page_cache_of_a_device_remembers_is_not_believed(path: str) -> None:
    """Somebody (multipathd, say) keeps the device open, so that its cache lives on, while the pool
    is served by another path.
    """
    with looped(path) as device:
        await opened_and_closed(device)
        watcher = os.open(device, os.O_RDONLY)
        os.pread(watcher, SMALL_POOL_BYTES, 0)
        pool = await Pool.open(path)
        await pool.vdisk_create("by-the-file", 1 << 20)
        await pool.close()
        again = await Pool.open(device)
        assert again.names() == ["by-the-file"]
        await again.close()
        os.close(watcher)


async def test_a_copy_of_an_open_pool_is_refused_and_can_be_checked(
    path: str, tmp_path: Path
) -> None:
    copy = copied(path, tmp_path / "copy")
    pool = await Pool.open(path)
    await refused(copy, "or a copy with the same UUID.* `cleaved check --copy`")
    assert check_path(copy, is_copy=True).ok
    await pool.close()


def test_checks_share_the_lock_with_each_other_and_with_nobody_else(
    path: str, tmp_path: Path
) -> None:
    copies = [copied(path, tmp_path / f"copy{number}") for number in range(pool_lock.SHARES + 1)]
    readers = [open_device(copy, read_only=True) for copy in copies[:-1]]
    with pytest.raises(PoolLocked):
        open_device(copies[-1], read_only=True)
    readers.pop().close()
    assert check_path(copies[-1]).ok
    for reader in readers:
        with pytest.raises(PoolLocked):
            asyncio.run(Pool.open(path))
        reader.close()
    asyncio.run(opened_and_closed(path))


async def opened_and_closed(path: str) -> list[tuple[str, dict[str, Any]]]:
    events: list[tuple[str, dict[str, Any]]] = []
    pool = await Pool.open(path, on_event=lambda name, **fields: events.append((name, fields)))
    await pool.close()
    return events


async def test_a_refused_open_and_a_close_give_up_all_locks(path: str) -> None:
    before = os.listdir("/proc/self/fd")
    pool = await Pool.open(path)
    with pytest.raises(PoolLocked):
        await Pool.open(path)
    await pool.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)
    await opened_and_closed(path)


# --- The owner ---


async def test_the_owner_is_noted_in_both_copies_while_the_pool_is_open(path: str) -> None:
    assert owners(path) == [None, None]
    pool = await Pool.open(path)
    first, second = owners(path)
    assert first is not None and first == second
    assert first == replace(HERE, opened_ns=first.opened_ns)
    await pool.vdisk_create("a", 1 << 20)
    assert owners(path) == [first, first]
    await pool.close()
    assert owners(path) == [None, None]


def test_an_owner_is_read_back_as_it_was_written() -> None:
    for owner in (HERE, ELSEWHERE, replace(HERE, host="x" * 64)):
        assert decode_owner(b"\xff" * 8 + owner.encode(), 8) == owner
    assert decode_owner(bytes(OWNER.size), 0) is None
    assert decode_owner(replace(HERE, host="é" * 40).encode(), 0) is not None


def test_a_process_that_runs_keeps_others_out_where_they_do_not_see_its_locks(path: str) -> None:
    """As from another network namespace, by a path of its own: the sockets are not seen, nor is the
    lock on the file.
    """
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        start = Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()[19]
        owner = replace(HERE, pid=running.pid, start_ticks=int(start))
        set_owner(path, owner)
        for attempt in (lambda: asyncio.run(Pool.open(path)), lambda: check_path(path)):
            with pytest.raises(
                PoolLocked, match=f"process {running.pid} of this machine has this pool open"
            ):
                attempt()
        assert owners(path) == [owner, owner]
        # A process that has its number, and is another one, is not its owner.
        set_owner(path, replace(owner, start_ticks=int(start) + 1))
        assert not names_of(asyncio.run(opened_and_closed(path)), "pool.owner_changed")
        set_owner(path, owner)
        running.communicate(b"\n")
    events = asyncio.run(opened_and_closed(path))
    assert not names_of(events, "pool.owner_changed")
    assert owners(path) == [None, None]


def names_of(events: list[tuple[str, dict[str, Any]]], wanted: str) -> list[dict[str, Any]]:
    return [fields for name, fields in events if name == wanted]


@pytest.mark.parametrize(
    "owner", [ELSEWHERE, replace(HERE, pid_namespace=1), replace(HERE, boot_id=bytes(16))]
)
def test_an_owner_of_another_boot_or_host_or_container_is_reported_and_stops_nothing(
    path: str, owner: Owner
) -> None:
    set_owner(path, owner)
    events = asyncio.run(opened_and_closed(path))
    expected = {
        "previous_host": owner.host,
        "previous_pid": owner.pid,
        "previous_opened_ns": owner.opened_ns,
    }
    assert names_of(events, "pool.owner_changed") == [expected]
    assert [name for name, _ in events][-2:] == ["pool.opened", "pool.closed"]


def test_without_proc_nothing_is_said_of_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.device.owner._proc", lambda name: "")
    here = Owner.of_this_process()
    assert not here.shares_boot_with(here) and not here.is_alive


async def test_a_pool_in_memory_has_no_owner_and_no_lock() -> None:
    memory = MemoryDevice(SMALL_POOL_BYTES)
    await Pool.format(memory)
    pools = [await Pool.open_on(memory.copy()) for _ in range(2)]
    for pool in pools:
        await pool.close()


@pytest.mark.needs("loop device")
def test_another_process_that_sees_no_lock_is_refused_by_the_owner(path: str) -> None:
    program = (
        "import asyncio, os, sys\nfrom storage.device import pool_lock\nfrom storage.pool import"
        " Pool\npool_lock._take = lambda uuid, share: os.open('/dev/null',"
        " os.O_RDONLY)\nasyncio.run(Pool.open(sys.argv[1]))\n"
    )

    async def attempt(device: str) -> "subprocess.CompletedProcess[str]":
        pool = await Pool.open(path)
        command = [sys.executable, "-c", program, device]
        ended = await asyncio.to_thread(
            subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=False
        )
        await pool.close()
        return ended

    with looped(path) as device:
        ended = asyncio.run(attempt(device))
    assert ended.returncode == 1
    assert f"process {os.getpid()} of this machine has this pool open" in ended.stderr


def test_a_process_that_may_have_no_such_sockets_is_told_so(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any) -> Any:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr("socket.socket", forbidden)
    for attempt in (lambda: open_device(path), lambda: check_path(path)):
        with pytest.raises(PoolRefused, match=r"cannot be locked: .* abstract Unix sockets"):
            attempt()


HOLDS_A_POOL = """
import asyncio, sys
from storage.pool import Pool

async def main():
    await Pool.open(sys.argv[1])
    print("open", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_an_owner_that_is_dead_and_not_waited_for_is_in_nobodys_way(path: str) -> None:
    """Found by review: after kill -9 the next start was refused as long as the parent had not
    reaped the old process.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_POOL, path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        os.kill(process.pid, 9)
        # Its files are closed when its last thread has ended; the first may be a zombie before.
        while (
            Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
            or len(os.listdir(f"/proc/{process.pid}/task")) > 1
        ):
            time.sleep(0.01)
        assert names_of(asyncio.run(opened_and_closed(path)), "pool.opened")
    finally:
        process.kill()
        process.communicate()
