"""A device in memory that can lose power: what no sync has made durable is then lost in any subset,
sector by sector.

What it may do is all that a real device may: a sector is one of the contents that it had since it
was last known to be durable, entirely; sectors are independent of each other, whatever order they
were written in; a job in flight may have got anywhere. A sync makes durable what was complete when
it was called, and nothing else.

``fail_after`` lets the power fail in the middle of what somebody does, at an operation counted from
then on. From there on the device is dead: what is asked of it never ends, as for a process that is
gone.
"""

import asyncio
from asyncio import Future
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Any

from storage.device import Buffer
from storage.errors import DeviceFailed
from tests.storage.devices import PAGE_BYTES, SECTOR_BYTES, ZERO_PAGE, MemoryDevice, buffers_length


class Loss(Enum):
    """How much of what is not durable a power loss takes."""

    ALL = "all"
    NOTHING = "nothing"
    SOME_PAGES = "some pages"
    SOME_SECTORS = "some sectors"


@dataclass(frozen=True)
class Fuse:
    """How many operations succeed before the device dies; with ``syncs_only`` only syncs count, so
    that it dies in one of those.
    """

    count: int
    syncs_only: bool


class CrashDevice(MemoryDevice):
    """A MemoryDevice (with its options) that remembers what each page held since it was last
    durable.
    """

    def __init__(self, size_bytes: int, **options: Any) -> None:
        super().__init__(size_bytes, **options)
        self._clock = 0
        # Page -> (time, content) from the durable content on; the last one is what reads return.
        self._versions: dict[int, list[tuple[int, bytes]]] = {}
        self._fuse: Fuse | None = None
        self.dead = False

    def fail_after(self, fuse: Fuse) -> None:
        """Let as much succeed as ``fuse`` says, then die."""
        self._fuse = fuse

    def _spend(self, is_sync: bool = False) -> None:
        fuse = self._fuse
        if fuse is None or (fuse.syncs_only and not is_sync):
            return
        if fuse.count == 0:
            self.dead = True
            raise DeviceFailed(f"{self._path}: the power is gone")
        self._fuse = Fuse(fuse.count - 1, fuse.syncs_only)

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        return asyncio.get_running_loop().create_future() if self.dead else super()._submit(work)

    def _carry_out(self, future: Future[None]) -> None:
        if not self.dead:
            super()._carry_out(future)

    def _misses(self) -> bool:
        return self.dead or super()._misses()

    def _write(self, buffers: Sequence[Buffer], offset_bytes: int) -> None:
        self._spend()
        touched = self._touched(offset_bytes, buffers_length(buffers))
        self._remember_durable(touched)
        super()._write(buffers, offset_bytes)
        self._remember(touched)

    def _discard(self, offset_bytes: int, length_bytes: int) -> None:
        self._spend()
        touched = self._touched(offset_bytes, length_bytes)
        self._remember_durable(touched)
        super()._discard(offset_bytes, length_bytes)
        self._remember(touched)

    @staticmethod
    def _touched(offset_bytes: int, length_bytes: int) -> range:
        return range(offset_bytes // PAGE_BYTES, -(-(offset_bytes + length_bytes) // PAGE_BYTES))

    def _remember_durable(self, pages: range) -> None:
        for index in pages:
            if index not in self._versions:
                self._versions[index] = [(0, bytes(self._pages.get(index, ZERO_PAGE)))]

    def _remember(self, pages: range) -> None:
        self._clock += 1
        for index in pages:
            self._versions[index].append((self._clock, bytes(self._pages.get(index, ZERO_PAGE))))

    def sync(self) -> Future[None]:
        called_at = self._clock
        return self._submit(lambda: self._made_durable(called_at))

    def _made_durable(self, clock: int) -> None:
        self._spend(is_sync=True)
        for index, versions in list(self._versions.items()):
            newer = [version for version in versions if version[0] > clock]
            if newer:
                self._versions[index] = [versions[len(versions) - len(newer) - 1], *newer]
            else:
                del self._versions[index]

    def content(self, offset_bytes: int, length_bytes: int) -> bytes:
        """What reads return, for tests that look at the device from outside."""
        data = bytearray(length_bytes)
        self._read([data], offset_bytes)
        return bytes(data)

    @property
    def pages_at_risk(self) -> int:
        """Pages whose newest content a power loss may take."""
        return len(self._versions)

    def lose_power(self, loss: Loss, random: Random, **options: Any) -> "CrashDevice":
        """The device as it is found afterwards (``options`` as of the constructor). This one fails
        from now on.
        """
        self.dead, self._fuse = False, None
        if loss is not Loss.ALL:
            # What is in flight may be complete on the medium without anybody having been told.
            for future in random.sample(list(self._pending), random.randint(0, len(self._pending))):
                self._carry_out(future)
        found = CrashDevice(self._size_bytes, path=self._path, **options)
        found._pages = {index: bytearray(page) for index, page in self._pages.items()}
        for index, versions in self._versions.items():
            found._pages[index] = bytearray(
                surviving(loss, [content for _, content in versions], random)
            )
        self._pending.clear()
        self._closed = True
        return found


def surviving(loss: Loss, versions: list[bytes], random: Random) -> bytes:
    """What is left of a page that had these contents, the first of them durable."""
    if loss is Loss.ALL:
        return versions[0]
    if loss is Loss.NOTHING:
        return versions[-1]
    if loss is Loss.SOME_PAGES:
        return random.choice(versions)
    starts = range(0, PAGE_BYTES, SECTOR_BYTES)
    return b"".join(random.choice(versions)[start : start + SECTOR_BYTES] for start in starts)
