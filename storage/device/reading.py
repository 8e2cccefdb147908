"""Reading several parts of a device for one purpose: at once what the page cache has, the rest by
the threads, all of it together.
"""

import asyncio
from collections.abc import Iterable

from storage.device.interface import Device, WritableBuffer
from storage.errors import StorageError


async def read_all(device: Device, parts: Iterable[tuple[WritableBuffer, int]]) -> None:
    """Fill each buffer from its byte offset on. Ends when no job is left, also after one has
    failed, and then raises the first failure: so none goes unseen, and no buffer is written to any
    more. Raises DeviceFailed.
    """
    jobs: list[asyncio.Future[None]] = []
    failure: BaseException | None = None
    for buffer, offset in parts:
        try:
            if not device.try_readv((buffer,), offset):
                jobs.append(device.readv((buffer,), offset))
        except StorageError as error:
            failure = error
            break
    if len(jobs) == 1 and failure is None:
        await jobs[0]
    elif jobs:
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        failure = failure or next((outcome for outcome in outcomes if outcome is not None), None)
    if failure is not None:
        raise failure
