"""The backdoor message handler ends when it is told to, at whatever moment that is."""

import asyncio

import pytest

from storage.backdoor.handler import BackdoorMessageHandler
from storage.errors import StorageError
from storage.layout import BLOCK_BYTES
from storage.state.pool_state import PoolState
from tests.storage.devices import MemoryDevice

# Turns of the loop after which `stop` must have ended: it has nothing to wait for.
TURNS_MAX = 50


class Slow:
    """A work with a ceiling of one block an hour: after its first message the handler waits for it
    with a timeout.
    """

    rate_min_bytes = 0
    rate_max_bytes = 1

    async def message(self, idle: bool) -> int | None:
        return BLOCK_BYTES

    async def failed(self, error: StorageError) -> None:
        raise AssertionError(error)


@pytest.mark.parametrize("turns", range(5))
async def test_stop_just_after_a_work_was_posted(turns: int) -> None:
    """asyncio.wait_for swallows a cancellation that comes in the turn in which what it waits for is
    done (python/cpython#86296).
    """
    handler = BackdoorMessageHandler(PoolState(MemoryDevice(1 << 20), 0, 1 << 20))
    handler.start()
    first = Slow()
    handler.post(first)
    while first not in handler._not_before or handler._wake.is_set():
        await asyncio.sleep(0)
    for _ in range(3):
        await asyncio.sleep(0)  # until the handler waits, with a timeout
    handler.post(Slow())
    for _ in range(turns):
        await asyncio.sleep(0)
    stopping = asyncio.create_task(handler.stop())
    for _ in range(TURNS_MAX):
        await asyncio.sleep(0)
    ended = stopping.done()
    if not ended:  # for whoever breaks it again: a failure, not a hang
        task = handler._task
        assert task is not None
        task.cancel()
    await stopping
    assert ended, "the cancellation was lost"
