"""The I/O threads: batches, wake-ups, errors, and the loops that come and go."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from storage.device import io_threads
from storage.device.io_threads import BATCH_JOBS_MAX, IoThreads
from storage.errors import DeviceFailed

# Only a test that is about to fail waits this long.
PATIENCE_SECONDS = 20


class Gate:
    """Blocks the threads that come to it until it is opened."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self._opened = threading.Event()

    def __call__(self, *_: Any) -> None:
        self.arrived.release()
        assert self._opened.wait(PATIENCE_SECONDS)

    def open(self) -> None:
        self._opened.set()

    def wait_for(self, threads: int) -> None:
        for _ in range(threads):
            assert self.arrived.acquire(timeout=PATIENCE_SECONDS)


class CountingLoop(asyncio.SelectorEventLoop):
    wake_ups = 0

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:  # type: ignore[override]
        self.wake_ups += 1
        return super().call_soon_threadsafe(*args, **kwargs)


def nothing(*_: Any) -> None:
    return


@pytest.fixture
def threads() -> Iterator[IoThreads]:
    made = IoThreads("test", 1)
    yield made
    made.close()


def run_counting(main: Callable[[CountingLoop], Any]) -> int:
    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, CountingLoop)
        runner.run(main(loop))
        return loop.wake_ups


def test_a_batch_posts_one_wake_up(threads: IoThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_threads, "WAKE_INTERVAL_SECONDS", PATIENCE_SECONDS)
    gate = Gate()

    async def main(loop: CountingLoop) -> None:
        blocked = threads.submit(gate, None, None)
        gate.wait_for(1)
        jobs = [threads.submit(nothing, None, None) for _ in range(3 * BATCH_JOBS_MAX)]
        gate.open()
        await asyncio.gather(blocked, *jobs)

    # One for the batch of the blocked job, one at most for each of the three batches behind it.
    assert 1 <= run_counting(main) <= 4


def test_a_finished_job_does_not_wait_for_a_slow_neighbour(
    threads: IoThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io_threads, "WAKE_INTERVAL_SECONDS", 0)
    first, slow = Gate(), Gate()

    async def main(_: CountingLoop) -> None:
        blocked = threads.submit(first, None, None)
        first.wait_for(1)
        quick, late = threads.submit(nothing, None, None), threads.submit(slow, None, None)
        first.open()
        await asyncio.wait_for(asyncio.gather(blocked, quick), PATIENCE_SECONDS)
        assert not late.done()
        slow.open()
        await late

    run_counting(main)


async def test_all_threads_work_at_once() -> None:
    threads, gate = IoThreads("test", 3), Gate()
    jobs = [threads.submit(gate, None, None) for _ in range(3)]
    gate.wait_for(3)
    gate.open()
    await asyncio.gather(*jobs)
    threads.close()


async def test_every_job_of_many_rounds_is_done_once() -> None:
    """A lost wake-up or completion would hang this."""
    threads = IoThreads("test", 3)
    done: list[int] = []

    async def one_after_another(number: int) -> None:
        for _ in range(200):
            await threads.submit(lambda first, _: done.append(first), number, None)

    await asyncio.wait_for(asyncio.gather(*map(one_after_another, range(8))), PATIENCE_SECONDS)
    assert sorted(done) == sorted(list(range(8)) * 200)
    threads.close()


async def test_an_error_reaches_its_own_future_only(threads: IoThreads) -> None:
    def fail(first: object, _: object) -> None:
        raise ValueError(first)

    jobs = [threads.submit(fail if number % 2 else nothing, number, None) for number in range(6)]
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), ValueError] * 3
    assert [str(result) for result in results[1::2]] == ["1", "3", "5"]


async def test_a_cancelled_job_still_ends(threads: IoThreads) -> None:
    gate, ended = Gate(), threading.Event()
    blocked = threads.submit(gate, None, None)
    cancelled = threads.submit(lambda *_: ended.set(), None, None)
    cancelled.cancel()
    gate.open()
    await blocked
    await threads.submit(nothing, None, None)
    assert ended.is_set()
    assert cancelled.cancelled()


async def test_close_waits_and_completes(threads: IoThreads) -> None:
    done: list[int] = []
    jobs = [
        threads.submit(lambda first, _: done.append(first), number, None) for number in range(100)
    ]
    threads.close()
    assert done == list(range(100))
    assert all(job.done() for job in jobs)
    with pytest.raises(DeviceFailed, match="closed"):
        await threads.submit(nothing, None, None)


def test_close_ends_its_threads() -> None:
    before = threading.active_count()

    async def main() -> None:
        threads = IoThreads("test", 3)
        await threads.submit(nothing, None, None)
        assert threading.active_count() == before + 3
        threads.close()

    asyncio.run(main())
    assert threading.active_count() == before


def test_without_a_job_there_are_no_threads() -> None:
    before = threading.active_count()
    threads = IoThreads("test", 3)
    assert threading.active_count() == before
    threads.close()


def test_it_follows_from_one_loop_to_the_next(threads: IoThreads) -> None:
    async def main() -> None:
        await asyncio.wait_for(threads.submit(nothing, None, None), PATIENCE_SECONDS)

    for _ in range(3):
        asyncio.run(main())


def test_a_loop_that_ends_before_its_jobs_harms_nobody(threads: IoThreads) -> None:
    gate = Gate()

    async def abandons() -> None:
        threads.submit(gate, None, None)
        gate.wait_for(1)

    async def waits() -> None:
        job = threads.submit(nothing, None, None)
        gate.open()
        await asyncio.wait_for(job, PATIENCE_SECONDS)

    asyncio.run(abandons())
    asyncio.run(waits())


def test_closing_after_the_loop_is_gone(threads: IoThreads) -> None:
    async def main() -> None:
        threads.submit(nothing, None, None)

    asyncio.run(main())
    threads.close()
