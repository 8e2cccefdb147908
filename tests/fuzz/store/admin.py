"""What administrators do, at the same time as clients. Each change is one `Change`: made when it
was answered, not made when it was refused, and after a crash whichever the pool's list shows.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.errors import BlockDamaged, Conflict, NotFound, PoolFull, StorageError, VolumeClosed
from tests.fuzz.store import plan as plans
from tests.fuzz.store.oracle import BLOCK_BYTES, SECTORS, Judge, Moment, Write, Wrong, values_of
from tests.fuzz.store.plan import Operation
from tests.fuzz.store.world import DEPTH_MAX, SNAPSHOTS, Disk

if TYPE_CHECKING:
    from tests.fuzz.store.session import Flight, Session

SNAPSHOTS_MAX = 14


@dataclass(frozen=True)
class Listed:
    """What a pool is found to hold: sizes of vdisks in blocks, full names of snapshots."""

    vdisks: dict[str, int]
    snapshots: set[str]


@dataclass(eq=False)
class Change:
    """A change of the table that is under way. ``made`` and ``not_made`` are told whether a crash
    has ended it.
    """

    flight: "Flight"
    shows: Callable[[Listed], bool]
    made: Callable[[bool], None]
    not_made: Callable[[bool], None]


def nothing(_: bool) -> None:
    """Nobody needs to know."""


class Admin:
    """Begins admin commands of a session."""

    def __init__(self, session: "Session") -> None:
        self.session = session
        self.changes: dict[Change, None] = {}
        self.configuring = False

    def begin(self, operation: Operation) -> None:
        getattr(self, operation.kind.replace("-", "_"))(operation)

    # --- Carrying out -----------------------------------------------------------------------------

    def carry_out(
        self,
        change: Change,
        call: Callable[[], Awaitable[Any]],
        allowed: Callable[[StorageError], bool],
    ) -> None:
        """Await ``call`` in a task of its own. ``allowed``: refusals that the state explains,
        beside those that always may be.
        """
        self.changes[change] = None

        async def work() -> None:
            try:
                answer = await call()
            except StorageError as error:
                if self.session.land(change.flight, error):
                    if self.session.read_only and self.session.device.failures:
                        # Its superblock may have reached the device, though its sync failed: the
                        # next opening shows it.
                        return
                    del self.changes[change]
                    change.not_made(False)
                    if not allowed(error):
                        self.judge(change.flight, error)
                return
            if self.session.land(change.flight):
                del self.changes[change]
                change.made(False)
                if callable(answer):
                    await answer()

        self.session.start_task(work())

    def judge(self, flight: "Flight", error: StorageError) -> None:
        """Refusals that nothing explains are wrong."""
        if not (isinstance(error, VolumeClosed) and self.session.closing):
            self.session.judge(flight, error)

    def disk(self, number: int) -> Disk | None:
        disks = [disk for disk in self.session.world.vdisks.values() if not disk.exclusive]
        return disks[number % len(disks)] if disks else None

    def size(self, number: int) -> int:
        plan = self.session.plan
        reach = plan.leaves * plan.stride * 256
        return (1, 7, 200, 256, 257, 600, 3000, reach, reach, reach, reach + 5, max(1, reach // 2))[
            number % 12
        ]

    def sharing(self, *disks: Disk) -> Callable[[bool], None]:
        """Nobody changes these meanwhile; call what is returned at the end."""
        for disk in disks:
            disk.shared += 1

        def end(_: bool) -> None:
            for disk in disks:
                disk.shared -= 1

        return end

    # --- Vdisks -----------------------------------------------------------------------------------

    def create(self, operation: Operation) -> None:
        session, world = self.session, self.session.world
        if operation.c % 20 == 0 and world.vdisks:
            self.create_twice(operation)
            return
        name = world.free_name(operation.a)
        if name is None:
            return
        size = self.size(operation.b)
        flight = session.begin(plans.CREATE, f"{name} of {size} blocks")
        world.promised.add(name)

        def made(_: bool) -> None:
            world.promised.discard(name)
            world.vdisks[name] = Disk(name, size)

        change = Change(
            flight,
            lambda listed: name in listed.vdisks,
            made,
            lambda _: world.promised.discard(name),
        )
        self.carry_out(
            change, lambda: session.pool.vdisk_create(name, size * BLOCK_BYTES), lambda _: False
        )

    def create_twice(self, operation: Operation) -> None:
        disk = self.disk(operation.a)
        if disk is None:
            return
        flight = self.session.begin(plans.CREATE, f"{disk.name} again")
        end = self.sharing(disk)

        def made(crashed: bool) -> None:
            end(crashed)
            if not crashed:
                raise Wrong(f"a second {disk.name} was created")

        change = Change(flight, lambda _: False, made, end)
        self.carry_out(
            change,
            lambda: self.session.pool.vdisk_create(disk.name, 4096),
            lambda error: isinstance(error, Conflict),
        )

    def delete(self, operation: Operation) -> None:
        session, world = self.session, self.session.world
        disk = self.disk(operation.a)
        if disk is None or not disk.claim():
            return
        flight = session.begin(plans.DELETE, disk.name, disk)
        name, kept = disk.name, world.snapshots_of(disk)
        disk.disturbed += 1

        def made(crashed: bool) -> None:
            if [snapshot for snapshot in kept if not snapshot.gone and not snapshot.marked]:
                raise Wrong(f"{name} was deleted, though it has snapshots")
            for snapshot in [snapshot for snapshot in kept if not snapshot.gone]:
                world.forget(snapshot)
            world.forget(disk)

        def not_made(_: bool) -> None:
            disk.exclusive = False
            disk.disturbed += 1

        change = Change(flight, lambda listed: name not in listed.vdisks, made, not_made)
        self.carry_out(
            change,
            lambda: session.pool.vdisk_delete(name),
            lambda error: bool(kept) and isinstance(error, Conflict),
        )

    def rename(self, operation: Operation) -> None:
        session, world = self.session, self.session.world
        disk, new = self.disk(operation.a), world.free_name(operation.b)
        if disk is None or new is None or not disk.claim():
            return
        old = disk.name
        flight = session.begin(plans.RENAME, f"{old} to {new}", disk)
        world.promised.add(new)

        def made(_: bool) -> None:
            del world.vdisks[old]
            disk.name = new
            world.vdisks[new] = disk
            not_made(True)

        def not_made(_: bool) -> None:
            world.promised.discard(new)
            disk.exclusive = False

        change = Change(flight, lambda listed: new in listed.vdisks, made, not_made)
        self.carry_out(change, lambda: session.pool.vdisk_rename(old, new), lambda _: False)

    def resize(self, operation: Operation) -> None:
        session = self.session
        disk = self.disk(operation.a)
        size = self.size(operation.b)
        if disk is None or size == disk.size_blocks or not disk.claim():
            return
        flight = session.begin(
            plans.RESIZE, f"{disk.name} from {disk.size_blocks} to {size} blocks", disk
        )
        disk.disturbed += 1
        cut: Write | None = None
        if size < disk.size_blocks:
            cut = Write(next(session.versions), flight.start, f"shrinking {flight.start}")
            disk.begin_zero(cut, size * SECTORS, disk.size_blocks * SECTORS)

        def end(crashed: bool, outcome: str) -> None:
            disk.exclusive = False
            disk.disturbed += 1
            if cut is not None and not crashed:
                disk.end_write(cut, session.now(), outcome, outcome == "done")

        def made(crashed: bool) -> None:
            end(crashed, "done")
            disk.resized(size, cut)

        def not_made(crashed: bool) -> None:
            end(crashed, "unknown")

        def allowed(error: StorageError) -> bool:
            if isinstance(error, PoolFull) and cut is not None and not session.shared_ever:
                raise Wrong(
                    f"shrinking {disk.name}, nothing of which is shared, was refused: {error}"
                )
            return False

        change = Change(flight, lambda listed: listed.vdisks.get(disk.name) == size, made, not_made)
        self.carry_out(
            change, lambda: session.pool.vdisk_resize(disk.name, size * BLOCK_BYTES), allowed
        )

    # --- Snapshots and clones ---------------------------------------------------------------------

    def snapshot(self, operation: Operation) -> None:
        session, world = self.session, self.session.world
        chosen = list(
            dict.fromkeys(
                filter(
                    None,
                    (self.disk(operation.a), self.disk(operation.b), self.disk(operation.a >> 8)),
                )
            )
        )
        disks = chosen[: 1 + operation.c % 3]
        name = SNAPSHOTS[(operation.c >> 2) % len(SNAPSHOTS)]
        taken = {snapshot.full_name for snapshot in world.snapshots} | world.promised
        names = [f"{disk.name}@{name}" for disk in disks]
        if not disks or len(world.snapshots) > SNAPSHOTS_MAX or taken.intersection(names):
            return
        flight = session.begin(plans.SNAPSHOT, ", ".join(names))
        session.shared_ever = True
        world.promised.update(names)
        moment = Moment(flight.start)
        takings = [disk.begin_taking(moment) for disk in disks]
        end_sharing = self.sharing(*disks)
        snapshots: list[Disk] = []

        def made(crashed: bool) -> None:
            moment.latest = session.now()
            for disk, taking in zip(disks, takings, strict=True):
                snapshot = Disk(name, taking.size_blocks, origin=disk, backing=disk.backing)
                snapshot.take_over(disk, taking)
                snapshot.splitting = disk.splitting
                snapshots.append(snapshot)
                world.snapshots.append(snapshot)
            end_sharing(crashed)
            world.promised.difference_update(names)

        def not_made(crashed: bool) -> None:
            for disk, taking in zip(disks, takings, strict=True):
                disk.stop_taking(taking)
            end_sharing(crashed)
            world.promised.difference_update(names)

        async def call() -> Callable[[], Awaitable[None]]:
            await session.pool.snapshot_create([(disk.name, name) for disk in disks])
            return lambda: self.look_at(snapshots)

        def shows(listed: Listed) -> bool:
            there = listed.snapshots.intersection(names)
            if there and len(there) < len(names):
                raise Wrong(f"of a group of snapshots, {names}, only {there} are there")
            return bool(there)

        self.carry_out(Change(flight, shows, made, not_made), call, lambda _: False)

    async def look_at(self, snapshots: list[Disk]) -> None:
        """Find out what a snapshot holds that was taken while writes were under way: all of one
        moment, and that of its whole group.
        """
        life = self.session.life
        for snapshot in snapshots:
            snapshot.forget_beyond()
            for fbn in sorted(snapshot.unsettled):
                while fbn in snapshot.unsettled:
                    found = await self.read_block(snapshot, fbn)
                    if self.session.life != life or snapshot.gone or found is None:
                        return
                    judge = Judge(snapshot, "a new snapshot")
                    judge.block(fbn, values_of(snapshot.cells[fbn]), found)
                    snapshot.set(fbn, found)

    async def read_block(self, disk: Disk, fbn: int) -> bytes | None:
        """A block, tried again while the device is in trouble; None when the snapshot is on its way
        out.
        """
        for _ in range(20):
            volume = self.session.data.volume(disk)
            if volume is None or disk.gone or self.session.closing or self.session.read_only:
                return None
            answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

            def answered(
                found: Any, error: Exception | None, answer: "asyncio.Future[bytes | None]" = answer
            ) -> None:
                if isinstance(error, BlockDamaged):
                    self.session.note(Wrong(f"{disk.full_name} cannot be read: {error}"))
                if not answer.done():
                    answer.set_result(None if error is not None else bytes(found))

            volume.read(fbn * BLOCK_BYTES, BLOCK_BYTES, answered)
            found = await answer
            if found is not None:
                return found
            await asyncio.sleep(0.01)
        return None

    def snapshot_rm(self, operation: Operation) -> None:
        session, world = self.session, self.session.world
        found = [
            snapshot
            for snapshot in world.snapshots
            if snapshot.origin is not None and not snapshot.origin.exclusive
        ]
        if not found:
            return
        snapshot = found[operation.a % len(found)]
        origin = snapshot.origin
        assert origin is not None
        if not snapshot.claim():
            return
        after_split = operation.b % 3 == 0
        full_name, was_marked = snapshot.full_name, snapshot.marked
        flight = session.begin(
            plans.SNAPSHOT_RM, full_name + (" after split" if after_split else ""), snapshot
        )
        end_sharing = self.sharing(origin)
        snapshot.disturbed += 1
        stood_on = bool(world.standing_on(snapshot))
        gone = [False]

        def made(crashed: bool) -> None:
            not_made(crashed)
            if gone[0] or crashed:
                standing = [disk.full_name for disk in world.surely_standing_on(snapshot)]
                if standing:
                    raise Wrong(f"{full_name} was deleted, though {standing} stand on it")
                if not snapshot.gone:
                    world.forget(snapshot)
            elif not snapshot.gone:
                snapshot.marked = True

        def not_made(crashed: bool) -> None:
            snapshot.exclusive = False
            snapshot.disturbed += 1
            end_sharing(crashed)
            snapshot.marked |= crashed and after_split

        async def call() -> None:
            gone[0] = await session.pool.snapshot_delete(origin.name, snapshot.name, after_split)
            if not gone[0] and not after_split:
                raise Wrong(f"{full_name} was said to be deleted, and not to be gone")

        def allowed(error: StorageError) -> bool:
            return (isinstance(error, Conflict) and stood_on) or (
                isinstance(error, NotFound) and was_marked
            )

        self.carry_out(
            Change(flight, lambda listed: full_name not in listed.snapshots, made, not_made),
            call,
            allowed,
        )

    def clone(self, operation: Operation) -> None:
        session, world = self.session, self.session.world
        found = [
            snapshot
            for snapshot in world.snapshots
            if snapshot.origin is not None
            and not snapshot.origin.exclusive
            and not snapshot.exclusive
            and not snapshot.unsettled
            and snapshot.depth < DEPTH_MAX
        ]
        name = world.free_name(operation.b)
        if not found or name is None:
            return
        deep = max(found, key=lambda snapshot: snapshot.depth)
        snapshot = deep if operation.c & 1 else found[operation.a % len(found)]
        origin = snapshot.origin
        assert origin is not None
        flight = session.begin(plans.CLONE, f"{snapshot.full_name} as {name}")
        world.promised.add(name)
        end_sharing = self.sharing(origin, snapshot)
        was_marked = snapshot.marked

        def made(crashed: bool) -> None:
            not_made(crashed)
            world.vdisks[name] = Disk(
                name, snapshot.size_blocks, dict(snapshot.cells), backing=snapshot
            )

        def not_made(crashed: bool) -> None:
            world.promised.discard(name)
            end_sharing(crashed)

        change = Change(flight, lambda listed: name in listed.vdisks, made, not_made)
        call = lambda: session.pool.clone_create(origin.name, snapshot.name, name)  # noqa: E731
        self.carry_out(change, call, lambda error: isinstance(error, NotFound) and was_marked)

    # --- Splits -----------------------------------------------------------------------------------

    def split_command(self, kind: str, disk: Disk, call: Callable[[], Awaitable[Any]]) -> None:
        flight = self.session.begin(kind, disk.name, disk)
        end = self.sharing(disk)

        async def without_answer() -> None:
            await call()

        change = Change(flight, lambda _: True, end, end)
        self.carry_out(change, without_answer, lambda error: isinstance(error, Conflict | NotFound))

    def clone_of(self, number: int) -> Disk | None:
        disks = [
            disk
            for disk in self.session.world.vdisks.values()
            if disk.backing is not None and not disk.exclusive
        ]
        return disks[number % len(disks)] if disks else None

    def split(self, operation: Operation) -> None:
        disk = self.clone_of(operation.a)
        if disk is not None:
            self.start_split(disk, operation)

    def start_split(self, disk: Disk, operation: Operation) -> None:
        pool = self.session.pool
        disk.splitting = disk.use_unknown = True
        mode = ("copy", "share")[operation.b & 1]
        rate = (operation.b >> 2 & 3) == 0
        self.session.shared_ever = True
        self.split_command(
            plans.START,
            disk,
            lambda: pool.split_start(disk.name, mode, None, 4 << 20 if rate else None),
        )

    def pause(self, operation: Operation) -> None:
        disk, pool = self.clone_of(operation.a), self.session.pool
        if disk is not None:
            self.split_command(plans.PAUSE, disk, lambda: pool.split_pause(disk.name))

    def resume(self, operation: Operation) -> None:
        disk, pool = self.clone_of(operation.a), self.session.pool
        if disk is not None:
            self.split_command(plans.RESUME, disk, lambda: pool.split_resume(disk.name))

    def cancel(self, operation: Operation) -> None:
        disk, pool = self.clone_of(operation.a), self.session.pool
        if disk is not None:
            self.split_command(plans.CANCEL, disk, lambda: pool.split_cancel(disk.name))

    def estimate(self, operation: Operation) -> None:
        disk, pool = self.clone_of(operation.a), self.session.pool
        if disk is not None:
            self.split_command(plans.ESTIMATE, disk, lambda: pool.split_estimate(disk.name))

    # --- Looking ----------------------------------------------------------------------------------

    def show(self, operation: Operation) -> None:
        disk, pool = self.disk(operation.a), self.session.pool
        if disk is None:
            return
        flight = self.session.begin(plans.SHOW, disk.name, disk)
        end = self.sharing(disk)

        async def call() -> None:
            shown = await pool.vdisk_show(disk.name)
            if shown["size_bytes"] != disk.size_blocks * BLOCK_BYTES:
                raise Wrong(
                    f"{disk.name} is shown with {shown['size_bytes']} bytes, and has"
                    f" {disk.size_blocks} blocks"
                )

        self.carry_out(Change(flight, lambda _: True, end, end), call, lambda _: False)

    def list(self, operation: Operation) -> None:
        session, world = self.session, self.session.world
        flight = session.begin(plans.LIST, "")
        before = world.sure_names()

        async def call() -> None:
            rows = [*await session.pool.vdisk_list(), *await session.pool.snapshot_list()]
            names = {row["name"] for row in rows}
            after = world.sure_names()
            missing = before & after - names
            if missing:
                raise Wrong(f"lists lack {sorted(missing)}")

        self.carry_out(Change(flight, lambda _: True, nothing, nothing), call, lambda _: False)

    def check(self, operation: Operation) -> None:
        session = self.session
        flight = session.begin(plans.CHECK, "")

        async def call() -> None:
            report = await session.pool.check(verify_data=True)
            session.tally.checks += 1
            if (
                not report["ok"]
                and session.device.failures == flight.failures
                and not session.closing
            ):
                raise Wrong(f"the check says: {report['errors'][:3]}")

        self.carry_out(
            Change(flight, lambda _: True, nothing, nothing),
            call,
            lambda error: isinstance(error, Conflict),
        )

    def scrub(self, operation: Operation) -> None:
        session = self.session
        flight = session.begin(plans.SCRUB, "")

        async def call() -> None:
            await session.pool.scrub_start(None if operation.a & 1 else 16 << 20)

        self.carry_out(
            Change(flight, lambda _: True, nothing, nothing),
            call,
            lambda error: isinstance(error, Conflict),
        )

    def configure(self, operation: Operation) -> None:
        session = self.session
        if self.configuring:
            return
        self.configuring = True
        value = bytes([1 + operation.a % 255]) * (operation.b % (20000 if operation.c & 1 else 200))
        flight = session.begin(plans.CONFIGURE, f"{len(value)} bytes")
        session.configured.add(value)

        def made(crashed: bool) -> None:
            self.configuring = False
            if not crashed:
                session.configured = {value}

        def not_made(_: bool) -> None:
            self.configuring = False

        change = Change(flight, lambda _: False, made, not_made)
        self.carry_out(change, lambda: session.pool.configure("fuzz", value), lambda _: False)

    def point(self, operation: Operation) -> None:
        session = self.session
        flight = session.begin(plans.POINT, "")

        def made(crashed: bool) -> None:
            if not crashed:
                session.tally.points += 1
                for disk in session.world.vdisks.values():
                    disk.flushed(flight.start)

        change = Change(flight, lambda _: False, made, nothing)
        self.carry_out(change, session.pool.consistency_point, lambda _: False)
