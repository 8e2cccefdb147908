"""A device in memory that is as unkind as a real one may be: slow, out of order, failing now and
then, full for a while, without power.

Each job takes a time drawn from the seed and has its effect at its end. A sync makes durable what
was complete when it was called. A loss of power leaves of every sector that is not durable one of
the contents that it had since, or that were on their way; a death of the process leaves all that
was complete, and any part of what was on its way.
"""

import asyncio
import errno
import os
from asyncio import Future
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from storage.device import Buffer, WritableBuffer
from storage.device.failures import device_error
from storage.errors import DeviceFailed

PAGE = 4096
SECTOR = 512
ZERO_PAGE = bytes(PAGE)
# What a discarded page reads as: nobody may rely on zeros.
DISCARDED = b"\xdb" * PAGE


@dataclass(frozen=True)
class Manner:
    """How a device behaves. Rates are shares of calls."""

    read_misses: float = 0.0
    write_misses: float = 0.0
    slow_seconds: float = 0.002
    stall_rate: float = 0.0
    stall_seconds: float = 0.05
    at_once: float = 0.2


@dataclass
class Trouble:
    """What fails for a while: the next so many reads or writes; a full host; one sync."""

    reads: int = 0
    writes: int = 0
    full: int = 0
    syncs: int = 0


