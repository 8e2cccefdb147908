"""What runs a check: over a reader, over the path of a pool that is not served, and over the device
of a pool that is.

The live check reads the state of one consistency point, whose blocks the pool must not reuse until
the check has ended.
"""

import asyncio
import fcntl
import os
import stat
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Protocol, TypeVar

from storage import layout
from storage.check.engine import Check
from storage.check.report import CheckReport
from storage.check.steps import Block, Steps
from storage.check.superblock import Buffer, choose_superblock, parse_superblock
from storage.device import Device
from storage.device.pool_lock import close_all, lock_pool
from storage.errors import DeviceFailed, PoolLocked, PoolRefused

# Most buffers that one preadv takes (IOV_MAX of Linux), so that a run of blocks is one call.
RUN_BLOCKS_MAX = 1024

T = TypeVar("T")
OnProgress = Callable[[str, int], None]


class BlockReader(Protocol):
    """Where an offline check reads from."""

    @property
    def size_bytes(self) -> int:
        """Size of the device."""

    def read(self, vbns: Sequence[int]) -> list[Block]:
        """The blocks of ``vbns``, in their order; None for one that the device fails to read."""


class FileReader:
    """Reads an open file or block device with few, vectored calls."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size_bytes = os.lseek(descriptor, 0, os.SEEK_END)

    def read(self, vbns: Sequence[int]) -> list[Block]:
        """The blocks of ``vbns``, in their order. A run with an unreadable block in it is read
        again one by one.
        """
        blocks: list[Block] = []
        for first, count in _runs(vbns):
            run = self._read_run(first, count)
            blocks += (
                run
                if run is not None
                else [self._read_one(vbn) for vbn in range(first, first + count)]
            )
        return blocks

    def _read_one(self, vbn: int) -> Block:
        run = self._read_run(vbn, 1)
        return None if run is None else run[0]

    def _read_run(self, first: int, count: int) -> list[Block] | None:
        wanted = count * layout.BLOCK_BYTES
        try:
            data = os.pread(self._descriptor, wanted, first * layout.BLOCK_BYTES)
        except OSError:
            return None
        return _cut(memoryview(data), count) if len(data) == wanted else None


def _runs(vbns: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first VBN, count) of each run of consecutive VBNs."""
    first, count = 0, 0
    for vbn in vbns:
        if count and vbn == first + count and count < RUN_BLOCKS_MAX:
            count += 1
            continue
        if count:
            yield first, count
        first, count = vbn, 1
    if count:
        yield first, count


def _cut(data: memoryview, count: int) -> list[Block]:
    return [
        data[start * layout.BLOCK_BYTES : (start + 1) * layout.BLOCK_BYTES]
        for start in range(count)
    ]


def check_device(
    reader: BlockReader, verify_data: bool = False, on_progress: OnProgress | None = None
) -> CheckReport:
    """Check the pool on ``reader``. Raises PoolRefused when there is none that this program can
    interpret.

    ``on_progress`` is called with the phase and the number of blocks read so far, once a batch.
    """
    superblocks = reader.read(layout.SUPERBLOCK_VBNS)
    chosen = choose_superblock(superblocks, reader.size_bytes)
    check = Check(chosen, verify_data)
    _note_differing_superblock(superblocks, chosen.cp, check.report)
    with closing(check.run()) as steps:
        return _drive(steps, check, reader, on_progress or _no_progress)


def _note_differing_superblock(
    superblocks: Sequence[Buffer | None], cp: int, report: CheckReport
) -> None:
    for vbn, block in enumerate(superblocks):
        parsed = None if block is None else parse_superblock(block)
        if parsed is not None and parsed.cp != cp:
            report.note(
                f"the superblock at VBN {vbn} is of consistency point {parsed.cp}, the other one of"
                f" {cp}: a start repairs it"
            )
        elif parsed is None:
            report.note(
                f"the superblock at VBN {vbn} is not valid; the other one holds the pool's state (a"
                " torn write leaves this behind)"
            )


def _drive(steps: Steps[T], check: Check, reader: BlockReader, on_progress: OnProgress) -> T:
    try:
        vbns = next(steps)
        while True:
            check.report.blocks_read += len(vbns)
            on_progress(check.phase, check.report.blocks_read)
            vbns = steps.send(reader.read(vbns))
    except StopIteration as end:
        result: T = end.value
        return result


