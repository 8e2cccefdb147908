"""Runs workloads, enumerates the crash states of their epochs, and has each examined: the heart of
``make crash``.

States are told apart by a hash that is the exclusive or of one hash a page: an overlay of a few
pages costs a few look-ups. A state is examined once for each expectation; one seen before, in this
workload or an earlier one, is not examined again.
"""

import traceback
from collections.abc import Coroutine, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple, TypeVar

from tests.crash.determinism import VirtualLoop, repeatable, run_to_the_end
from tests.crash.long_workloads import STATES_AN_EPOCH, LongWorkload, records_of
from tests.crash.oracle import Expectation
from tests.crash.recording import ZERO_PAGE, Pages, RecordingDevice, Request
from tests.crash.session import Session, abandon, open_steady
from tests.crash.states import crash_states
from tests.crash.verify import Verification
from tests.crash.workloads import OPERATIONS, POOL_BYTES, Sequence, make_base

T = TypeVar("T")

# One state in so many loses power again during its recovery, in every way that the recovery's own
# epochs allow.
RECOVERY_EVERY = 50


# Identities of what a workload makes, far from those of the pool that it begins with.
WORKLOAD_IDENTITIES = 1000


class CrashPoint(NamedTuple):
    """The end of an epoch: what is durable, what a power loss may take, and what must hold
    afterwards.
    """

    operation: int
    base: Pages
    requests: list[Request]
    expectation: Expectation


@dataclass
class Tally:
    """Figures of a run."""

    sequences: int = 0
    epochs: int = 0
    states: set[int] = field(default_factory=set)
    examined: set[tuple[int, int]] = field(default_factory=set)
    recoveries: int = 0
    used: int = 0
    failures: list[str] = field(default_factory=list)


