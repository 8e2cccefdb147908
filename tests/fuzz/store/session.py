"""One life after another of one pool, as a plan says: begins commands and judges what
they answer.
"""

import asyncio
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from storage.errors import (
    BlockDamaged,
    DeviceFailed,
    OutOfRange,
    PoolFull,
    PoolReadOnly,
    VolumeClosed,
)
from storage.pool import Pool
from tests.fuzz.store import plan as plans
from tests.fuzz.store.admin import Admin
from tests.fuzz.store.circumstances import Loop, circumstances, end_all_tasks
from tests.fuzz.store.data import Data
from tests.fuzz.store.device import FuzzDevice, Trouble
from tests.fuzz.store.lives import Lives
from tests.fuzz.store.oracle import Wrong
from tests.fuzz.store.plan import Operation, Plan
from tests.fuzz.store.world import Disk, World

# Virtual seconds in which everything has to be answered. The longest that the store waits by itself
# is the pause of a background work.
PATIENCE_SECONDS: Final = 120.0
# A pool that has more room than this for data refuses nothing, whatever else is under way. Blocks
# that are on their way back are waited for by the store itself.
SHORT_BLOCKS: Final = 364


@dataclass
class Tally:
    """What was done, for the summary."""

    operations: int = 0
    kills: int = 0
    power_losses: int = 0
    openings: int = 0
    checks: int = 0
    refused: int = 0
    points: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        self.operations += other.operations
        self.kills += other.kills
        self.power_losses += other.power_losses
        self.openings += other.openings
        self.checks += other.checks
        self.refused += other.refused
        self.points += other.points
        self.seconds += other.seconds
        self.kinds.update(other.kinds)


@dataclass(slots=True, eq=False)
class Flight:
    """A command that is under way."""

    kind: str
    what: str
    start: int
    began: float
    life: int
    failures: int
    available: int
    disk: Disk | None = None
    disturbed: int = 0


