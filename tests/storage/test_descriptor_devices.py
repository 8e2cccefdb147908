"""What only files and block devices have: the kernel's answers, locks, creation, holes."""

import asyncio
import errno
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from storage.device import file, host_space, open_device
from storage.device.descriptor import INLINE_WRITE_BYTES_MAX, DescriptorDevice
from storage.device.raw import BlockDevice
from storage.errors import DeviceFailed, DeviceFull, OutOfRange, PoolLocked, PoolRefused
from tests.storage.device_makers import (
    LARGER_BYTES,
    SIZE_BYTES,
    enlarge_loop_device,
    loop_device,
    new_file,
    sparse_file,
)
from tests.storage.test_io_threads import PATIENCE_SECONDS, Gate

BLOCK = 4096
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def path(tmp_path: Path) -> str:
    return new_file(tmp_path)


@pytest.fixture
def device(path: str) -> Iterator[DescriptorDevice]:
    made = open_device(path)
    yield made
    made.close()


def failing(code: int) -> Any:
    def call(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    return call


# --- Inline or not ---


@pytest.mark.parametrize(
    "answer",
    [failing(errno.EAGAIN), lambda *_: BLOCK // 2, failing(errno.EOPNOTSUPP)],
    ids=["miss", "part", "unknown"],
)
def test_a_read_that_the_page_cache_cannot_answer_is_refused(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    device._in_memory = False
    monkeypatch.setattr(os, "preadv", answer)
    assert not device.try_readv([bytearray(BLOCK)], 0)
    assert not device.try_readv([bytearray(BLOCK // 2), bytearray(BLOCK // 2)], 0)


def test_where_all_is_in_memory_a_plain_read_is_an_inline_read(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[int] = []

    def preadv(_: int, buffers: Sequence[bytearray], offset: int, flag: int) -> int:
        flags.append(flag)
        return failing(errno.EOPNOTSUPP)() if flag else len(buffers[0])

    device._in_memory = True
    monkeypatch.setattr(os, "preadv", preadv)
    assert device.try_readv([bytearray(BLOCK)], 0)
    assert device.try_readv([bytearray(BLOCK)], 0)
    assert flags == [os.RWF_NOWAIT, 0, 0], "the flag is tried once"


def test_a_file_on_tmpfs_is_read_inline() -> None:
    path = f"/dev/shm/cleaved-test-{os.getpid()}"
    sparse_file(path, SIZE_BYTES)
    try:
        device = open_device(path)
        assert device.try_readv([bytearray(BLOCK)], BLOCK)
        device.close()
    finally:
        os.unlink(path)


def test_a_failed_inline_read_says_where(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    with pytest.raises(DeviceFailed, match="cannot read at byte 8192") as caught:
        device.try_readv([bytearray(BLOCK)], 2 * BLOCK)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.ENOSPC, DeviceFull), (errno.EDQUOT, DeviceFull), (errno.EIO, DeviceFailed)],
)
async def test_a_failed_write_says_why(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[DeviceFailed]
) -> None:
    monkeypatch.setattr(os, "pwritev", failing(code))
    with pytest.raises(DeviceFailed) as inline:
        device.try_writev([bytes(BLOCK)], 0, BLOCK)
    with pytest.raises(DeviceFailed) as threaded:
        await device.writev([bytes(BLOCK)], 0)
    for caught in (inline, threaded):
        assert type(caught.value) is kind
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == code
        assert device.path in str(caught.value)


def test_a_long_write_is_not_done_inline(device: DescriptorDevice) -> None:
    longest = bytes(INLINE_WRITE_BYTES_MAX)
    assert device.try_writev([longest], 0, len(longest))
    assert not device.try_writev([longest, bytes(512)], 0, len(longest) + 512)


async def test_with_much_dirty_writes_go_by_the_threads_until_a_sync(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(os, "fdatasync", gate)
    data = bytes(INLINE_WRITE_BYTES_MAX)
    device._dirty_bytes_max = device._dirty_bytes_wanted = 4 * len(data)
    for _ in range(5):
        assert device.try_writev([data], 0, len(data))
    assert not device.try_writev([data], 0, len(data))
    gate.wait_for(1)
    assert not device.try_writev([data], 0, len(data))
    await device.writev([data], 0)
    gate.open()
    await device.sync()
    assert device.try_writev([data], 0, len(data))


# --- Short transfers ---


async def test_short_transfers_are_continued(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_pwritev, real_preadv = os.pwritev, os.preadv
    calls = 0

    def short(buffers: Sequence[Any]) -> list[memoryview]:
        nonlocal calls
        calls += 1
        return [memoryview(buffers[0])[:700]]

    monkeypatch.setattr(
        os, "pwritev", lambda fd, buffers, offset: real_pwritev(fd, short(buffers), offset)
    )
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: real_preadv(fd, short(buffers), offset)
    )
    parts = [os.urandom(512), os.urandom(BLOCK), os.urandom(1024)]
    await device.writev(parts, BLOCK)
    into = [bytearray(1024), bytearray(BLOCK), bytearray(512)]
    await device.readv(into, BLOCK)
    assert b"".join(into) == b"".join(parts)
    assert calls > 6


async def test_no_progress_is_a_failure(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(DeviceFailed, match="short"):
        await device.writev([bytes(BLOCK)], 0)


async def test_a_file_that_was_cut_off_behind_our_back_is_a_failure(
    device: DescriptorDevice,
) -> None:
    os.truncate(device.path, BLOCK)
    assert not device.try_readv([bytearray(2 * BLOCK)], 0)
    with pytest.raises(DeviceFailed, match="4096 bytes short"):
        await device.readv([bytearray(2 * BLOCK)], 0)


# --- Sync ---


@pytest.mark.parametrize("waiting", [1, 10])
async def test_one_sync_serves_all_that_wait(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    gate = Gate()
    calls: list[int] = []

    def fdatasync(descriptor: int) -> None:
        calls.append(descriptor)
        gate()

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    first = device.sync()
    gate.wait_for(1)
    # Asked for after the first began: it proves nothing for these, and one more serves them all.
    later = [device.sync() for _ in range(waiting)]
    gate.open()
    await asyncio.gather(first, *later)
    assert len(calls) == 2, "the first covers nothing that was asked for after it began"


async def test_a_sync_does_not_wait_for_reads(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = Gate(), os.preadv

    def preadv(*arguments: Any) -> int:
        gate()
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    reads = [device.readv([bytearray(BLOCK)], 0) for _ in range(50)]
    await asyncio.wait_for(device.sync(), PATIENCE_SECONDS)
    assert not any(read.done() for read in reads)
    gate.open()
    await asyncio.gather(*reads)


async def test_after_a_failed_sync_none_succeeds(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing(errno.EIO))
        with pytest.raises(DeviceFailed, match="durable"):
            await device.sync()
    with pytest.raises(DeviceFailed, match="durable"):
        await device.sync()


async def test_a_failed_background_sync_shows_in_the_next(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing(errno.ENOSPC))
        device._written_bytes += device._dirty_bytes_max + 1
        assert not device.try_writev([bytes(BLOCK)], 0, BLOCK)
        assert device._background_sync is not None
        await asyncio.wait([device._background_sync])
    with pytest.raises(DeviceFull):
        await device.sync()


# --- Holes ---


async def test_discard_gives_space_back(device: DescriptorDevice) -> None:
    await device.writev([os.urandom(1024 * 1024)], 0)
    await device.sync()
    before = os.stat(device.path).st_blocks
    await device.discard(0, 1024 * 1024)
    assert os.stat(device.path).st_blocks < before
    assert os.stat(device.path).st_size == SIZE_BYTES


async def test_a_long_discard_goes_in_steps(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(file, "DISCARD_STEP_BYTES", 3 * BLOCK)
    monkeypatch.setattr(
        file, "punch_hole", lambda _, offset, length: ranges.append((offset, length))
    )
    await device.discard(BLOCK, 7 * BLOCK)
    assert ranges == [(BLOCK, 3 * BLOCK), (4 * BLOCK, 3 * BLOCK), (7 * BLOCK, BLOCK)]


async def test_where_holes_are_unknown_discard_does_nothing_and_says_so_once(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file, "punch_hole", failing(errno.EOPNOTSUPP))
    with caplog.at_level(logging.INFO):
        await device.discard(0, BLOCK)
        await device.discard(0, BLOCK)
    assert [record.getMessage() for record in caplog.records if record.name == file.__name__] == [
        (
            f"{device.path}: its file system cannot punch holes; freed blocks stay allocated in the"
            " file"
        )
    ]


async def test_a_failed_discard_is_an_error(
    device: DescriptorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "punch_hole", failing(errno.EIO))
    with pytest.raises(DeviceFailed, match="discard"):
        await device.discard(0, BLOCK)


def test_a_refused_punch_has_the_kernels_reason() -> None:
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        host_space.punch_hole(-1, 0, BLOCK)
    assert caught.value.errno == errno.EBADF


async def test_a_file_grows_durably_or_says_why_not(device: DescriptorDevice) -> None:
    with pytest.raises(DeviceFailed, match="grow"):
        await device.grow(1 << 62)
    assert device.size_bytes == SIZE_BYTES
    await device.grow(LARGER_BYTES)
    assert os.stat(device.path).st_size == LARGER_BYTES


# --- Opening ---


def test_what_is_no_pool_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, message in (
        ("", "is a folder"),
        ("missing", "create a pool"),
        ("fifo", "neither a file nor a block device"),
    ):
        with pytest.raises(PoolRefused, match=message):
            open_device(str(tmp_path / name))


def test_a_file_without_permission_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    with pytest.raises(PoolRefused, match="run as a user"):
        open_device(path)


def test_two_cannot_open_one_pool(device: DescriptorDevice) -> None:
    for read_only in (False, True):
        with pytest.raises(PoolLocked, match="in use by another process"):
            open_device(device.path, read_only=read_only)
    device.close()
    open_device(device.path).close()


def test_another_process_cannot_open_it(device: DescriptorDevice) -> None:
    program = "import sys; from storage.device import open_device; open_device(sys.argv[1]).close()"
    command = [sys.executable, "-c", program, device.path]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "PoolLocked" in refused.stderr
    device.close()
    subprocess.run(command, cwd=ROOT, check=True)


def test_two_may_check_one_pool_but_none_writes_it(path: str) -> None:
    first, second = open_device(path, read_only=True), open_device(path, read_only=True)
    with pytest.raises(PoolLocked):
        open_device(path)
    with pytest.raises(DeviceFailed, match="read-only"):
        first.try_writev([bytes(BLOCK)], 0, BLOCK)
    first.close()
    second.close()


def test_a_refused_open_leaves_no_descriptor_open(device: DescriptorDevice) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(PoolLocked):
        open_device(device.path)
    assert len(os.listdir("/proc/self/fd")) == len(before)


# --- Block devices ---


@pytest.fixture
def loop_path(tmp_path: Path) -> Iterator[str]:
    with loop_device(tmp_path) as path:
        yield path


@pytest.mark.needs("loop device")
def test_a_block_device_has_one_user(loop_path: str) -> None:
    device = open_device(loop_path)
    assert isinstance(device, BlockDevice)
    for read_only in (False, True):
        with pytest.raises(PoolLocked):
            open_device(loop_path, read_only=read_only)
    device.close()
    open_device(loop_path, read_only=True).close()


@pytest.mark.needs("loop device")
async def test_a_block_device_grows_when_it_became_larger(loop_path: str) -> None:
    device = open_device(loop_path)
    with pytest.raises(OutOfRange, match="enlarge the device first"):
        await device.grow(LARGER_BYTES)
    assert device.size_bytes == SIZE_BYTES
    enlarge_loop_device(loop_path)
    await device.grow(LARGER_BYTES)
    assert device.size_bytes == LARGER_BYTES
    await device.writev([bytes(BLOCK)], LARGER_BYTES - BLOCK)
    device.close()


@pytest.mark.needs("loop device")
async def test_a_discard_below_the_devices_own_block_is_left_out(
    loop_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = open_device(loop_path)
    assert isinstance(device, BlockDevice)
    device._logical_block_bytes = BLOCK
    data = os.urandom(2 * BLOCK)
    await device.writev([data], 0)
    await device.discard(512, 2 * BLOCK - 1024)
    into = bytearray(2 * BLOCK)
    await device.readv([into], 0)
    assert into == data
    device.close()