class Enumerator:
    """Holds the loop, the base pool and the tally. ``use_every``: of how many states one is not
    only examined but used and emptied; ``failures_max``: after how many failures it is enough.
    """

    def __init__(self, seed: int, use_every: int = 1, failures_max: int = 1 << 30) -> None:
        self.seed = seed
        self.failures_max = failures_max
        self.use_every = use_every
        self.tally = Tally()
        self._loop = VirtualLoop()
        self._page_hashes: dict[tuple[int, bytes], int] = {}
        with repeatable():
            self.base, self.model = self._run(make_base())

    def close(self) -> None:
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return run_to_the_end(self._loop, work)

    # --- Workloads --------------------------------------------------------------------------------

    def sequence(self, names: Sequence, mode: str = "copy", only: str | None = None) -> None:
        """Run one sequence, and examine the states of those epochs that its last operation ends, or
        that nothing ends.
        """
        label = ",".join(names) + (f":{mode}" if mode != "copy" else "")
        try:
            with repeatable(WORKLOAD_IDENTITIES):
                points = self._run(self._record(names, mode))
        except Exception:
            self._failed(label, traceback.format_exc(limit=-4))
            return
        self.tally.sequences += 1
        self.points(label, [point for point in points if point.operation == len(names)], only)

    async def _record(self, names: Sequence, mode: str) -> list[CrashPoint]:
        points: list[CrashPoint] = []
        model = deepcopy(self.model)
        operation = 0

        def at_sync(base: Pages, requests: list[Request]) -> None:
            points.append(CrashPoint(operation, dict(base), requests, model.expectation()))

        device = RecordingDevice(POOL_BYTES, self.base, at_sync)
        session = Session(await open_steady(device), model, mode)
        for operation, name in enumerate(names, 1):
            await OPERATIONS[name](session, names[: operation - 1].count(name))
        at_sync(device.base, device.requests())
        await abandon(session.pool)
        return points

    def long_workload(self, seed: int, only: str | None = None) -> None:
        """Run one long workload, and examine a few states of each of its epochs."""
        label = f"long {seed}"
        points: list[CrashPoint] = []
        try:
            with repeatable(WORKLOAD_IDENTITIES), records_of(seed):
                self._run(self._record_long(seed, points))
        except Exception:
            self._failed(label, traceback.format_exc(limit=-4))
        self.tally.sequences += 1
        self.points(label, points, only, STATES_AN_EPOCH)

    async def _record_long(self, seed: int, points: list[CrashPoint]) -> None:
        model = deepcopy(self.model)

        def at_sync(base: Pages, requests: list[Request]) -> None:
            points.append(CrashPoint(0, dict(base), requests, model.expectation()))

        device = RecordingDevice(POOL_BYTES, self.base, at_sync, seed)
        session = Session(await open_steady(device), model)
        await LongWorkload(session, seed).run()
        at_sync(device.base, device.requests())
        await abandon(session.pool)

    # --- States -----------------------------------------------------------------------------------

    def points(
        self, label: str, points: Iterable[CrashPoint], only: str | None = None, sample: int = 0
    ) -> None:
        """Examine every state of these crash points, or a seeded ``sample`` of each; with ``only``,
        the one state of that name.
        """
        for number, point in enumerate(points):
            self.tally.epochs += 1
            base_hash = self._hash_of(point.base)
            for name, overlay in sampled(
                crash_states(point.base, point.requests, self.seed), sample, number
            ):
                state = f"{label} / epoch {number} / {name}"
                if only is not None and state != only:
                    continue
                if len(self.tally.failures) >= self.failures_max:
                    return
                key = base_hash
                for page, content in overlay.items():
                    key ^= self._page_hash(page, content) ^ self._page_hash(
                        page, point.base.get(page, ZERO_PAGE)
                    )
                self._examine(state, key, point, overlay)

    def _hash_of(self, pages: Pages) -> int:
        total = 0
        for page, content in pages.items():
            total ^= self._page_hash(page, content)
        return total

    @staticmethod
    def _page_hash(page: int, content: bytes) -> int:
        # A page of zeros is as good as none. bytes objects keep their hash.
        return hash((page, content)) if content != ZERO_PAGE else 0

    def _examine(self, state: str, key: int, point: CrashPoint, overlay: Pages) -> None:
        tally = self.tally
        examined = (key, point.expectation.key)
        if examined in tally.examined:
            return
        tally.examined.add(examined)
        tally.states.add(key)
        count = len(tally.examined)
        use = count % self.use_every == 0
        tally.used += use
        verification = Verification(point.base | overlay, POOL_BYTES, point.expectation)
        try:
            self._run(verification.run(use=use))
        except Exception:
            self._failed(state, traceback.format_exc(limit=-3))
        if count % RECOVERY_EVERY == 0:
            self._recovery(state, point, overlay)

    def _failed(self, state: str, why: str) -> None:
        self.tally.failures.append(f"{state}\n{why}")

    # --- Power lost again during recovery ---------------------------------------------------------

    def _recovery(self, state: str, point: CrashPoint, overlay: Pages) -> None:
        points: list[tuple[Pages, list[Request]]] = []
        self.tally.recoveries += 1
        pages = point.base | overlay

        async def recover() -> None:
            device = RecordingDevice(
                POOL_BYTES, pages, lambda base, requests: points.append((dict(base), requests))
            )
            pool = await open_steady(device)
            points.append((dict(device.base), device.requests()))
            await abandon(pool)

        try:
            self._run(recover())
        except Exception:
            self._failed(f"{state} / recovery", traceback.format_exc(limit=-3))
            return
        for number, (base, requests) in enumerate(points):
            for name, torn in crash_states(base, requests, self.seed):
                key = self._hash_of(base | torn)
                self._examine_plain(
                    f"{state} / recovery epoch {number} / {name}", key, point, base | torn
                )

    def _examine_plain(self, state: str, key: int, point: CrashPoint, pages: Pages) -> None:
        examined = (key, point.expectation.key)
        if examined in self.tally.examined:
            return
        self.tally.examined.add(examined)
        self.tally.states.add(key)
        try:
            self._run(Verification(pages, POOL_BYTES, point.expectation).run(use=False))
        except Exception:
            self._failed(state, traceback.format_exc(limit=-3))


def sampled(
    states: Iterator[tuple[str, Pages]], count: int, seed: int
) -> Iterable[tuple[str, Pages]]:
    """``count`` of the states, or all if it is 0."""
    if not count:
        return states
    everything = list(states)
    return everything if len(everything) <= count else Random(seed).sample(everything, count)
