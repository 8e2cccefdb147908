"""A running pool for asynchronous unit tests, on a device in memory, with a volume's commands as
coroutines.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from storage.check import CheckReport, check_device
from storage.check.steps import Block
from storage.data.backing import next_index
from storage.device import Device
from storage.images.image import Image
from storage.layout import BLOCK_BYTES
from storage.pool import Pool
from storage.split.loading import holes_at
from storage.vdisks.volume import Volume
from tests.storage.devices import DelayDevice, MemoryDevice

POOL_BYTES = 32 << 20
SMALL_POOL_BYTES = 8 << 20
# Nothing here takes that long: what does hangs, and the test says so.
PATIENCE_SECONDS = 10
# Level-1 blocks cover this much.
LEAF_BYTES = 256 * BLOCK_BYTES


def data(seed: int, blocks: int = 1) -> bytes:
    """Blocks that are unlike those of any other seed, and unlike each other."""
    return b"".join(
        seed.to_bytes(4, "little") + index.to_bytes(4, "little") + b"\x5a" * (BLOCK_BYTES - 8)
        for index in range(blocks)
    )


class Reader:
    """What the offline check reads a device in memory through."""

    def __init__(self, device: MemoryDevice) -> None:
        self._device = device
        self.size_bytes = device.size_bytes

    def read(self, vbns: Sequence[int]) -> list[Block]:
        blocks: list[Block] = []
        for vbn in vbns:
            block = bytearray(BLOCK_BYTES)
            self._device._read([block], vbn * BLOCK_BYTES)
            blocks.append(memoryview(block))
        return blocks


class OpenPool:
    """One open pool on ``memory``, reached through ``device``, which may be a decorator of it."""

    def __init__(
        self,
        pool: Pool,
        memory: MemoryDevice,
        device: Any,
        events: list[tuple[str, dict[str, Any]]],
    ) -> None:
        self.pool = pool
        self.memory = memory
        self.device = device
        self.events = events
        self.closed = False

    def event_names(self) -> list[str]:
        return [name for name, _ in self.events]

    def volume(self, name: str) -> Volume:
        return self.pool.volume(name)

    def image(self, name: str) -> Image:
        return self.pool.volume(name).image

    def begin_write(
        self, name: str, offset_bytes: int, content: bytes, fua: bool = False
    ) -> "asyncio.Future[None]":
        """Begin a write; the Future is its completion."""
        done = completion()
        volume = self.volume(name)
        volume.write(offset_bytes, content, fua, lambda error: settle(done, error))
        volume.settle()
        return keep(done, volume)

    async def write(self, name: str, offset_bytes: int, content: bytes, fua: bool = False) -> None:
        await asyncio.wait_for(self.begin_write(name, offset_bytes, content, fua), PATIENCE_SECONDS)

    def begin_zero(
        self, name: str, offset_bytes: int, length_bytes: int, fua: bool = False
    ) -> "asyncio.Future[None]":
        done = completion()
        volume = self.volume(name)
        volume.write_zeros(offset_bytes, length_bytes, fua, lambda error: settle(done, error))
        return keep(done, volume)

    async def zero(
        self, name: str, offset_bytes: int, length_bytes: int, fua: bool = False
    ) -> None:
        await asyncio.wait_for(
            self.begin_zero(name, offset_bytes, length_bytes, fua), PATIENCE_SECONDS
        )

    def begin_flush(self, name: str) -> "asyncio.Future[None]":
        done = completion()
        self.volume(name).flush(lambda error: settle(done, error))
        return done

    async def flush(self, name: str) -> None:
        await asyncio.wait_for(self.begin_flush(name), PATIENCE_SECONDS)

    def begin_read(self, name: str, offset_bytes: int, length_bytes: int) -> "asyncio.Future[Any]":
        """Begin to read by way of the I/O threads."""
        done = completion()
        volume = self.volume(name)
        volume.read(offset_bytes, length_bytes, lambda found, error: settle(done, error, found))
        return keep(done, volume)

    async def read(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        found = self.volume(name).try_read(offset_bytes, length_bytes)
        if found is not None:
            return bytes(found)
        waited: bytes = await asyncio.wait_for(
            self.begin_read(name, offset_bytes, length_bytes), PATIENCE_SECONDS
        )
        return waited

    async def checkpoint(self) -> None:
        await asyncio.wait_for(self.pool.consistency_point(), PATIENCE_SECONDS)

    async def check(self) -> dict[str, Any]:
        """The live check finds no difference (design section 6, invariant 5)."""
        report = await asyncio.wait_for(self.pool.check(verify_data=True), PATIENCE_SECONDS)
        assert report["ok"], report["errors"]
        return report

    async def until(self, reached: Callable[[], bool]) -> None:
        """Let the pool work until something is the case."""

        async def wait() -> None:
            while not reached():
                await asyncio.sleep(0.001)

        await asyncio.wait_for(wait(), PATIENCE_SECONDS)

    async def reclaimed(self) -> None:
        """Let the background take apart everything that was deleted."""
        await self.until(lambda: not self.pool.show()["deleted_images"])
        await self.checkpoint()
        await self.checkpoint()

    async def split_ended(self, name: str) -> dict[str, Any]:
        await self.until(lambda: self.pool.split_show(name)["state"] != "running")
        return self.pool.split_show(name)

    async def holes(self, name: str) -> int:
        """Holes of a clone with something behind them, counted by walking."""
        image = self.image(name)
        count, index = 0, await next_index(image, 0)
        while index is not None:
            count += len(await holes_at(image, index))
            index = await next_index(image, index + 1)
        return count

    async def crashed(self, **options: Any) -> MemoryDevice:
        """What a loss of power leaves now, if all that was written is on the medium."""
        return self.memory.copy(**options)

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            await asyncio.wait_for(self.pool.close(), PATIENCE_SECONDS)


def completion() -> "asyncio.Future[Any]":
    return asyncio.get_running_loop().create_future()


def keep(done: "asyncio.Future[Any]", volume: Volume) -> "asyncio.Future[Any]":
    """Hold on to a volume, as a session would, until its command is complete."""
    held = [volume]
    done.add_done_callback(lambda _: held.clear())
    return done


def settle(done: "asyncio.Future[Any]", error: Exception | None, result: Any = None) -> None:
    """Give an outcome to a Future. A completion that is called twice raises InvalidStateError."""
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(bytes(result) if result is not None else None)


def checked_offline(memory: MemoryDevice) -> CheckReport:
    """What the device holds is a pool without differences."""
    report = check_device(Reader(memory), verify_data=True)
    assert report.ok, report.errors
    return report


async def open_on(
    memory: MemoryDevice, device: Device | None = None, cache_bytes: int = 64 << 20
) -> OpenPool:
    events: list[tuple[str, dict[str, Any]]] = []
    device = device if device is not None else memory
    pool = await Pool.open_on(
        device, cache_bytes, lambda name, **fields: events.append((name, fields))
    )
    return OpenPool(pool, memory, device, events)


class Delayed:
    """Decorates the pool's device with a DelayDevice, and keeps it in ``device``."""

    device: DelayDevice

    def __call__(self, memory: MemoryDevice) -> DelayDevice:
        self.device = DelayDevice(memory)
        return self.device


