"""Planted bugs: each is a patch of the store, switched on by a test only, that the fuzzer must find within a number of seeds.

One more is one more entry of CANARIES. A canary may say which plans are worth trying; it must not say anything to the oracle.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from storage.consistency.intent_log import IntentLog
from storage.images.block_locks import BlockLocks
from tests.crash import canaries as crash_canaries
from tests.fuzz.store.plan import Plan, plan_of
from tests.fuzz.store.session import carry_out

Plant = Callable[[ExitStack], None]
Choose = Callable[[Plan], Plan]


@dataclass(frozen=True)
class Canary:
    """A planted bug, and how many seeds may be needed to find it."""

    name: str
    plant: Plant
    seeds: int = 60
    choose: Choose = lambda plan: plan

    @contextmanager
    def planted(self) -> Iterator[None]:
        """While the bug is in the store."""
        with ExitStack() as stack:
            self.plant(stack)
            yield


@dataclass(frozen=True)
class Found:
    seed: int
    operations: int
    wrong: str


def seeds_until_found(canary: Canary, first: int = 1) -> Found | None:
    """Try seeds from ``first`` on; operations are those of all of them."""
    operations = 0
    for seed in range(first, first + canary.seeds):
        plan = canary.choose(plan_of(seed))
        with canary.planted():
            tally, wrong = carry_out(plan)
        operations += tally.operations
        if wrong is not None and carry_out(plan)[1] is None:  # and not without it
            return Found(seed, operations, f"{type(wrong).__name__}: {wrong}"[:200])
    return None


# --- The bugs ------------------------------------------------------------------------------------------------------------


def lost_log_record(stack: ExitStack) -> None:
    """One record in ten is taken for written, and is not."""
    original = IntentLog._write_out
    count = 0

    def planted(self: IntentLog) -> None:
        nonlocal count
        count += 1
        if count % 10 == 0 and not self._in_threads and len(self._unwritten) > 0:
            del self._unwritten[0]
        original(self)

    stack.enter_context(mock.patch.object(IntentLog, "_write_out", planted))


def merge_without_lock(stack: ExitStack) -> None:
    """Partial writes to one block do not wait for each other."""

    @asynccontextmanager
    async def planted(self: BlockLocks, first: int, count: int) -> Any:
        yield

    stack.enter_context(mock.patch.object(BlockLocks, "holding", planted))


def flush_without_sync(stack: ExitStack) -> None:
    """A flush is acknowledged when its records are written."""
    original = IntentLog._put_down

    async def planted(self: IntentLog, durable: bool) -> None:
        await original(self, False)

    stack.enter_context(mock.patch.object(IntentLog, "_put_down", planted))


CANARIES: tuple[Canary, ...] = (
    Canary("a freed block is used again too early", crash_canaries.early_reuse_of_freed_block),
    Canary("a split without compare-and-set", crash_canaries.split_without_compare_and_set),
    Canary("a trim leaves holes in a clone", crash_canaries.trimmed_block_becomes_a_hole),
    Canary("a record of the log is lost", lost_log_record),
    Canary("partial writes merge without a lock", merge_without_lock),
    Canary("a flush is acknowledged without a sync", flush_without_sync),
)