class FuzzDevice:
    """See the module. ``failures`` counts what it refused, ever."""

    def __init__(
        self,
        size_bytes: int,
        pages: dict[int, bytes],
        seed: int,
        manner: Manner,
        path: str = "fuzz",
    ) -> None:
        self.size_bytes = size_bytes
        self.path = path
        self.pages = pages
        self.manner = manner
        self.trouble = Trouble()
        # Whether blocks for nodes must be set aside first, as in a sparse file.
        self.thin = seed % 2 == 0
        self.failures = 0
        self.dead = self.closed = False
        self._random = Random(seed)
        self._clock = 0
        # Page -> (when, content), from the durable content on; the last one is what is read.
        self._versions: dict[int, list[tuple[int, bytes]]] = {}
        self._pending: dict[
            Future[None], tuple[Callable[[], None], tuple[list[bytes], int] | None]
        ] = {}

    # --- The device -------------------------------------------------------------------------------

    def try_readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> bool:
        if (
            self.dead
            or self.closed
            or (self.manner.read_misses and self._random.random() < self.manner.read_misses)
        ):
            return False
        if self.trouble.reads:
            self._fails("reads", errno.EIO, "read")
        self._read(buffers, offset_bytes)
        return True

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        if (
            self.dead
            or self.closed
            or (self.manner.write_misses and self._random.random() < self.manner.write_misses)
        ):
            return False
        data = pages_of(buffers)
        assert (
            offset_bytes % PAGE == 0
            and len(data) * PAGE == length_bytes
            and offset_bytes + length_bytes <= self.size_bytes
        )
        if self.trouble.full:
            self._fails("full", errno.ENOSPC, "write")
        if self.trouble.writes:
            self._write(self._part(data, offset_bytes), offset_bytes)
            self._fails("writes", errno.EIO, "write")
        self._write(data, offset_bytes)
        return True

    def readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> Future[None]:
        def work() -> None:
            if self.trouble.reads:
                self._fails("reads", errno.EIO, "read")
            self._read(buffers, offset_bytes)

        return self._submit(work, None)

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> Future[None]:
        assert offset_bytes % PAGE == 0

        def work() -> None:
            data = pages_of(buffers)
            if self.trouble.full:
                self._fails("full", errno.ENOSPC, "write")
            if self.trouble.writes:
                self._write(self._part(data, offset_bytes), offset_bytes)
                self._fails("writes", errno.EIO, "write")
            self._write(data, offset_bytes)

        return self._submit(work, (pages_of(buffers), offset_bytes // PAGE))

    def sync(self) -> Future[None]:
        called_at = self._clock

        def work() -> None:
            if self.trouble.syncs:
                self._fails("syncs", errno.EIO, "sync")
            self._durable_up_to(called_at)

        return self._submit(work, None)

    def discard(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        def work() -> None:
            first, last = -(-offset_bytes // PAGE), (offset_bytes + length_bytes) // PAGE
            self._write([DISCARDED] * (last - first), first * PAGE)

        return self._submit(work, None)

    def reserve(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        def work() -> None:
            if self.trouble.full:
                self._fails("full", errno.ENOSPC, "reserve")

        return self._submit(work, None)

    def backed(
        self, offset_bytes: int, length_bytes: int, found: list[tuple[int, int]]
    ) -> Future[None]:
        def work() -> None:
            pages = range(offset_bytes // PAGE, (offset_bytes + length_bytes) // PAGE)
            found.extend((page * PAGE, (page + 1) * PAGE) for page in pages if page in self.pages)

        return self._submit(work, None)

    def host_available_bytes(self) -> int | None:
        return None

    def grow(self, size_bytes: int) -> Future[None]:
        raise AssertionError("pools do not grow")

    def close(self) -> None:
        for future in list(self._pending):
            self._carry_out(future)
        self.closed = True

    # --- When -------------------------------------------------------------------------------------

    def _submit(
        self, work: Callable[[], None], writes: tuple[list[bytes], int] | None
    ) -> Future[None]:
        loop = asyncio.get_running_loop()
        future: Future[None] = loop.create_future()
        if self.closed:
            future.set_exception(
                device_error(self.path, "do anything", OSError(errno.EBADF, "closed"))
            )
        if self.dead or self.closed:
            return future
        self._pending[future] = (work, writes)
        manner, chance = self.manner, self._random.random()
        if chance < manner.at_once:
            loop.call_soon(self._carry_out, future)
        elif chance > 1 - manner.stall_rate:
            loop.call_later(manner.stall_seconds * self._random.random(), self._carry_out, future)
        else:
            loop.call_later(manner.slow_seconds * self._random.random(), self._carry_out, future)
        return future

    def _carry_out(self, future: Future[None]) -> None:
        entry = self._pending.pop(future, None)
        if entry is None or self.dead:
            return
        try:
            entry[0]()
        except DeviceFailed as error:
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(None)

    def _fails(self, kind: str, number: int, action: str) -> None:
        setattr(self.trouble, kind, getattr(self.trouble, kind) - 1)
        self.failures += 1
        raise device_error(self.path, f"{action} (drawn)", OSError(number, os.strerror(number)))

    def _part(self, data: list[bytes], offset_bytes: int) -> list[bytes]:
        """Old and new pages in any mixture, as a write that fails may leave them."""
        first = offset_bytes // PAGE
        return [
            page if self._random.random() < 0.5 else self.pages.get(first + step, ZERO_PAGE)
            for step, page in enumerate(data)
        ]

    # --- What -------------------------------------------------------------------------------------

    def _read(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> None:
        at, pages = offset_bytes // PAGE, self.pages
        for buffer in buffers:
            count = len(buffer) // PAGE
            if count == 1:
                buffer[:] = pages.get(at, ZERO_PAGE)
            else:
                buffer[:] = b"".join([pages.get(page, ZERO_PAGE) for page in range(at, at + count)])
            at += count

    def _write(self, data: list[bytes], offset_bytes: int) -> None:
        self._clock += 1
        at = offset_bytes // PAGE
        for page in data:
            versions = self._versions.get(at)
            if versions is None:
                self._versions[at] = [(0, self.pages.get(at, ZERO_PAGE)), (self._clock, page)]
            else:
                versions.append((self._clock, page))
            self.pages[at] = page
            at += 1

    def _durable_up_to(self, clock: int) -> None:
        left: dict[int, list[tuple[int, bytes]]] = {}
        for page, versions in self._versions.items():
            if versions[-1][0] > clock:
                newer = [version for version in versions if version[0] > clock]
                left[page] = [versions[len(versions) - len(newer) - 1], *newer]
        self._versions = left

    # --- The end ----------------------------------------------------------------------------------

    def after_kill(self, random: Random) -> dict[int, bytes]:
        """What the next process finds; this device is dead from now on."""
        self.dead = True
        for _, writes in self._pending.values():
            if writes is not None:
                kept = random.choice((0, len(writes[0]), random.randint(0, len(writes[0]))))
                self._write(writes[0][:kept], writes[1] * PAGE)
        self._pending.clear()
        return self.pages

    def after_power_loss(self, random: Random) -> dict[int, bytes]:
        """What is found when the power is back; this device is dead from now on."""
        self.dead = True
        for _, writes in self._pending.values():
            if writes is not None and random.random() < 0.7:
                self._write(writes[0], writes[1] * PAGE)
        self._pending.clear()
        kept = random.choice((0.0, 0.5, 0.5, 0.9, 0.98, 1.0))
        torn = random.choice((0.0, 0.0, 0.1, 1.0))
        for page, versions in self._versions.items():
            self.pages[page] = survivor([content for _, content in versions], kept, torn, random)
        return self.pages

    # --- For the check ----------------------------------------------------------------------------

    def read(self, vbns: Sequence[int]) -> list[memoryview]:
        """What the offline check reads through."""
        return [memoryview(self.pages.get(vbn, ZERO_PAGE)) for vbn in vbns]


def pages_of(buffers: Sequence[Buffer]) -> list[bytes]:
    """The buffers' bytes, page by page."""
    if len(buffers) == 1 and len(buffers[0]) == PAGE:
        return [bytes(buffers[0])]
    data = b"".join(buffers)
    return [data[at : at + PAGE] for at in range(0, len(data), PAGE)]


def survivor(contents: list[bytes], kept: float, torn: float, random: Random) -> bytes:
    """What is left of a page that had these contents, the first of them durable."""
    if random.random() < torn:
        return b"".join(random.choice(contents)[at : at + SECTOR] for at in range(0, PAGE, SECTOR))
    return contents[-1] if random.random() < kept else random.choice(contents[:-1])