@asynccontextmanager
async def opened(
    memory: MemoryDevice, device: Device | None = None, cache_bytes: int = 64 << 20
) -> AsyncIterator[OpenPool]:
    """A pool that is there already. At the end it is closed, and what it left is checked unless it
    went read-only.
    """
    running = await asyncio.wait_for(open_on(memory, device, cache_bytes), PATIENCE_SECONDS)
    try:
        yield running
        if not running.pool.show()["read_only"]:
            await running.check()
    finally:
        await running.close()
    checked_offline(memory)


@asynccontextmanager
async def new_pool(
    size_bytes: int = POOL_BYTES,
    decorate: Callable[[MemoryDevice], Device] | None = None,
    cache_bytes: int = 64 << 20,
    **options: Any,
) -> AsyncIterator[OpenPool]:
    """A new pool; ``decorate`` puts a decorator over the device once the pool is formatted."""
    memory = MemoryDevice(size_bytes, **options)
    await Pool.format(memory)
    async with opened(
        memory, decorate(memory) if decorate is not None else None, cache_bytes
    ) as running:
        yield running


async def backed_clone(
    running: OpenPool, blocks: int = 300, size_bytes: int = 4 * LEAF_BYTES, name: str = "clone"
) -> bytes:
    """A vdisk "base" with ``blocks`` written from its begin on, its snapshot "base@snap", and a
    clone of that. Returns what it reads.
    """
    content = data(1, blocks)
    await running.pool.vdisk_create("base", size_bytes)
    await running.write("base", 0, content)
    await running.pool.snapshot_create([("base", "snap")])
    await running.pool.clone_create("base", "snap", name)
    return content


async def within(work: "Coroutine[Any, Any, Any] | asyncio.Future[Any]") -> Any:
    """The outcome of ``work``, which must not hang."""
    return await asyncio.wait_for(work, PATIENCE_SECONDS)
