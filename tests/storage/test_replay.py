"""Replay: what the intent log holds beyond the last consistency point is there again, whatever happened in between."""

import asyncio

from storage.layout import BLOCK_BYTES
from tests.storage.devices import SYNC, DelayDevice
from tests.storage.pools import data, new_pool, opened, within


async def test_a_flush_survives_when_all_earlier_records_belong_to_the_last_consistency_point() -> None:
    """Records of an epoch that is durable are skipped; the log must go on where replay will look for it."""
    holder: list[DelayDevice] = []

    def delayed(memory):
        holder.append(DelayDevice(memory))
        return holder[0]

    async with new_pool(decorate=delayed) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        await running.write("a", 0, data(1))
        device = holder[0]
        device.hold(SYNC)
        point = asyncio.create_task(running.pool.consistency_point())
        await running.until(lambda: device.held(SYNC) == 1)
        flush = running.begin_flush("a")  # logs a change of the frozen epoch, behind the mark of its consistency point
        await running.until(lambda: device.held(SYNC) == 2)
        device.release(SYNC)
        await within(point)
        await within(flush)
        first_crash = running.memory.copy()
    async with opened(first_crash) as running:
        await running.write("a", BLOCK_BYTES, data(2), fua=True)
        second_crash = first_crash.copy()
    async with opened(second_crash) as running:
        assert await running.read("a", 0, 2 * BLOCK_BYTES) == data(1) + data(2)