class Session:
    """See the module. What is found wrong is raised by ``run``."""

    def __init__(self, plan: Plan, trace: Callable[[str], None] | None = None) -> None:
        self.plan = plan
        self.trace = trace
        self.random = Random(f"{plan.seed}/{plan.device}")
        self.tally = Tally()
        self.world = World()
        self.device: FuzzDevice
        self.pool: Pool
        self.life = 0
        self.wrong: Exception | None = None
        self.flying: dict[int, Flight] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.landed = asyncio.Event()
        self.moment = 0
        self.versions = itertools.count(1)
        self.unsettled: dict[Any, None] = {}
        self.buffers: list[bytearray] = []
        self.closing = False
        self.copies: list[tuple[Disk, range, Disk, range]] = []
        self.configured: set[bytes] = {b""}
        self.shared_ever = False
        # A deleted image is not taken apart further in this life.
        self.reclaim_failed = False
        self.data, self.admin, self.lives = Data(self), Admin(self), Lives(self)
        # Drawn once, so that the same addresses come again and again.
        self.spots = [
            0,
            255,
            1,
            128,
            254,
            7,
            *self.random.sample(range(8, 128), 40),
            *range(129, 254),
        ][: plan.spots]

    # --- Time and moments -------------------------------------------------------------------------

    def now(self) -> int:
        self.moment += 1
        return self.moment

    def seconds(self) -> float:
        return asyncio.get_running_loop().time()

    # --- Commands under way -----------------------------------------------------------------------

    def begin(self, kind: str, what: str, disk: Disk | None = None) -> Flight:
        flight = Flight(
            kind,
            what,
            self.now(),
            self.seconds(),
            self.life,
            self.device.failures,
            self.pool.space()[1] >> 12,
            disk,
        )
        if disk is not None:
            flight.disturbed = disk.disturbed
        self.flying[flight.start] = flight
        if self.trace is not None:
            self.trace(f"{flight.began:10.4f} {flight.start:6d} > {kind} {what}")
        return flight

    def land(self, flight: Flight, error: Exception | None = None) -> bool:
        """The command was answered. False: it is of a process that is gone."""
        if flight.life != self.life:
            return False
        if self.flying.pop(flight.start, None) is None:
            self.note(Wrong(f"{flight.kind} {flight.what} was answered twice"))
            return False
        self.tally.operations += 1
        self.tally.kinds[flight.kind] += 1
        self.tally.refused += error is not None
        if self.trace is not None:
            text = "" if error is None else f": {type(error).__name__}: {error}"
            self.trace(
                f"{self.seconds():10.4f} {self.moment:6d} < {flight.kind} {flight.start}{text}"
            )
        self.landed.set()
        return True

    def note(self, wrong: Exception) -> None:
        """Something is wrong: the first finding counts."""
        if self.wrong is None:
            self.wrong = wrong
        self.landed.set()

    def guarded(self, answer: Callable[..., None]) -> Callable[..., None]:
        """A completion that keeps what it finds wrong from the store, which would only hide it."""

        def completion(*arguments: Any) -> None:
            try:
                answer(*arguments)
            except Exception as error:
                self.note(error)

        return completion

    def start_task(self, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                self.note(error)

        task = asyncio.get_running_loop().create_task(guarded())
        self.tasks.add(task)
        task.add_done_callback(self.task_ended)
        task.add_done_callback(lambda _: work.close())  # a process may be killed before it began

    def task_ended(self, task: "asyncio.Task[None]") -> None:
        self.tasks.discard(task)
        self.landed.set()

    def settle(self) -> None:
        """End of a wake-up: volumes carry out what they were given, and the receive buffer is used
        again.
        """
        volumes, self.unsettled = self.unsettled, {}
        for volume in volumes:
            volume.settle()
        for buffer in self.buffers:
            buffer[:] = b"\xee" * len(buffer)
        self.buffers.clear()

    # --- What may be refused ----------------------------------------------------------------------

    def judge(self, flight: Flight, error: Exception) -> None:
        """Raise Wrong if nothing that happened explains this refusal."""
        if self.explained(flight, error):
            return
        raise Wrong(
            f"{flight.kind} {flight.what} was refused: {type(error).__name__}: {error}"
        ) from error

    def explained(self, flight: Flight, error: Exception) -> bool:
        failed = self.device.failures > flight.failures
        disk = flight.disk
        if isinstance(error, BlockDamaged):
            return False
        if isinstance(error, DeviceFailed):
            return failed or self.read_only or self.closing
        if isinstance(error, PoolReadOnly):
            return (self.read_only and self.device.failures > 0) or (
                disk is not None and disk.is_snapshot
            )
        if isinstance(error, VolumeClosed | OutOfRange):
            return self.closing or (
                disk is not None
                and (
                    disk.disturbed != flight.disturbed or disk.exclusive or disk.marked or disk.gone
                )
            )
        if isinstance(error, PoolFull):
            return flight.available < SHORT_BLOCKS or self.is_short()
        return False

    def is_short(self) -> bool:
        """Whether the pool has so little room that what needs some may be refused."""
        return self.pool.space()[1] >> 12 < SHORT_BLOCKS

    @property
    def stopped(self) -> bool:
        """There is nothing more to be done in this life."""
        return self.wrong is not None or self.read_only

    @property
    def read_only(self) -> bool:
        return self.pool._state.read_only_reason is not None

    def on_event(self, event: str, **fields: Any) -> None:
        if self.trace is not None:
            self.trace(f"{self.seconds():10.4f} {self.moment:6d}   * {event} {fields}")
        if event == "block.damaged":
            self.note(Wrong(f"the store says block.damaged, and nothing was: {fields}"))
        self.reclaim_failed |= event == "reclaim.failed"
        if event in {"reclaim.failed", "split.lost", "log.damaged"} and not self.device.failures:
            self.note(Wrong(f"the store says {event}: {fields}"))
        if event == "pool.read_only" and not self.device.failures:
            self.note(Wrong(f"the pool went read-only, and nothing had failed: {fields}"))

    # --- Waiting ----------------------------------------------------------------------------------

    async def drain(self, below: int = 1) -> None:
        """Wait until fewer than ``below`` commands are under way."""
        self.settle()
        while (len(self.flying) >= below or (below == 1 and self.tasks)) and self.wrong is None:
            self.landed.clear()
            try:
                await asyncio.wait_for(self.landed.wait(), PATIENCE_SECONDS)
            except TimeoutError:
                if self.trace is not None:
                    self.trace(self.waiting())
                if not self.flying:
                    raise Wrong(f"{self.tasks} do not end") from None
                oldest = next(iter(self.flying.values()))
                raise Wrong(
                    f"{oldest.kind} {oldest.what} was not answered in"
                    f" {self.seconds() - oldest.began:.0f} s"
                ) from None
        if self.wrong is not None:
            raise self.wrong

    def waiting(self) -> str:
        """Where all tasks stand, for who looks into a hang."""
        found = []
        for task in asyncio.all_tasks():
            frames: list[str] = []
            coroutine: Any = task.get_coro()
            while getattr(coroutine, "cr_frame", None) is not None:
                frames.append(f"{coroutine.__qualname__}:{coroutine.cr_frame.f_lineno}")
                coroutine = coroutine.cr_await
            found.append(" > ".join(frames))
        return "\n".join(sorted(found))

    async def patiently(self, what: str, work: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.get_running_loop().create_task(work)
        try:
            return await asyncio.wait_for(asyncio.shield(task), PATIENCE_SECONDS)
        except TimeoutError:
            if self.trace is not None:
                self.trace(self.waiting())
            raise Wrong(f"{what} did not end in {PATIENCE_SECONDS:.0f} s") from None

    # --- Running ----------------------------------------------------------------------------------

    async def run(self) -> Tally:
        """Carry the plan out. Raises Wrong, or whatever else the store lets out."""
        await self.lives.format()
        await self.lives.open()
        for operation in self.plan.operations:
            await self.step(operation)
            if self.wrong is not None:
                raise self.wrong
        await self.lives.finish()
        return self.tally

    async def step(self, operation: Operation) -> None:
        if self.read_only:
            await self.lives.crash(power=bool(operation.a & 1))
        kind = operation.kind
        if kind in plans.DATA:
            self.data.begin(operation)
        elif kind in plans.ADMIN:
            self.admin.begin(operation)
        else:
            await self.lives.control(operation)
        if operation.pause:
            self.settle()
            await asyncio.sleep(operation.pause)
        elif operation.c & 3 == 0:
            self.settle()
        if len(self.flying) >= self.plan.depth:
            await self.drain(self.plan.depth)

    def trouble(self, operation: Operation) -> None:
        """The device fails for a while."""
        trouble = self.device.trouble
        match operation.a % 8:
            case 0 | 1 | 2:
                trouble.reads += 1 + operation.b % 3
            case 3 | 4:
                trouble.writes += 1 + operation.b % 2
            case 5 | 6:
                trouble.full += 1 + operation.b % 4
            case _:
                trouble.syncs += 1

    def no_trouble(self) -> None:
        self.device.trouble = Trouble()


# --- Around it ------------------------------------------------------------------------------------


def carry_out(
    plan: Plan, trace: Callable[[str], None] | None = None
) -> tuple[Tally, Exception | None]:
    """Run one plan; what it did, and what it found wrong."""
    collecting = gc.isenabled()
    gc.disable()
    loop = Loop()
    session: Session | None = None
    wrong: Exception | None = None
    try:
        with circumstances(plan, loop):
            asyncio.set_event_loop(loop)
            session = Session(plan, trace)
            loop.set_exception_handler(lambda _, context: session.note(unretrieved(context)))
            try:
                loop.run_until_complete(session.run())
            except Exception as error:
                wrong = error
            else:
                gc.collect()
                wrong = session.wrong
            session.life += 1
            loop.run_until_complete(end_all_tasks())
    finally:
        asyncio.set_event_loop(None)
        loop.close()
        if collecting:
            gc.enable()
    assert session is not None
    return session.tally, wrong


def unretrieved(context: dict[str, Any]) -> Wrong:
    """What the loop was told of: an exception that nobody took, a task that was destroyed."""
    wrong = Wrong(f"the loop says: {context['message']}")
    wrong.__cause__ = context.get("exception")
    return wrong
