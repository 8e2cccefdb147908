"""Whether the host has room for the pool: a full host is a state that ends, never a failure of the
pool.

The state begins with the first write that meets DeviceFull (``met``), and ends by itself when the
host has room again, which is tried every RETRY_SECONDS. Meanwhile:

- client writes that need room are refused at once, those that need none go on, and everything can
  be read;
- what must not be lost (nodes and maps of a consistency point, superblocks, records of the log) is
  written by ``put``: the same bytes to the same place, again until it passes. The consistency point
  goes on only then, so its order is what it always is;
- blocks for nodes that the host has allocated beforehand (storage.allocation.node_stock) let
  consistency points and deletes go on.

Only a pool that is closing gives up (``close_within``). It then is as after a crash: the last
durable consistency point, and the log.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from storage.device import Buffer
from storage.errors import DeviceFull, HostStaysFull
from storage.state.pool_state import PoolState
from storage.state.signal import Signal

# How often it is tried whether the host has room.
RETRY_SECONDS = 0.25
# Where room cannot be asked for (a thin block device), it is taken to be there when nothing was
# refused for so long.
QUIET_SECONDS = 5.0


class HostRoom:
    """``full_since_ns`` is None while the host has room, as far as is known. ``filled`` is sent
    when that ends; storage.allocation.host_probe then tries whether there is room again.
    """

    __slots__ = (
        "_changed",
        "_give_up_at",
        "_met_at",
        "_state",
        "_waiting",
        "filled",
        "full_since_ns",
    )

    def __init__(self, state: PoolState) -> None:
        self._state = state
        self._changed = asyncio.Event()
        self._give_up_at: float | None = None
        self._met_at = 0.0
        self._waiting = 0
        self.filled = Signal()
        self.full_since_ns: int | None = None

    @property
    def full(self) -> bool:
        """Whether the host refused room last."""
        return self.full_since_ns is not None

    @property
    def awaited(self) -> bool:
        """Whether writes wait for room."""
        return self._waiting > 0

    @property
    def is_quiet(self) -> bool:
        """Whether nothing was refused for QUIET_SECONDS."""
        return asyncio.get_running_loop().time() - self._met_at >= QUIET_SECONDS

    def met(self, error: DeviceFull) -> None:
        """A write, or what was to be set aside for one, found no room."""
        self._met_at = asyncio.get_running_loop().time()
        if self.full_since_ns is None:
            self.full_since_ns = time.time_ns()
            self._state.on_event(
                "pool.host_full",
                error=str(error),
                host_available_bytes=self._state.device.host_available_bytes(),
            )
            self.filled.send()

    def found(self) -> None:
        """The host has room again."""
        since, self.full_since_ns = self.full_since_ns, None
        assert since is not None
        self._state.on_event("pool.host_room", seconds=round((time.time_ns() - since) / 1e9, 3))

    def wake(self) -> None:
        """Space was given back to the host, or the pool is closing: what waits is tried again at
        once.
        """
        self._changed.set()
        self._changed = asyncio.Event()

    async def put(self, buffers: Sequence[Buffer], offset_bytes: int) -> None:
        """Write, again and again while the host has no room for it. Raises DeviceFailed,
        PoolReadOnly, HostStaysFull.
        """
        device = self._state.device
        length_bytes = sum(map(len, buffers))
        while True:
            try:
                if not device.try_writev(buffers, offset_bytes, length_bytes):
                    await device.writev(buffers, offset_bytes)
            except DeviceFull as error:
                await self.until_next_try(error)
            else:
                return

    async def until_next_try(self, error: DeviceFull) -> None:
        """Wait until what met ``error`` is worth another try. Raises PoolReadOnly,
        HostStaysFull.
        """
        self.met(error)
        self._state.check_writable()
        if self._give_up_at is not None and asyncio.get_running_loop().time() >= self._give_up_at:
            raise HostStaysFull(
                "the pool is closing, and the host's file system is full: this was not made. What"
                " was acknowledged is in the log; free space where the pool lies, then start again"
            ) from error
        self._waiting += 1
        try:
            await self.pause()
        finally:
            self._waiting -= 1

    def close_within(self, seconds: float) -> None:
        """The pool is closing: who still finds no room after so long gives up."""
        if self._give_up_at is None:
            self._give_up_at = asyncio.get_running_loop().time() + seconds
            self.wake()

    def shown(self, pool_available_bytes: int) -> dict[str, Any]:
        """The rows of ``pool show``: what can still be written is the smaller of what the pool and
        what the host has.
        """
        host = self._state.device.host_available_bytes()
        by_host = host is not None and host < pool_available_bytes
        return {
            "available_bytes": self.available_bytes(pool_available_bytes),
            "available_limited_by": "host" if by_host else "pool",
            "host_available_bytes": host,
            "host_full": self.full,
            "host_full_since_ns": self.full_since_ns,
        }

    def available_bytes(self, pool_available_bytes: int) -> int:
        """The smaller of what the pool has for data and what the host has."""
        host = self._state.device.host_available_bytes()
        return pool_available_bytes if host is None else min(host, pool_available_bytes)

    async def pause(self) -> None:
        """Wait until it is worth another try."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), RETRY_SECONDS)
