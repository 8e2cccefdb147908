"""What `storage` asks of a device: vectored reads and writes at a byte offset, sync, discard,
reserve, grow.

Two ways lead to the same bytes. ``try_readv`` and ``try_writev`` act at once or not at all, and
cost neither a Future nor a thread (design section 3: a hit in the page cache is one system call).
``readv``, ``writev``, ``sync``, ``discard`` and ``grow`` are asynchronous. A driver with no page
cache and no inline path (a distributed object store) answers False to every ``try_*`` and fits
behind this interface without a change above it; one whose lease was fenced off raises DeviceFailed.

Rules for callers:

- Offsets and lengths are multiples of SECTOR_BYTES and lie within ``size_bytes``.
- Buffers hold single bytes (a memoryview has format ``B``), none is empty, and their number is not
  limited.
- The asynchronous methods submit their job at the call, not at the await, and return an asyncio
  Future of the running loop.
- Jobs in flight have no order among themselves: a caller that needs an order awaits.
- A buffer belongs to the device until its Future is done. *Cancelling the Future does not stop the
  job*, it only makes nobody wait for it: the device still holds the buffer (so its memory stays
  valid), and still reads from it or writes into it. To use the buffer again after a
  cancellation, await ``asyncio.shield(future)`` and then the Future itself.
- Two writes to one range, or a read and a write, at the same time: each sector is entirely one or
  the other, which one is open.

Errors: DeviceFailed (its ``__cause__`` is the operating system's), or DeviceFull where the
device's own backing has no space left. Asynchronous methods give every error through their Future;
``try_*`` raise it.
"""

from asyncio import Future
from collections.abc import Sequence
from typing import Protocol

Buffer = bytes | bytearray | memoryview
WritableBuffer = bytearray | memoryview


class Device(Protocol):
    """One flat space of bytes. Used from one event loop thread; ``close`` is called on that thread
    too.
    """

    @property
    def size_bytes(self) -> int:
        """Size now; only ``grow`` changes it."""

    @property
    def path(self) -> str:
        """Where it is, for messages."""

    def try_readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> bool:
        """Fill the buffers from ``offset_bytes`` on, at once. False: nothing may be assumed of the
        buffers; use ``readv``.
        """

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        """Write the buffers, ``length_bytes`` in all, at once if that does not block for long.

        False: use ``writev`` for the whole range; nothing may be assumed of it until then. True
        says nothing of durability: see ``sync``.
        """

    def readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> Future[None]:
        """Fill the buffers from ``offset_bytes`` on."""

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> Future[None]:
        """Write the buffers from ``offset_bytes`` on. After an error the range holds old and new
        sectors in any mixture.
        """

    def sync(self) -> Future[None]:
        """Make durable every write that was complete before this call. After one failure every
        later sync fails too.
        """

    def discard(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        """Tell the device that the range is unused. What it reads as is open until it is written
        again. May do nothing.
        """

    @property
    def thin(self) -> bool:
        """Whether a write may meet DeviceFull where nothing was written yet, and ``reserve`` sees
        to it that it does not.
        """

    def reserve(self, offset_bytes: int, length_bytes: int) -> Future[None]:
        """Have the host set room aside for the range; what it holds stays. DeviceFull: not for all
        of it. May do nothing.
        """

    def backed(
        self, offset_bytes: int, length_bytes: int, found: list[tuple[int, int]]
    ) -> Future[None]:
        """Add to ``found`` the parts (first byte, end) of the range that have room set aside, in
        their order; some may be missing.
        """

    def host_available_bytes(self) -> int | None:
        """What the host's file system has left; None where there is none, or it does not
        say.
        """

    def grow(self, size_bytes: int) -> Future[None]:
        """Make the device at least ``size_bytes`` large, durably. OutOfRange: smaller than now, or
        the device cannot grow.
        """

    def close(self) -> None:
        """Wait for what is in flight (blocking), then release the device and its lock. Again: no
        effect.
        """
