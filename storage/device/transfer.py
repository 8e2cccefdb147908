"""Whole vectored transfers: what the kernel cuts short is continued, and more buffers than one call
takes are split.

These block, so they run on the I/O threads. One call moves at most IOV_MAX buffers and 0x7ffff000
bytes (readv(2), read(2)).
"""

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

from storage.device.interface import Buffer, WritableBuffer

IOV_MAX = os.sysconf("SC_IOV_MAX")  # 1024 on Linux; a longer vector is EINVAL


def read_fully(descriptor: int, buffers: Sequence[WritableBuffer], offset_bytes: int) -> None:
    """Fill all buffers. Raises OSError; no progress (the range reaches past the end) is EIO."""
    for start in range(0, len(buffers), IOV_MAX):
        offset_bytes = _transfer(
            os.preadv, descriptor, buffers[start : start + IOV_MAX], offset_bytes
        )


def write_fully(descriptor: int, buffers: Sequence[Buffer], offset_bytes: int) -> None:
    """Write all buffers. Raises OSError; no progress is EIO."""
    for start in range(0, len(buffers), IOV_MAX):
        offset_bytes = _transfer(
            os.pwritev, descriptor, buffers[start : start + IOV_MAX], offset_bytes
        )


def _transfer(
    call: Callable[[int, Any, int], int],
    descriptor: int,
    buffers: Sequence[Buffer],
    offset_bytes: int,
) -> int:
    """Move at most IOV_MAX buffers whole; returns the offset behind them."""
    end_bytes = offset_bytes + sum(map(len, buffers))
    while True:
        moved_bytes = call(descriptor, buffers, offset_bytes)
        offset_bytes += moved_bytes
        if offset_bytes == end_bytes:
            return end_bytes
        if moved_bytes == 0:
            raise OSError(errno.EIO, f"the transfer stopped {end_bytes - offset_bytes} bytes short")
        buffers = _behind(buffers, moved_bytes)


def _behind(buffers: Sequence[Buffer], moved_bytes: int) -> list[Buffer]:
    """The buffers without their first ``moved_bytes`` bytes."""
    index = 0
    while moved_bytes >= len(buffers[index]):
        moved_bytes -= len(buffers[index])
        index += 1
    return [memoryview(buffers[index])[moved_bytes:], *buffers[index + 1 :]]
