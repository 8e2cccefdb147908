"""A pool on a device in memory, driven step by step from code that is not asynchronous, and that
can lose power at any step.

Its time is virtual and its identities are counted (tests.crash.determinism), so that the same steps
have the same outcome every time.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from functools import partial
from random import Random
from typing import Any, TypeVar

from storage.check import CheckReport, check_device
from storage.check.steps import Block
from storage.pool import Pool
from storage.vdisks.volume import Volume
from tests.crash.determinism import VirtualLoop, end_all_tasks, repeatable
from tests.storage.crash_device import CrashDevice, Fuse, Loss
from tests.storage.model import BLOCK_BYTES

T = TypeVar("T")

# Virtual seconds, longer than anything here takes: what waits longer hangs, and the test says so
# instead of hanging with it.
PATIENCE_SECONDS = 60
# What a turn of the event loop takes at least, in virtual seconds.
TURN_SECONDS = 20e-6


class PassingTime(VirtualLoop):
    """A loop whose time also passes while somebody is ready to run, a little with every turn (each
    looks at the clock).

    So timers of the background end in the midst of other work, and other work begins in the midst
    of a message of the background.
    """

    def __init__(self) -> None:
        self._looks = 0
        super().__init__()

    def time(self) -> float:
        self._looks += 1
        return super().time() + self._looks * TURN_SECONDS


class DeviceReader:
    """What the offline check reads from."""

    def __init__(self, device: CrashDevice) -> None:
        self._device = device
        self.size_bytes = device.size_bytes

    def read(self, vbns: Sequence[int]) -> list[Block]:
        return [memoryview(self._device.content(vbn * BLOCK_BYTES, BLOCK_BYTES)) for vbn in vbns]


class RunningPool:
    """One pool over its life: opened, closed, crashed and opened again. ``events`` are those since
    the last open.
    """

    def __init__(self, size_bytes: int, cache_bytes: int, **device_options: Any) -> None:
        self._repeatable = repeatable()
        self._repeatable.__enter__()
        self._loop = PassingTime()
        self._loop.set_exception_handler(self._unexpected)
        self._options = device_options
        self._cache_bytes = cache_bytes
        self.device = CrashDevice(size_bytes, **device_options)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.surprises: list[str] = []
        self.is_open = False
        # Volumes in a session's hand, and commands that nobody waits for.
        self.held: dict[int, Volume] = {}
        self.background: list[asyncio.Task[None]] = []
        try:
            self.run(Pool.format(self.device))
            self.open()
        except BaseException:
            self.stop()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run until ``work`` is done. What waits for ever fails, and says where it and all others
        wait.
        """
        return self._loop.run_until_complete(self._patiently(work))

    @staticmethod
    async def _patiently(work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.get_running_loop().create_task(work)
        await asyncio.wait([task], timeout=PATIENCE_SECONDS)
        assert task.done(), "\n".join(waits_where(other) for other in asyncio.all_tasks())
        return task.result()

    def _unexpected(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.surprises.append(f"{context.get('message')}: {context.get('exception')!r}")

    def open(self) -> None:
        self.events = []
        self.pool = self.run(Pool.open_on(self.device, self._cache_bytes, self._on_event))
        self.is_open = True

    def _on_event(self, name: str, **fields: Any) -> None:
        self.events.append((name, fields))

    def close(self) -> None:
        self.held.clear()
        self.is_open = False
        self.run(self.pool.close())

    def reopen(self) -> None:
        """A restart in order."""
        self.close()
        self.device = self.device.lose_power(Loss.ALL, Random(), **self._options)
        self.check_offline()
        self.open()

    def lose_power(self, loss: Loss, seed: int) -> None:
        """The process and what was not durable are gone at once; the pool is opened again from what
        is found.
        """
        self.is_open = False
        self.held.clear()
        found = self.device.lose_power(loss, Random(seed), **self._options)
        self._loop.run_until_complete(self._abandon())
        self.device = found
        self.check_offline()
        self.open()

    def cut_short(self, fuse: Fuse, commands: dict[str, Coroutine[Any, Any, Any]]) -> set[str]:
        """Begin the commands together, and let the device die in their middle. Returns the names of
        those that were acknowledged before.
        """
        self.device.fail_after(fuse)
        return self.run(self._until_dead(commands))

    async def _until_dead(self, commands: dict[str, Coroutine[Any, Any, Any]]) -> set[str]:
        tasks = {name: asyncio.create_task(command) for name, command in commands.items()}
        self.background = list(tasks.values())
        while not self.device.dead and not all(task.done() for task in self.background):
            await asyncio.sleep(0)
        return {name for name, task in tasks.items() if task.done() and task.exception() is None}

    async def _abandon(self) -> None:
        """Whatever the old pool was doing ends where it stands."""
        await end_all_tasks()
        for task in self.background:
            if not task.cancelled():
                # It may have ended with the device's error, which nobody asks for any more.
                task.exception()
        self.background.clear()

    def turns(self, count: int) -> None:
        """Let the background work for that many turns of the event loop."""
        self.run(self._turns(count))

    @staticmethod
    async def _turns(count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    def check_offline(self) -> CheckReport:
        """What the device holds is a pool without differences, data included."""
        report = check_device(DeviceReader(self.device), verify_data=True)
        assert report.ok, report.errors
        return report

    def check_live(self) -> None:
        report = self.run(self.pool.check(verify_data=True))
        assert report["ok"], report["errors"]

    def stop(self) -> None:
        """End for good."""
        try:
            self._loop.run_until_complete(self._abandon())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()
            self._repeatable.__exit__(None, None, None)
        assert not self.surprises, self.surprises

    # --- A volume's commands, as coroutines ---

    async def write(self, name: str, offset_bytes: int, data: bytes, fua: bool = False) -> None:
        volume, done = self.pool.volume(name), self._loop.create_future()
        volume.write(offset_bytes, data, fua, lambda error: settle(done, error))
        volume.settle()
        await done

    async def write_blocks(self, name: str, contents: dict[int, bytes]) -> None:
        """Single blocks, as one batch."""
        volume = self.pool.volume(name)
        completions = []
        for fbn, content in contents.items():
            done = self._loop.create_future()
            completions.append(done)
            volume.write(fbn * BLOCK_BYTES, content, False, partial(settle, done))
        volume.settle()
        await asyncio.gather(*completions)

    async def zero(
        self, name: str, offset_bytes: int, length_bytes: int, unmap: bool, fua: bool = False
    ) -> None:
        volume, done = self.pool.volume(name), self._loop.create_future()
        if unmap:
            volume.unmap(offset_bytes, length_bytes, lambda error: settle(done, error))
        else:
            volume.write_zeros(offset_bytes, length_bytes, fua, lambda error: settle(done, error))
        await done

    async def flush(self, name: str) -> None:
        done = self._loop.create_future()
        self.pool.volume(name).flush(lambda error: settle(done, error))
        await done

    async def read(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        volume = self.pool.volume(name)
        data = volume.try_read(offset_bytes, length_bytes)
        if data is None:
            done: asyncio.Future[bytes] = self._loop.create_future()
            volume.read(offset_bytes, length_bytes, lambda found, error: settle(done, error, found))
            data = await done
        return bytes(data)


def waits_where(task: "asyncio.Task[Any]") -> str:
    """The lines at which a task and what it awaits stand."""
    lines: list[str] = []
    inner: Any = task.get_coro()
    while isinstance(inner, Coroutine) and (frame := getattr(inner, "cr_frame", None)) is not None:
        lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")
        inner = getattr(inner, "cr_await", None)
    return f"{task.get_name()}: " + " > ".join(lines) + f" > {inner!r}"


def settle(done: "asyncio.Future[Any]", error: Exception | None, result: Any = None) -> None:
    """Give an outcome to a Future; a completion that comes twice is an error of its own
    (InvalidStateError).
    """
    if done.cancelled():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(bytes(result) if result is not None else None)
