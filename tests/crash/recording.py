"""A device in memory that notes every write and sync, and hands over, at the end of each epoch,
what a power loss could leave.

An *epoch* lies between two completed syncs. What is durable at its end is ``base``; ``requests``
are the writes that no completed sync covers, in the order of their submission. A power loss leaves
``base`` plus any part of ``requests``.

Pages are immutable ``bytes``, so that a copy of the device is a copy of a dict.
"""

import asyncio
from asyncio import Future
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from storage.device import Buffer, WritableBuffer
from storage.errors import DeviceFailed

PAGE_BYTES = 4096
ZERO_PAGE = bytes(PAGE_BYTES)
Pages = dict[int, bytes]


class Request(NamedTuple):
    """One write: its first page, and the content of each page."""

    first: int
    pages: tuple[bytes, ...]


AtSync = Callable[[Pages, list[Request]], None]


class PageDevice:
    """Satisfies storage.device.Device over a dict of pages. Every job is carried out at once."""

    def __init__(self, size_bytes: int, pages: Pages | None = None) -> None:
        self.size_bytes = size_bytes
        self.path = "memory"
        self.pages: Pages = {} if pages is None else pages
        self.closed = False

    def try_readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> bool:
        self._raise_when_closed()
        page = offset_bytes // PAGE_BYTES
        assert not offset_bytes % PAGE_BYTES
        pages = self.pages
        for buffer in buffers:
            if len(buffer) == PAGE_BYTES:
                buffer[:] = pages.get(page, ZERO_PAGE)
                page += 1
                continue
            count = len(buffer) // PAGE_BYTES
            assert not len(buffer) % PAGE_BYTES and count
            buffer[:] = b"".join([pages.get(at, ZERO_PAGE) for at in range(page, page + count)])
            page += count
        assert page * PAGE_BYTES <= self.size_bytes
        return True

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        self._raise_when_closed()
        self._write(as_request(buffers, offset_bytes))
        return True

    def readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> Future[None]:
        self.try_readv(buffers, offset_bytes)
        return done()

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> Future[None]:
        self._raise_when_closed()
        self._write(as_request(buffers, offset_bytes))
        return done()

    def sync(self) -> Future[None]:
        self._raise_when_closed()
        return done()

    def discard(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        return done()

    @property
    def thin(self) -> bool:
        return False

    def reserve(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        return done()

    def backed(
        self, offset_bytes: int, length_bytes: int, found: list[tuple[int, int]]
    ) -> Future[None]:
        found.append((offset_bytes, offset_bytes + length_bytes))
        return done()

    def host_available_bytes(self) -> int | None:
        return None

    def grow(self, size_bytes: int) -> Future[None]:
        self.size_bytes = max(self.size_bytes, size_bytes)
        return done()

    def close(self) -> None:
        self.closed = True

    def _write(self, request: Request) -> None:
        assert (
            request.first >= 0
            and (request.first + len(request.pages)) * PAGE_BYTES <= self.size_bytes
        )
        self.pages.update(enumerate(request.pages, request.first))

    def _raise_when_closed(self) -> None:
        if self.closed:
            raise DeviceFailed(f"{self.path}: the device is closed")


class RecordingDevice(PageDevice):
    """Calls ``at_sync`` at the end of each epoch, just before its sync completes. ``pages`` is
    copied: the caller's stay as they are.

    With ``seed`` the asynchronous jobs are carried out some turns of the loop later, in an order
    drawn from it, and some ``try_writev`` answer False, so that writes are in flight when a sync is
    called: those it does not cover.
    """

    def __init__(
        self, size_bytes: int, pages: Pages, at_sync: AtSync, seed: int | None = None
    ) -> None:
        super().__init__(size_bytes, dict(pages))
        self.base: Pages = dict(pages)
        self._at_sync = at_sync
        self._random = Random(seed) if seed is not None else None
        # Not covered by a completed sync; the number says when it was submitted.
        self.at_risk: dict[int, Request] = {}
        self._complete: set[int] = set()
        self._submitted = 0
        self.syncs = 0

    def requests(self) -> list[Request]:
        """What a power loss may take now, in the order of submission."""
        return list(self.at_risk.values())

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        if self._random is not None and self._random.random() < MISS_RATE:
            return False
        return super().try_writev(buffers, offset_bytes, length_bytes)

    def _submit(self, request: Request) -> int:
        self._submitted += 1
        self.at_risk[self._submitted] = request
        return self._submitted

    def _finish(self, number: int, request: Request) -> None:
        self._complete.add(number)
        super()._write(request)

    def _write(self, request: Request) -> None:
        self._finish(self._submit(request), request)

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> Future[None]:
        self._raise_when_closed()
        request = as_request(buffers, offset_bytes)
        number = self._submit(request)
        return self._later(lambda: self._finish(number, request))

    def sync(self) -> Future[None]:
        self._raise_when_closed()
        covered = set(self._complete)
        return self._later(lambda: self._synced(covered))

    def _synced(self, covered: set[int]) -> None:
        self._at_sync(self.base, self.requests())
        self.syncs += 1
        for number in sorted(covered & self.at_risk.keys()):
            request = self.at_risk.pop(number)
            self.base.update(enumerate(request.pages, request.first))
        self._complete -= covered

    def _later(self, work: Callable[[], None]) -> Future[None]:
        loop = asyncio.get_running_loop()
        future: Future[None] = loop.create_future()

        def carry_out(turns: int) -> None:
            if turns:
                loop.call_soon(carry_out, turns - 1)
                return
            if not self.closed:
                work()
            if not future.done():
                future.set_result(None)

        carry_out(self._random.randint(0, TURNS_MAX) if self._random is not None else 0)
        return future


# Of the inline writes of a device with a seed, how many have to take the asynchronous way; and for
# how many turns a job may take.
MISS_RATE = 0.3
TURNS_MAX = 4


def done() -> Future[None]:
    future: Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


def as_request(buffers: Sequence[Buffer], offset_bytes: int) -> Request:
    """A write as a request: the content is copied at submission."""
    assert not offset_bytes % PAGE_BYTES, "the pool writes whole blocks"
    if len(buffers) == 1 and len(buffers[0]) == PAGE_BYTES:
        return Request(offset_bytes // PAGE_BYTES, (bytes(buffers[0]),))
    data = b"".join(buffers)
    assert data and not len(data) % PAGE_BYTES, "the pool writes whole blocks"
    return Request(
        offset_bytes // PAGE_BYTES,
        tuple(data[at : at + PAGE_BYTES] for at in range(0, len(data), PAGE_BYTES)),
    )
