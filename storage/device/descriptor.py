"""What the file and the block device have in common: everything that the kernel does through one
file descriptor.

Invariants:

- ``_written_bytes`` only grows, and only the event loop writes it; ``_synced_bytes`` only grows,
  and only the sync thread writes it. Their difference is what may be dirty in the page cache since
  the last sync: an upper bound in the inline path, and for writes in flight a guess, which is
  enough, for it only chooses between two ways of writing.
- A sync has a ticket, counted at the call. One fdatasync covers every ticket that was issued before
  it began (group commit).
- After one failed fdatasync every later sync fails. The kernel reports a lost page once and then
  calls it clean (fsync(2)), so a later success would prove nothing; and the failure may have shown
  in a sync that nobody waits for (the background one).
"""

import errno
import os
from abc import ABC, abstractmethod
from asyncio import Future
from collections.abc import Sequence

from storage.device.dirty_limit import dirty_inline_bytes_max
from storage.device.failures import device_error
from storage.device.interface import Buffer, WritableBuffer
from storage.device.io_threads import IoThreads
from storage.device.pool_lock import close_all
from storage.device.transfer import IOV_MAX, read_fully, write_fully

# Three reads that miss the page cache at a time: on two cores, more threads only contend for the
# interpreter lock.
DATA_THREADS = 3
# Copying 256 KiB into the page cache takes about 50 us: a hundredth of the longest stall that the
# event loop may have.
INLINE_WRITE_BYTES_MAX = 256 * 1024