def _no_progress(phase: str, blocks_read: int) -> None:
    """Nobody watches."""


def check_path(
    path: str,
    verify_data: bool = False,
    on_progress: OnProgress | None = None,
    *,
    is_copy: bool = False,
) -> CheckReport:
    """Check the pool file or device at ``path``, which nobody serves. It is opened for reading
    only, under shared locks. ``is_copy``: of a pool that may be served meanwhile, so that its UUID
    may be in use.

    Raises PoolRefused (not there, not a pool, a newer format, truncated) or PoolLocked (a daemon
    serves it: use ``cleavectl pool check``).
    """
    with _open_shared(path, is_copy=is_copy) as descriptor:
        try:
            return check_device(FileReader(descriptor), verify_data, on_progress)
        except PoolRefused as refusal:
            raise PoolRefused(f"{path}: {refusal}") from refusal


@contextmanager
def _open_shared(path: str, *, is_copy: bool) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PoolRefused(
            f"{path}: cannot be opened ({error.strerror}): give the path of a pool file or device"
            " that you may read"
        ) from error
    try:
        if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode) and not stat.S_ISBLK(mode):
            raise PoolRefused(
                f"{path}: is neither a file nor a block device: give the path of a pool"
            )
        _lock_shared(descriptor, path)
        pool_lock = [] if is_copy else lock_pool(path, descriptor, shared=True)
        try:
            yield descriptor
        finally:
            close_all(pool_lock)
    finally:
        os.close(descriptor)


def _lock_shared(descriptor: int, path: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PoolLocked(
            f"{path}: another process has this pool open: ask that daemon instead (cleavectl pool"
            " check)"
        ) from error


async def check_live(
    device: Device,
    superblock: Buffer,
    verify_data: bool = False,
    on_progress: OnProgress | None = None,
) -> CheckReport:
    """Check, on a pool that keeps running, the state that ``superblock`` (one block) names. Each
    slice is far below 5 ms.

    The caller keeps the blocks of that consistency point from being reused until this returns or is
    cancelled.
    """
    parsed = parse_superblock(superblock)
    assert parsed is not None, "the running pool hands over its own superblock"
    check = Check(parsed, verify_data, count_log=False)
    notify = on_progress or _no_progress
    with closing(check.run()) as steps:
        try:
            vbns = next(steps)
            while True:
                check.report.blocks_read += len(vbns)
                notify(check.phase, check.report.blocks_read)
                await asyncio.sleep(0)
                vbns = steps.send(await _read_live(device, vbns))
        except StopIteration as end:
            report: CheckReport = end.value
            return report


async def _read_live(device: Device, vbns: Sequence[int]) -> list[Block]:
    """Blocks by way of the running pool's device: at once where they are at hand, else by its I/O
    threads, all at the same time.
    """
    runs = list(_runs(vbns))
    buffers = [bytearray(count * layout.BLOCK_BYTES) for _, count in runs]
    waiting: list[tuple[int, Awaitable[None]]] = []
    failed: set[int] = set()
    for number, (first, _) in enumerate(runs):
        try:
            if not device.try_readv([buffers[number]], first * layout.BLOCK_BYTES):
                waiting.append(
                    (number, device.readv([buffers[number]], first * layout.BLOCK_BYTES))
                )
        except DeviceFailed:
            failed.add(number)
    for number, pending in waiting:
        try:
            await pending
        except DeviceFailed:
            failed.add(number)
    blocks: list[Block] = []
    for number, (first, count) in enumerate(runs):
        blocks += (
            await _read_singly(device, first, count)
            if number in failed
            else _cut(memoryview(buffers[number]), count)
        )
    return blocks


async def _read_singly(device: Device, first: int, count: int) -> list[Block]:
    blocks: list[Block] = []
    for vbn in range(first, first + count):
        buffer = bytearray(layout.BLOCK_BYTES)
        try:
            await device.readv([buffer], vbn * layout.BLOCK_BYTES)
            blocks.append(memoryview(buffer))
        except DeviceFailed:
            blocks.append(None)
    return blocks
