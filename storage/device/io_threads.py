"""A few long-lived threads that do the blocking work of one device for one event loop.

Invariants:

- Only the event loop thread submits, closes and completes Futures. Threads touch the deques, whose
  append and popleft are atomic, and nothing else of this module's.
- No wake-up is lost. A thread lists itself in ``_asleep`` *before* it looks at the queue for the
  last time, and the loop looks at ``_asleep`` *after* it queued a job: one of the two sees the
  other.
- No completion is lost. ``_drain`` clears ``_wake_posted`` *before* it empties ``_completed``; a
  thread appends *before* it looks at the flag. Two threads that both see it clear post two
  wake-ups, and the second finds nothing: harmless.

Costs, which is why it is not ``run_in_executor``: a submission is one Future and one append, and
wakes a thread (one futex call) only when one sleeps. A thread takes a share of the queue as one
*batch*, and a batch posts one ``call_soon_threadsafe`` (one write to the loop's wake-up descriptor)
at most, none when one is on its way already. Only a batch that takes longer than
WAKE_INTERVAL_SECONDS posts its finished jobs before its end, so that no job waits for slow
neighbours.
"""

import threading
from asyncio import AbstractEventLoop, Future, get_running_loop
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from storage.errors import DeviceFailed

# A batch holds its jobs back from the other threads, so it must stay small against a queue depth of
# 32 or 64.
BATCH_JOBS_MAX = 16
# Ten wake-ups of the event loop take less than a tenth of this.
WAKE_INTERVAL_SECONDS = 0.0005

Work = Callable[[Any, Any], None]
Job = tuple["Future[None]", Work, Any, Any]


class IoThreads:
    """Runs ``work(first, second)`` on ``threads`` threads, started at the first submission. Works
    with any event loop.
    """

    def __init__(self, name: str, threads: int) -> None:
        """``name`` is the device's path: it is in messages and in the threads' names."""
        self._name = name
        self._thread_count = threads
        self._threads: list[threading.Thread] = []
        self._loop: AbstractEventLoop | None = None
        self._queue: deque[Job] = deque()
        self._asleep: deque[threading.Lock] = deque()
        self._completed: deque[tuple[Future[None], Exception | None]] = deque()
        self._wake_posted = False
        self._closed = False

    def submit(self, work: Work, first: Any, second: Any) -> "Future[None]":
        """Queue a job of the running loop. Its Future gets what ``work`` raises, or DeviceFailed
        when closed.
        """
        loop = get_running_loop()
        if loop is not self._loop:
            self._bind(loop)
        future: Future[None] = loop.create_future()
        if self._closed:
            future.set_exception(DeviceFailed(f"{self._name}: the device is closed"))
            return future
        self._queue.append((future, work, first, second))
        if self._asleep:
            self._wake()
        return future

    def close(self) -> None:
        """Do what is queued, end the threads, complete the Futures. Blocks. Again: no effect."""
        if self._closed:
            return
        self._closed = True
        while self._asleep:
            self._wake()
        for thread in self._threads:
            thread.join()
        # A loop that is gone takes no callbacks, and nobody can be waiting in it.
        if self._loop is not None and not self._loop.is_closed():
            self._drain()

    def _bind(self, loop: AbstractEventLoop) -> None:
        """Serve ``loop`` from now on. A former one has ended: a pool lives in one loop, an offline
        tool may use several in turn.
        """
        assert self._loop is None or not self._loop.is_running(), (
            "a device serves one event loop at a time"
        )
        self._loop = loop
        self._wake_posted = False
        if not self._threads and not self._closed:
            self._threads = [
                threading.Thread(target=self._run, name=f"io-{number}:{self._name}", daemon=True)
                for number in range(self._thread_count)
            ]
            for thread in self._threads:
                thread.start()

    def _wake(self) -> None:
        try:
            self._asleep.pop().release()
        except IndexError:
            # The last sleeper has just woken by itself, and looks at the queue before it sleeps
            # again.
            return

    # --- On the threads ---

    def _run(self) -> None:
        asleep = threading.Lock()
        asleep.acquire()
        while True:
            while batch := self._take():
                self._do(batch)
            self._asleep.append(asleep)
            if not self._queue and not self._closed:
                asleep.acquire()
                continue
            self._stay_awake(asleep)
            if self._closed and not self._queue:
                return

    def _stay_awake(self, asleep: threading.Lock) -> None:
        """Take this thread out of the sleepers; where the loop was faster, use up the wake-up that
        it gave.
        """
        try:
            self._asleep.remove(asleep)
        except ValueError:
            asleep.acquire()

    def _take(self) -> list[Job]:
        """This thread's share of the queue, so that the others have something to do too."""
        queue = self._queue
        share = min(BATCH_JOBS_MAX, -(-len(queue) // self._thread_count))
        batch: list[Job] = []
        try:
            while len(batch) < share:
                batch.append(queue.popleft())
        except IndexError:
            pass
        return batch

    def _do(self, batch: list[Job]) -> None:
        completed = self._completed
        posted_at = monotonic()
        for future, work, first, second in batch:
            error: Exception | None = None
            try:
                work(first, second)
            except Exception as raised:  # noqa: BLE001 (whatever it is, the Future hands it on)
                error = raised
            completed.append((future, error))
            if (now := monotonic()) - posted_at > WAKE_INTERVAL_SECONDS:
                self._post_wake()
                posted_at = now
        self._post_wake()

    def _post_wake(self) -> None:
        while self._completed and not self._wake_posted:
            self._wake_posted = True
            loop = self._loop
            assert loop is not None
            try:
                loop.call_soon_threadsafe(self._drain)
            except RuntimeError:
                # The loop was closed with jobs in flight, so nobody waits for those; but by now
                # another one may be bound.
                self._wake_posted = False
                if self._loop is loop:
                    return

    # --- Back on the event loop ---

    def _drain(self) -> None:
        self._wake_posted = False
        completed = self._completed
        while completed:
            future, error = completed.popleft()
            if future.done() or future.get_loop() is not self._loop:
                continue  # cancelled, or of a loop that ended before its jobs
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