class DescriptorDevice(ABC):
    """A device behind a file descriptor that is open and locked. Subclasses know how to discard and
    to grow.
    """

    __slots__ = (
        "_background_sync",
        "_data_threads",
        "_descriptor",
        "_dirty_bytes_max",
        "_dirty_bytes_wanted",
        "_in_memory",
        "_path",
        "_pool_lock",
        "_read_flags",
        "_size_bytes",
        "_sync_failure",
        "_sync_thread",
        "_synced_bytes",
        "_tickets_covered",
        "_tickets_issued",
        "_written_bytes",
    )

    def __init__(
        self, path: str, descriptor: int, size_bytes: int, *, in_memory: bool = False
    ) -> None:
        """Take over ``descriptor``. ``in_memory``: no read from it ever waits for a
        disk (tmpfs).
        """
        self._path = path
        self._descriptor = descriptor
        self._size_bytes = size_bytes
        self._in_memory = in_memory
        self._read_flags = os.RWF_NOWAIT
        self._data_threads = IoThreads(path, DATA_THREADS)
        # A thread of its own, so that a sync never waits behind long reads, nor they behind it.
        self._sync_thread = IoThreads(path, 1)
        self._dirty_bytes_max = dirty_inline_bytes_max()
        self._dirty_bytes_wanted = self._dirty_bytes_max // 2
        self._written_bytes = 0
        self._synced_bytes = 0
        self._tickets_issued = 0
        self._tickets_covered = 0
        self._sync_failure: OSError | None = None
        self._background_sync: Future[None] | None = None
        self._pool_lock: list[int] = []

    def hold(self, pool_lock: list[int]) -> None:
        """Take over the descriptors that lock the pool by its UUID (storage.device.pool_lock),
        until ``close``.
        """
        self._pool_lock = pool_lock

    @property
    def size_bytes(self) -> int:
        """Size now, in bytes."""
        return self._size_bytes

    @property
    def path(self) -> str:
        """The path that it was opened by."""
        return self._path

    # --- Inline ---

    def try_readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> bool:
        """See Device. A hit in the page cache is one system call that does not wait (RWF_NOWAIT,
        preadv2(2)).
        """
        try:
            read_bytes = os.preadv(self._descriptor, buffers, offset_bytes, self._read_flags)
        except BlockingIOError:
            return False
        except OSError as error:
            return self._try_readv_otherwise(buffers, offset_bytes, error)
        # A part of the range in the page cache is a short read.
        if len(buffers) == 1:
            return read_bytes == len(buffers[0])
        return read_bytes == sum(map(len, buffers))

    def _try_readv_otherwise(
        self, buffers: Sequence[WritableBuffer], offset_bytes: int, error: OSError
    ) -> bool:
        if error.errno == errno.EOPNOTSUPP and self._read_flags:
            # The file system does not know RWF_NOWAIT. Where all is in memory, a plain read does
            # not wait either.
            if not self._in_memory:
                return False
            self._read_flags = 0
            return self.try_readv(buffers, offset_bytes)
        if error.errno == errno.EINVAL and len(buffers) > IOV_MAX:
            return False
        raise device_error(self._path, f"read at byte {offset_bytes}", error)

    def try_writev(self, buffers: Sequence[Buffer], offset_bytes: int, length_bytes: int) -> bool:
        """See Device. Inline when it is short and the kernel has no reason to make the
        writer wait.
        """
        if length_bytes > INLINE_WRITE_BYTES_MAX:
            return False
        dirty_bytes = self._written_bytes - self._synced_bytes
        if dirty_bytes > self._dirty_bytes_wanted:
            self._start_background_sync()
            if dirty_bytes > self._dirty_bytes_max:
                return False
        try:
            written_bytes = os.pwritev(self._descriptor, buffers, offset_bytes)
        except OSError as error:
            if error.errno == errno.EINVAL and len(buffers) > IOV_MAX:
                return False
            raise device_error(
                self._path, f"write {length_bytes} bytes at byte {offset_bytes}", error
            ) from error
        self._written_bytes += written_bytes
        return written_bytes == length_bytes

    def _start_background_sync(self) -> None:
        """Let the dirty pages go to disk; begun at half the limit, so that on a disk that keeps up
        the limit is never reached.
        """
        if self._background_sync is None:
            self._background_sync = self.sync()
            self._background_sync.add_done_callback(self._background_sync_ended)

    def _background_sync_ended(self, future: "Future[None]") -> None:
        self._background_sync = None
        if not future.cancelled():
            # Only marks it as seen: a request for durability gets the failure from
            # ``_sync_failure``.
            future.exception()

    # --- By the threads ---

    def readv(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> "Future[None]":
        """See Device."""
        return self._data_threads.submit(self._read, buffers, offset_bytes)

    def writev(self, buffers: Sequence[Buffer], offset_bytes: int) -> "Future[None]":
        """See Device."""
        self._written_bytes += sum(map(len, buffers))
        if self._written_bytes - self._synced_bytes > self._dirty_bytes_wanted:
            self._start_background_sync()
        return self._data_threads.submit(self._write, buffers, offset_bytes)

    def sync(self) -> "Future[None]":
        """See Device. fdatasync, which also writes a changed file size; one serves all
        that wait.
        """
        self._tickets_issued += 1
        return self._sync_thread.submit(self._sync, self._tickets_issued, None)

    def discard(self, offset_bytes: int, length_bytes: int) -> "Future[None]":
        """See Device."""
        return self._data_threads.submit(self._discard, offset_bytes, length_bytes)

    def grow(self, size_bytes: int) -> "Future[None]":
        """See Device. On the one sync thread, so that two of them cannot overtake each other and
        shrink the device.
        """
        return self._sync_thread.submit(self._grow, size_bytes, None)

    @property
    def thin(self) -> bool:
        """See Device."""
        return False

    def reserve(self, offset_bytes: int, length_bytes: int) -> "Future[None]":
        """See Device."""
        return self._data_threads.submit(self._reserve, offset_bytes, length_bytes)

    def backed(
        self, offset_bytes: int, length_bytes: int, found: list[tuple[int, int]]
    ) -> "Future[None]":
        """See Device."""
        return self._data_threads.submit(self._backed, (offset_bytes, length_bytes), found)

    def host_available_bytes(self) -> int | None:
        """See Device."""
        return None

    def close(self) -> None:
        """See Device. Closing the descriptors is what gives up the locks."""
        if self._descriptor < 0:
            return
        self._data_threads.close()
        self._sync_thread.close()
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
        close_all(self._pool_lock)

    # --- On the threads ---

    def _read(self, buffers: Sequence[WritableBuffer], offset_bytes: int) -> None:
        try:
            read_fully(self._descriptor, buffers, offset_bytes)
        except OSError as error:
            raise device_error(self._path, f"read at byte {offset_bytes}", error) from error

    def _write(self, buffers: Sequence[Buffer], offset_bytes: int) -> None:
        try:
            write_fully(self._descriptor, buffers, offset_bytes)
        except OSError as error:
            raise device_error(self._path, f"write at byte {offset_bytes}", error) from error

    def _sync(self, ticket: int, _: None) -> None:
        if self._sync_failure is None and ticket > self._tickets_covered:
            covered, written_bytes = self._tickets_issued, self._written_bytes
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self._sync_failure = error
            else:
                self._tickets_covered = covered
                self._synced_bytes = written_bytes
        if self._sync_failure is not None and ticket > self._tickets_covered:
            raise device_error(
                self._path, "make writes durable", self._sync_failure
            ) from self._sync_failure

    @abstractmethod
    def _discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Give the range back, or do nothing where that is not supported. Raises DeviceFailed."""

    @abstractmethod
    def _reserve(self, offset_bytes: int, length_bytes: int) -> None:
        """Have the host allocate the range, or do nothing where it cannot be asked to. Raises
        DeviceFull, DeviceFailed.
        """

    @abstractmethod
    def _backed(self, span: tuple[int, int], found: list[tuple[int, int]]) -> None:
        """Add the parts of ``span`` (first byte, length) that need no more of the host. Raises
        DeviceFailed.
        """

    @abstractmethod
    def _grow(self, size_bytes: int, _: None) -> None:
        """Become at least ``size_bytes`` large, durably. Raises OutOfRange, DeviceFailed."""
