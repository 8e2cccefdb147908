"""The decorators do what they say: a fault that never came would make every test that uses one
pass.
"""

import asyncio
import errno

import pytest

from storage.errors import DeviceFailed, DeviceFull
from tests.storage.devices import READ, SYNC, WRITE, DelayDevice, Fault, FaultyDevice, MemoryDevice

BLOCK = 4096
SIZE_BYTES = 64 * BLOCK


def data(value: int) -> bytes:
    return bytes([value]) * BLOCK


async def content(device: MemoryDevice) -> bytes:
    buffer = bytearray(BLOCK)
    await device.readv([buffer], 0)
    return bytes(buffer)


async def test_the_nth_call_fails_once() -> None:
    device = FaultyDevice(MemoryDevice(SIZE_BYTES), Fault(WRITE, nth=2))
    await device.writev([data(1)], 0)
    with pytest.raises(DeviceFailed) as caught:
        await device.writev([data(2)], 0)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO
    await device.writev([data(3)], 0)
    assert device.calls[WRITE] == 3


async def test_inline_and_threaded_calls_count_together() -> None:
    device = FaultyDevice(MemoryDevice(SIZE_BYTES), Fault(READ, nth=3, forever=True))
    assert device.try_readv([bytearray(BLOCK)], 0)
    await device.readv([bytearray(BLOCK)], 0)
    for _ in range(2):
        with pytest.raises(DeviceFailed):
            device.try_readv([bytearray(BLOCK)], 0)
    with pytest.raises(DeviceFailed):
        await device.readv([bytearray(BLOCK)], 0)


async def test_a_missed_attempt_does_not_count() -> None:
    device = FaultyDevice(MemoryDevice(SIZE_BYTES, miss_rate=1.0))
    assert not device.try_readv([bytearray(BLOCK)], 0)
    assert not device.try_writev([data(1)], 0, BLOCK)
    assert device.calls.total() == 0


@pytest.mark.parametrize("inline", [True, False])
async def test_a_short_write_leaves_a_part(inline: bool) -> None:
    inner = MemoryDevice(SIZE_BYTES)
    device = FaultyDevice(inner, Fault(WRITE, errno=errno.ENOSPC, partial_bytes=512))
    buffers = [data(1)[:1024], data(1)[1024:]]

    async def write() -> None:
        if not inline or not device.try_writev(buffers, 0, BLOCK):
            await device.writev(buffers, 0)

    with pytest.raises(DeviceFull):
        await write()
    assert await content(inner) == data(1)[:512] + bytes(BLOCK - 512)


async def test_a_failed_sync() -> None:
    device = FaultyDevice(MemoryDevice(SIZE_BYTES), Fault(SYNC, forever=True))
    for _ in range(2):
        with pytest.raises(DeviceFailed):
            await device.sync()


async def test_what_is_held_happens_at_its_release_and_in_order() -> None:
    inner = MemoryDevice(SIZE_BYTES)
    device = DelayDevice(inner)
    device.hold(WRITE)
    assert not device.try_writev([data(1)], 0, BLOCK)
    writes = [device.writev([data(value)], 0) for value in (1, 2)]
    await device.sync()
    assert device.held(WRITE) == 2
    assert await content(inner) == bytes(BLOCK)
    device.release(WRITE)
    await asyncio.gather(*writes)
    assert await content(inner) == data(2)
    assert device.try_writev([data(3)], 0, BLOCK)


async def test_what_fails_while_it_is_held_fails_at_its_release() -> None:
    device = DelayDevice(FaultyDevice(MemoryDevice(SIZE_BYTES), Fault(SYNC)))
    device.hold(SYNC)
    sync = device.sync()
    device.release(SYNC)
    with pytest.raises(DeviceFailed):
        await sync


async def test_deferred_jobs_overtake_each_other_reproducibly() -> None:
    async def order(seed: int) -> list[int]:
        device = MemoryDevice(SIZE_BYTES, deferred=True, seed=seed)
        ended: list[int] = []
        futures = [device.writev([data(1)], index * BLOCK) for index in range(20)]
        for index, future in enumerate(futures):
            future.add_done_callback(lambda _, index=index: ended.append(index))  # type: ignore[misc]
        assert not any(future.done() for future in futures)
        await asyncio.gather(*futures)
        return ended

    first = await order(1)
    assert first == await order(1)
    assert first != sorted(first)


async def test_a_copy_is_apart() -> None:
    device = MemoryDevice(SIZE_BYTES)
    await device.writev([data(1)], 0)
    twin = device.copy()
    await device.writev([data(2)], 0)
    assert (await content(twin), await content(device)) == (data(1), data(2))


def test_the_rules_for_callers_are_held() -> None:
    device = MemoryDevice(SIZE_BYTES)
    with pytest.raises(AssertionError):
        device.try_readv([bytearray(BLOCK)], 1)
    with pytest.raises(AssertionError):
        device.try_readv([bytearray(BLOCK)], SIZE_BYTES)
    with pytest.raises(AssertionError):
        device.try_writev([bytes(BLOCK)], 0, 2 * BLOCK)
    with pytest.raises(AssertionError, match="single bytes"):
        device.try_readv([memoryview(bytearray(BLOCK)).cast("Q")], 0)
