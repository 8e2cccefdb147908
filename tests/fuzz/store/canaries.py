"""Planted bugs: each is a patch of the store, switched on by a test only, that the fuzzer must find
within a number of seeds.

One more is one more entry of CANARIES. A canary may say which plans are worth trying; it must not
say anything to the oracle.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from storage.consistency.consistency_point import ConsistencyPoints
from storage.data import allocation_report, write_path
from storage.data.backing import fields_behind, visible_slots
from storage.data.block_locks import BlockLocks
from storage.epoch.epoch import Epoch
from storage.images.image import Image
from storage.layout import FIELDS_MASK, HOLE, ZERO_POINTER
from storage.log.intent_log import IntentLog
from storage.tree.attempt import when_possible
from storage.tree.editor import Plan as BufferPlan
from storage.tree.node import NodeCache
from tests.crash import canaries as crash_canaries
from tests.fuzz.store import plan as plans
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


def splitting(plan: Plan) -> Plan:
    """Hardly anything but splits, and clients just where they work."""
    kinds = {1: plans.SNAPSHOT, 2: plans.CLONE, 3: plans.RACE, 5: plans.RACE}
    changed = [
        one._replace(kind=kinds.get(number % 8, one.kind)) if number > 8 else one
        for number, one in enumerate(plan.operations)
    ]
    return replace(plan, operations=changed)


def filling(plan: Plan) -> Plan:
    """A small pool that is filled again and again."""
    changed = [
        one._replace(kind=plans.FILL) if number % 50 == 49 else one
        for number, one in enumerate(plan.operations)
    ]
    return replace(plan, pool_bytes=8 << 20, operations=changed)


# --- The bugs -------------------------------------------------------------------------------------


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


def node_in_hand_is_evicted(stack: ExitStack) -> None:
    """A node that is taken in makes room at once, in the middle of whatever step loads it (issue 7,
    A1).
    """

    def planted(self: NodeCache, looks: int) -> None:
        self._looks_due += looks
        self._evict()

    stack.enter_context(mock.patch.object(NodeCache, "_evict_soon", planted))


def report_looks_behind_later(stack: ExitStack) -> None:
    """An allocation report looks at a clone, waits, and then looks behind it (issue 7, A2)."""

    async def planted(
        image: Image, index: int, start: int, end: int, runs: list[allocation_report.Run]
    ) -> None:
        own = (await image.tree.load(index)).vbns().copy()
        await asyncio.sleep(0.002)
        behind = await when_possible(
            image.state,
            lambda: fields_behind(image, index, (own == HOLE) & visible_slots(image, index)),
        )
        for fbn in range(start, end):
            slot = fbn & FIELDS_MASK
            allocation_report._append(
                runs, 1, bool(own[slot] > ZERO_POINTER or behind["vbn"][slot] > ZERO_POINTER)
            )

    stack.enter_context(mock.patch.object(allocation_report, "_append_block", planted))


def wait_before_the_freeze(stack: ExitStack) -> None:
    """Between what belongs to a freeze and the freeze itself others get a turn (issue 7, A6)."""
    room_for_one, freeze = ConsistencyPoints._room_for_one, ConsistencyPoints._freeze
    early: dict[int, list[asyncio.Future[None]]] = {}

    async def planted_room(self: ConsistencyPoints) -> None:
        await room_for_one(self)
        if self._state.read_only_reason is None and self._state.frozen is None:
            self._run_at_freeze(early.setdefault(id(self), []))
            await asyncio.sleep(0.0005)

    def planted_freeze(self: ConsistencyPoints, waiting: list[asyncio.Future[None]]) -> Any:
        waiting += early.pop(id(self), [])
        return freeze(self, waiting)

    stack.enter_context(mock.patch.object(ConsistencyPoints, "_room_for_one", planted_room))
    stack.enter_context(mock.patch.object(ConsistencyPoints, "_freeze", planted_freeze))


def refused_writes_make_pointer_blocks(stack: ExitStack) -> None:
    """Pointer blocks are made before there is room for the data (issue 7, A10)."""
    plan_for = write_path.plan_for

    def planted(image: Image, epoch: Epoch, indexes: Iterable[int]) -> BufferPlan | None:
        plan = plan_for(image, epoch, indexes)
        if plan is None:
            return None
        image.editor.carry_out(plan)
        return BufferPlan(epoch)

    stack.enter_context(mock.patch.object(write_path, "plan_for", planted))


CANARIES: tuple[Canary, ...] = (
    Canary("a node in hand is evicted", node_in_hand_is_evicted),
    Canary("a report looks behind a clone later", report_looks_behind_later, choose=splitting),
    Canary("a wait before the freeze", wait_before_the_freeze),
    Canary(
        "refused writes make pointer blocks", refused_writes_make_pointer_blocks, choose=filling
    ),
    Canary("a freed block is used again too early", crash_canaries.early_reuse_of_freed_block),
    Canary(
        "a split without compare-and-set",
        crash_canaries.split_without_compare_and_set,
        choose=splitting,
    ),
    Canary("a trim leaves holes in a clone", crash_canaries.trimmed_block_becomes_a_hole),
    Canary("a record of the log is lost", lost_log_record),
    Canary("partial writes merge without a lock", merge_without_lock),
    Canary("a flush is acknowledged without a sync", flush_without_sync),
)
