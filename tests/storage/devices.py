"""Devices for tests: one in memory, and decorators that make any device fail or wait.

All satisfy ``storage.device.Device``, and run through its conformance suite (test_device.py).
MemoryDevice is the strict one: it asserts the rules for callers that a real device cannot afford to
look at.
"""

import asyncio
import errno
import os
from asyncio import Future
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from storage.device import Buffer, Device, WritableBuffer
from storage.device.failures import device_error
from storage.errors import DeviceFailed, OutOfRange

PAGE_BYTES = 4096
SECTOR_BYTES = 512
ZERO_PAGE = bytes(PAGE_BYTES)

# The kinds of operation that decorators tell apart; a try_readv that succeeds is a read like any
# other.
READ = "read"
WRITE = "write"
SYNC = "sync"
DISCARD = "discard"
GROW = "grow"
# Setting room aside on the host, and asking where there is some.
RESERVE = "reserve"
OPERATIONS = (READ, WRITE, SYNC, DISCARD, GROW, RESERVE)

Start = Callable[[], Future[None]]


def buffers_length(buffers: Sequence[Buffer]) -> int:
    return sum(map(len, buffers))


class MemoryDevice:
    """Sparse, deterministic, in memory.

    At once by default: ``try_*`` succeed, and what the asynchronous methods return is done already.
    With ``deferred`` each asynchronous job is carried out 1 to ``turns_max`` turns of the loop
    later, drawn from ``seed``: jobs overtake each other, as on threads, and reproducibly.
    ``miss_rate`` is the share of ``try_*`` calls that answer False.
    """

    def __init__(
        self,
        size_bytes: int,
        *,
        path: str = "memory",
        deferred: bool = False,
        turns_max: int = 3,
        miss_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        assert size_bytes % SECTOR_BYTES == 0
        self._size_bytes = size_bytes
        self._path = path
        self._deferred = deferred
        self._turns_max = turns_max
        self._miss_rate = miss_rate
        self._random = Random(seed)
        self._pages: dict[int, bytearray] = {}
        self._closed = False
        self._pending: dict[Future[None], Callable[[], None]] = {}

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def path(self) -> str:
        return self._path

    @property
    def allocated_bytes(self) -> int:
        return len(self._pages) * PAGE_BYTES

    def copy(self, **options: Any) -> "MemoryDevice":
        """Another device with the same content now; ``options`` as of the constructor."""
        twin = MemoryDevice(self._size_bytes, path=self._path, **options)
        twin._pages = {index: bytearray(page) for index, page in self._pages.items()}
        return twin

    # --- The device ---

    def try_readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> bool:
        self._check(offset_bytes, self._check_buffers(buffers))
        self._raise_when_closed()
        if self._misses():
            scribble(buffers)
            return False
        self._read(buffers, offset_bytes)
        return True

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        self._check(offset_bytes, self._check_buffers(buffers))
        assert length_bytes == buffers_length(buffers)
        self._raise_when_closed()
        if self._misses():
            return False
        self._write(buffers, offset_bytes)
        return True

    def readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> Future[None]:
        self._check(offset_bytes, self._check_buffers(buffers))
        return self._submit(lambda: self._read(buffers, offset_bytes))

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> Future[None]:
        self._check(offset_bytes, self._check_buffers(buffers))
        return self._submit(lambda: self._write(buffers, offset_bytes))

    def sync(self) -> Future[None]:
        return self._submit(lambda: None)

    def discard(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        self._check(offset_bytes, length_bytes)
        return self._submit(lambda: self._discard(offset_bytes, length_bytes))

    @property
    def thin(self) -> bool:
        return False

    def reserve(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        self._check(offset_bytes, length_bytes)
        return self._submit(lambda: None)

    def backed(
        self, offset_bytes: int, length_bytes: int, found: list[tuple[int, int]]
    ) -> Future[None]:
        self._check(offset_bytes, length_bytes)
        return self._submit(lambda: found.append((offset_bytes, offset_bytes + length_bytes)))

    def host_available_bytes(self) -> int | None:
        return None

    def grow(self, size_bytes: int) -> Future[None]:
        assert size_bytes % SECTOR_BYTES == 0
        return self._submit(lambda: self._grow(size_bytes))

    def close(self) -> None:
        for future in list(self._pending):
            self._carry_out(future)
        self._closed = True

    # --- When ---

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        loop = asyncio.get_running_loop()
        future: Future[None] = loop.create_future()
        self._pending[future] = work
        if self._deferred and not self._closed:
            loop.call_soon(self._turn, future, self._random.randint(1, self._turns_max))
        else:
            self._carry_out(future)
        return future

    def _turn(self, future: Future[None], turns_left: int) -> None:
        if turns_left > 1:
            asyncio.get_running_loop().call_soon(self._turn, future, turns_left - 1)
        else:
            self._carry_out(future)

    def _carry_out(self, future: Future[None]) -> None:
        work = self._pending.pop(future, None)
        if work is None:
            return
        try:
            self._raise_when_closed()
            work()
        except (DeviceFailed, OutOfRange) as error:
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(None)

    def _misses(self) -> bool:
        return self._miss_rate > 0 and self._random.random() < self._miss_rate

    # --- What ---

    def _read(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> None:
        for buffer in buffers:
            for index, start, part in self._pieces(memoryview(buffer), offset_bytes):
                part[:] = memoryview(self._pages.get(index, ZERO_PAGE))[start : start + len(part)]
            offset_bytes += len(buffer)

    def _write(self, buffers: Sequence[Buffer], offset_bytes: int) -> None:
        for buffer in buffers:
            for index, start, part in self._pieces(memoryview(buffer), offset_bytes):
                self._pages.setdefault(index, bytearray(PAGE_BYTES))[start : start + len(part)] = (
                    part
                )
            offset_bytes += len(buffer)

    @staticmethod
    def _pieces(view: memoryview, offset_bytes: int) -> Iterator[tuple[int, int, memoryview]]:
        """The view cut at pages: page, first byte within it, the part of the view."""
        position = 0
        while position < len(view):
            index, start = divmod(offset_bytes + position, PAGE_BYTES)
            length = min(PAGE_BYTES - start, len(view) - position)
            yield index, start, view[position : position + length]
            position += length

    def _discard(self, offset_bytes: int, length_bytes: int) -> None:
        first, last = -(-offset_bytes // PAGE_BYTES), (offset_bytes + length_bytes) // PAGE_BYTES
        for index in range(first, last):
            self._pages.pop(index, None)

    def _grow(self, size_bytes: int) -> None:
        if size_bytes < self._size_bytes:
            raise OutOfRange(f"{self._path}: a device cannot shrink to {size_bytes}")
        self._size_bytes = size_bytes

    # --- The rules for callers ---

    def _check(self, offset_bytes: int, length_bytes: int) -> None:
        assert offset_bytes % SECTOR_BYTES == 0, offset_bytes
        assert length_bytes % SECTOR_BYTES == 0, length_bytes
        assert 0 <= offset_bytes <= offset_bytes + length_bytes <= self._size_bytes, (
            offset_bytes,
            length_bytes,
        )

    @staticmethod
    def _check_buffers(buffers: Sequence[Buffer]) -> int:
        assert buffers
        for buffer in buffers:
            view = memoryview(buffer)
            assert view.itemsize == 1, "a buffer of single bytes is asked for"
            assert view.nbytes > 0, "an empty buffer"
        return buffers_length(buffers)

    def _raise_when_closed(self) -> None:
        if self._closed:
            raise DeviceFailed(f"{self._path}: the device is closed")


def scribble(buffers: Sequence[WritableBuffer]) -> None:
    """Fill with garbage what the caller may assume nothing of, so that a test finds one
    who does.
    """
    for buffer in buffers:
        buffer[:] = b"\xa5" * len(buffer)


class WrappedDevice:
    """Passes everything on: what decorators are made from. A subclass may override ``_now`` and
    ``_later`` alone.
    """

    def __init__(self, inner: Device) -> None:
        self.inner = inner

    @property
    def size_bytes(self) -> int:
        return self.inner.size_bytes

    @property
    def path(self) -> str:
        return self.inner.path

    def try_readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> bool:
        return self._now(READ, lambda: self.inner.try_readv(buffers, offset_bytes))

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        return self._now(WRITE, lambda: self.inner.try_writev(buffers, offset_bytes, length_bytes))

    def readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> Future[None]:
        return self._later(READ, lambda: self.inner.readv(buffers, offset_bytes))

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> Future[None]:
        return self._later(WRITE, lambda: self.inner.writev(buffers, offset_bytes))

    def sync(self) -> Future[None]:
        return self._later(SYNC, self.inner.sync)

    def discard(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        return self._later(DISCARD, lambda: self.inner.discard(offset_bytes, length_bytes))

    @property
    def thin(self) -> bool:
        return self.inner.thin

    def reserve(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        return self._later(RESERVE, lambda: self.inner.reserve(offset_bytes, length_bytes))

    def backed(
        self, offset_bytes: int, length_bytes: int, found: list[tuple[int, int]]
    ) -> Future[None]:
        return self._later(RESERVE, lambda: self.inner.backed(offset_bytes, length_bytes, found))

    def host_available_bytes(self) -> int | None:
        return self.inner.host_available_bytes()

    def grow(self, size_bytes: int) -> Future[None]:
        return self._later(GROW, lambda: self.inner.grow(size_bytes))

    def close(self) -> None:
        self.inner.close()

    def _now(self, operation: str, attempt: Callable[[], bool]) -> bool:
        """An inline read or write."""
        return attempt()

    def _later(self, operation: str, start: Start) -> Future[None]:
        """An asynchronous operation; ``start`` hands it to the inner device."""
        return start()


@dataclass(frozen=True)
class Fault:
    """The ``nth`` call (from 1) of ``operation`` fails, and with ``forever`` every later one, as
    the operating system's ``errno``.

    ``partial_bytes``: of a write, that many bytes get to the device before it fails.
    """

    operation: str
    nth: int = 1
    errno: int = errno.EIO
    forever: bool = False
    partial_bytes: int = 0

    def __post_init__(self) -> None:
        assert self.operation in OPERATIONS
        assert not self.partial_bytes or self.operation == WRITE

    def hits(self, call: int) -> bool:
        return call == self.nth or (self.forever and call > self.nth)


class FaultyDevice(WrappedDevice):
    """Fails as its faults say. ``calls`` counts what was asked for, per operation; a ``try_*`` that
    answers False does not count.
    """

    def __init__(self, inner: Device, *faults: Fault) -> None:
        super().__init__(inner)
        self.faults = list(faults)
        self.calls: Counter[str] = Counter()

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        fault = self._fault(WRITE)
        if fault is None:
            return self._counted(
                WRITE, lambda: self.inner.try_writev(buffers, offset_bytes, length_bytes)
            )
        head = first_bytes(buffers, fault.partial_bytes)
        if head and not self.inner.try_writev(head, offset_bytes, fault.partial_bytes):
            return False
        self.calls[WRITE] += 1
        raise self._error(fault)

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> Future[None]:
        fault = self._fault(WRITE)
        if fault is None or not fault.partial_bytes:
            return super().writev(buffers, offset_bytes)
        self.calls[WRITE] += 1
        error = self._error(fault)
        return chained(
            self.inner.writev(first_bytes(buffers, fault.partial_bytes), offset_bytes),
            lambda outer: outer.set_exception(error),
        )

    def _now(self, operation: str, attempt: Callable[[], bool]) -> bool:
        fault = self._fault(operation)
        if fault is None:
            return self._counted(operation, attempt)
        self.calls[operation] += 1
        raise self._error(fault)

    def _later(self, operation: str, start: Start) -> Future[None]:
        fault = self._fault(operation)
        self.calls[operation] += 1
        if fault is None:
            return start()
        future: Future[None] = asyncio.get_running_loop().create_future()
        future.set_exception(self._error(fault))
        return future

    def _counted(self, operation: str, attempt: Callable[[], bool]) -> bool:
        done = attempt()
        self.calls[operation] += done
        return done

    def _fault(self, operation: str) -> Fault | None:
        """What the next call of this operation meets."""
        call = self.calls[operation] + 1
        return next(
            (fault for fault in self.faults if fault.operation == operation and fault.hits(call)),
            None,
        )

    def _error(self, fault: Fault) -> DeviceFailed:
        return device_error(
            self.path,
            f"{fault.operation} (planted fault)",
            OSError(fault.errno, os.strerror(fault.errno)),
        )


class DelayDevice(WrappedDevice):
    """Makes operations wait, either ``seconds[operation]`` by the loop's clock, or from
    ``hold(operation)`` to ``release(operation)``.

    A held operation reaches the inner device at its release, in the order of the calls; a delayed
    one ends later. What is held or delayed always goes the asynchronous way: ``try_*`` answer
    False.
    """

    def __init__(self, inner: Device, seconds: Mapping[str, float] | None = None) -> None:
        super().__init__(inner)
        self._seconds = dict(seconds or {})
        self._held_operations: set[str] = set()
        self._held: defaultdict[str, list[tuple[Future[None], Start]]] = defaultdict(list)

    def hold(self, operation: str) -> None:
        """Hold every operation of this kind from now on."""
        assert operation in OPERATIONS
        self._held_operations.add(operation)

    def held(self, operation: str) -> int:
        """How many operations of this kind wait."""
        return len(self._held[operation])

    def release(self, operation: str) -> None:
        """Let go of what is held, and hold no more."""
        self._held_operations.discard(operation)
        for outer, start in self._held.pop(operation, []):
            pass_on(start(), outer)

    def close(self) -> None:
        for operation in OPERATIONS:
            self.release(operation)
        super().close()

    def _now(self, operation: str, attempt: Callable[[], bool]) -> bool:
        if operation in self._held_operations or self._seconds.get(operation):
            return False
        return attempt()

    def _later(self, operation: str, start: Start) -> Future[None]:
        loop = asyncio.get_running_loop()
        if operation in self._held_operations:
            outer: Future[None] = loop.create_future()
            self._held[operation].append((outer, start))
            return outer
        seconds = self._seconds.get(operation, 0.0)
        if not seconds:
            return start()
        return chained(start(), lambda waiting: loop.call_later(seconds, finish, waiting))


class FullHostDevice(WrappedDevice):
    """A sparse file: what was never written, nor reserved, needs a page of the host, and there is
    none while ``full``.

    ``allocated`` holds the pages that need no more, ``reserved`` those that were asked for by
    ``reserve``. ``full_from`` makes it full at that call of a write or reserve that needs room
    (from 1), and ``calls`` counts those.
    """

    def __init__(
        self, inner: Device, allocated: Iterable[int] = (), full_from: int | None = None
    ) -> None:
        super().__init__(inner)
        self.allocated = set(allocated)
        self.reserved: set[int] = set()
        self.full = False
        self.full_from = full_from
        self.calls = 0

    @property
    def thin(self) -> bool:
        return True

    def host_available_bytes(self) -> int | None:
        return 0 if self.full else 1 << 40

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        self._allocate(offset_bytes, length_bytes)
        return self.inner.try_writev(buffers, offset_bytes, length_bytes)

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> Future[None]:
        return self._with_room(
            offset_bytes, buffers_length(buffers), lambda: self.inner.writev(buffers, offset_bytes)
        )

    def reserve(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        future = self._with_room(
            offset_bytes, length_bytes, lambda: self.inner.reserve(offset_bytes, length_bytes)
        )
        self.reserved.update(
            page for page in self._pages(offset_bytes, length_bytes) if page in self.allocated
        )
        return future

    def discard(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        pages = range(-(-offset_bytes // PAGE_BYTES), (offset_bytes + length_bytes) // PAGE_BYTES)
        self.allocated.difference_update(pages)
        return self.inner.discard(offset_bytes, length_bytes)

    def backed(
        self, offset_bytes: int, length_bytes: int, found: list[tuple[int, int]]
    ) -> Future[None]:
        pages = self._pages(offset_bytes, length_bytes)
        found.extend(
            (page * PAGE_BYTES, (page + 1) * PAGE_BYTES) for page in pages if page in self.allocated
        )
        return self.inner.backed(offset_bytes, length_bytes, [])

    def _with_room(self, offset_bytes: int, length_bytes: int, start: Start) -> Future[None]:
        try:
            self._allocate(offset_bytes, length_bytes)
        except DeviceFailed as error:
            future: Future[None] = asyncio.get_running_loop().create_future()
            future.set_exception(error)
            return future
        return start()

    def _allocate(self, offset_bytes: int, length_bytes: int) -> None:
        needed = [
            page for page in self._pages(offset_bytes, length_bytes) if page not in self.allocated
        ]
        if not needed:
            return
        self.calls += 1
        if self.calls == self.full_from:
            self.full = True
        if self.full:
            raise device_error(
                self.path,
                f"write at byte {offset_bytes}",
                OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            )
        self.allocated.update(needed)

    @staticmethod
    def _pages(offset_bytes: int, length_bytes: int) -> range:
        return range(
            offset_bytes // PAGE_BYTES, (offset_bytes + length_bytes + PAGE_BYTES - 1) // PAGE_BYTES
        )


def first_bytes(buffers: Sequence[Buffer], length_bytes: int) -> list[memoryview]:
    """The buffers cut off after ``length_bytes`` bytes."""
    head: list[memoryview] = []
    for buffer in buffers:
        if not length_bytes:
            break
        head.append(memoryview(buffer)[:length_bytes])
        length_bytes -= len(head[-1])
    return head


def finish(future: Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def chained(inner: Future[None], then: Callable[[Future[None]], object]) -> Future[None]:
    """A Future that fails as ``inner`` does, and that ``then`` completes once ``inner`` has
    succeeded.
    """
    outer: Future[None] = asyncio.get_running_loop().create_future()
    pass_on(inner, outer, then)
    return outer


def pass_on(
    inner: Future[None], outer: Future[None], then: Callable[[Future[None]], object] = finish
) -> None:
    """Complete ``outer`` when ``inner`` is done: as it, or by ``then`` where it succeeded."""

    def ended(_: Future[None]) -> None:
        error = inner.exception()
        if outer.done():
            return
        if error is None:
            then(outer)
        else:
            outer.set_exception(error)

    inner.add_done_callback(ended)
