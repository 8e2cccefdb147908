"""Begins and ends of a pool's lives, and the looks at everything: after a crash, when nothing is
under way, and at the end.
"""

import asyncio
import gc
from typing import TYPE_CHECKING, Any

from storage.check import check_device
from storage.errors import Conflict, PoolFull, StorageError, VolumeClosed
from storage.pool import Pool
from tests.fuzz.store import plan as plans
from tests.fuzz.store.admin import Listed
from tests.fuzz.store.circumstances import cache_bytes, end_all_tasks
from tests.fuzz.store.device import FuzzDevice, Manner
from tests.fuzz.store.oracle import (
    ALL,
    BLOCK_BYTES,
    FOREVER,
    SECTORS,
    ZEROS,
    Judge,
    Wrong,
    runs_of,
    values_of,
)
from tests.fuzz.store.plan import Operation
from tests.fuzz.store.world import Disk

if TYPE_CHECKING:
    from tests.fuzz.store.session import Session

# A pool that is emptied may keep this much more than a new one: pointer blocks of the table and of
# maps that were empty.
GROWN_BLOCKS = 24
REFUSED_WRITES = 12


class Lives:
    """Opens, closes, kills and compares for a session."""

    def __init__(self, session: "Session") -> None:
        self.session = session
        self.empty_bytes = 0

    # --- Begin and end ----------------------------------------------------------------------------

    async def format(self) -> None:
        session = self.session
        session.device = FuzzDevice(
            session.plan.pool_bytes, {}, session.random.getrandbits(32), Manner(at_once=1.0)
        )
        await session.patiently("formatting", Pool.format(session.device))
        await session.device.sync()
        session.device.close()

    def next_device(self, pages: dict[int, bytes]) -> None:
        session = self.session
        session.device = FuzzDevice(
            session.plan.pool_bytes, pages, session.random.getrandbits(32), session.plan.manner
        )

    async def open(self) -> None:
        """Open what the last life left; sometimes the power goes, or the process dies, while that
        is under way.
        """
        session = self.session
        self.next_device(session.device.pages)
        session.reclaim_failed = False
        while session.random.random() < 0.15 and session.tally.openings:
            opening = asyncio.get_running_loop().create_task(
                Pool.open_on(session.device, cache_bytes(session.plan), session.on_event)
            )
            await asyncio.sleep(session.random.random() * 0.05)
            if opening.done():
                session.pool = opening.result()
                break
            power = session.random.random() < 0.5
            pages = (
                session.device.after_power_loss(session.random)
                if power
                else session.device.after_kill(session.random)
            )
            await end_all_tasks()
            self.next_device(pages)
        else:
            opening_now = Pool.open_on(session.device, cache_bytes(session.plan), session.on_event)
            session.pool = await session.patiently("opening", opening_now)
        session.tally.openings += 1
        if not self.empty_bytes:
            self.empty_bytes = session.pool.show()["used_bytes"]

    async def crash(self, power: bool) -> None:
        """The process dies, or the power goes, whatever is under way; then everything
        is looked at.
        """
        session = self.session
        if session.trace is not None:
            session.trace(
                f"{session.seconds():10.4f} {session.moment:6d} = {'power' if power else 'kill'}"
            )
        session.settle()
        session.life += 1
        pages = (
            session.device.after_power_loss(session.random)
            if power
            else session.device.after_kill(session.random)
        )
        session.device.pages = pages
        await end_all_tasks()
        session.tally.power_losses += power
        session.tally.kills += not power
        await self.reopened(power)

    async def reopened(self, power: bool) -> None:
        session = self.session
        changes, session.admin.changes = list(session.admin.changes), {}
        session.flying.clear()
        session.tasks.clear()
        session.unsettled.clear()
        session.copies.clear()
        session.closing = False
        now = session.now()
        for disk in session.world.all():
            disk.crashed(now, power)
            disk.volume = None
            disk.disturbed += 1
        gc.collect()
        await self.open()
        listed = await self.listed()
        for change in changes:
            (change.made if change.shows(listed) else change.not_made)(True)
        await self.compare_names()
        if session.pool.configuration("fuzz") not in session.configured:
            raise Wrong("the configuration is none of those that were stored")
        session.configured = {session.pool.configuration("fuzz")}
        await self.compare(session.world.all(), "after a crash")
        if session.random.random() < 0.6:
            await self.check()

    async def reopen(self) -> None:
        """An orderly stop, with commands under way, and a start."""
        session = self.session
        session.settle()
        session.closing = True
        await self.close()
        session.life += 1
        if not session.device.failures:
            for disk in session.world.vdisks.values():
                disk.flushed(FOREVER)
        await self.reopened(power=False)

    async def close(self) -> None:
        session = self.session
        await session.patiently("closing", session.pool.close())
        await session.drain()
        stray = [
            task
            for task in asyncio.all_tasks()
            if task is not asyncio.current_task() and task not in session.tasks
        ]
        if stray:
            raise Wrong(f"tasks are left by a closed pool: {stray[:3]}")
        held = session.pool._state.cache.held
        if held:
            raise Wrong(f"{held} nodes are held in memory by a closed pool")
        if not session.device.failures:
            report = check_device(session.device, verify_data=True)  # type: ignore[arg-type]
            if not report.ok:
                raise Wrong(f"the offline check of a closed pool says: {report.errors[:3]}")

    # --- Looking at everything --------------------------------------------------------------------

    async def listed(self) -> Listed:
        pool = self.session.pool
        vdisks = {row["name"]: row["size_bytes"] // BLOCK_BYTES for row in await pool.vdisk_list()}
        return Listed(vdisks, {row["name"] for row in await pool.snapshot_list()})

    async def compare_names(self) -> None:
        """Names, sizes and backing stores are those that were acknowledged."""
        session, world = self.session, self.session.world
        rows = {
            row["name"]: row
            for row in [*await session.pool.vdisk_list(), *await session.pool.snapshot_list()]
        }
        while gone := [
            one
            for one in world.unsure()
            if one.full_name not in rows and not world.surely_standing_on(one)
        ]:
            for snapshot in gone:  # and then perhaps the one behind it
                world.forget(snapshot)
        known = {disk.full_name: disk for disk in world.all()}
        if known.keys() != rows.keys():
            raise Wrong(
                f"missing: {sorted(known.keys() - rows.keys())}, and not expected:"
                f" {sorted(rows.keys() - known.keys())}"
            )
        for name, disk in known.items():
            if rows[name]["size_bytes"] != disk.size_blocks * BLOCK_BYTES:
                raise Wrong(
                    f"{name} has {rows[name]['size_bytes']} bytes, not {disk.size_blocks} blocks"
                )
            backing = rows[name]["backing"]
            expected = disk.backing.full_name if disk.backing is not None else None
            if backing != expected and not (backing is None and disk.splitting):
                raise Wrong(f"{name} stands on {backing}, not on {expected}")
            if backing is None:
                disk.backing = None
            if disk.is_snapshot:
                disk.splitting = False

    async def compare(self, disks: list[Disk], when: str, durable: bool = True) -> None:
        """Everything that these hold, and something beside it, is what may be there; if it is
        durable, it is known from now on.
        """
        beside = (
            self.session.random.sample(blocks, min(10, len(blocks)))
            if (blocks := sorted(self.session.world.blocks()))
            else []
        )
        for disk in disks:
            disk.forget_beyond()
            judge = Judge(disk, when)
            wanted = sorted(
                {
                    *disk.cells,
                    *(fbn for fbn in (0, disk.size_blocks - 1, *beside) if fbn < disk.size_blocks),
                }
            )
            for first, count in runs_of(wanted):
                found = await self.read(disk, first, count)
                if found is None:
                    break  # the last that stood on it has just gone
                for step in range(count):
                    block = found[step * BLOCK_BYTES : (step + 1) * BLOCK_BYTES]
                    cell = disk.cells.get(first + step, ZEROS)
                    if cell == block:
                        continue
                    judge.block(first + step, values_of(cell), block, ALL)
                    if durable or disk.is_snapshot:
                        disk.set(first + step, block)
            judge.end()

    async def read(self, disk: Disk, first: int, count: int) -> bytes | None:
        session = self.session
        volume = session.data.volume(disk)
        if volume is None and disk.marked:
            return None
        if volume is None:
            raise Wrong(f"{disk.full_name} is not found")
        try:
            found = volume.try_read(first * BLOCK_BYTES, count * BLOCK_BYTES)
        except VolumeClosed:
            found = None
        if found is not None:
            return bytes(found)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        volume.read(
            first * BLOCK_BYTES,
            count * BLOCK_BYTES,
            lambda found, error: answer.set_result((found, error)),
        )
        data, error = await session.patiently(f"reading {disk.full_name}", as_coroutine(answer))
        if isinstance(error, VolumeClosed) and disk.marked:
            return None
        if error is not None:
            raise Wrong(
                f"blocks {first}+{count} of {disk.full_name} cannot be read:"
                f" {type(error).__name__}: {error}"
            ) from error
        return bytes(data)

    async def check(self) -> None:
        session = self.session
        if session.read_only:
            return
        try:
            report = await session.patiently("the check", session.pool.check(verify_data=True))
        except Conflict as error:
            # It gives up what it keeps from reuse where others need that: on a full pool.
            if not session.is_short():
                raise Wrong(f"the check was ended: {error}") from error
            return
        session.tally.checks += 1
        if not report["ok"]:
            raise Wrong(f"the check says: {report['errors'][:3]}")

    # --- At rest ----------------------------------------------------------------------------------

    async def quiet(self, everything: bool = True) -> None:
        """Nothing is under way: all is as it was acknowledged, counts included."""
        session = self.session
        session.no_trouble()
        await session.drain()
        if session.read_only:
            await self.crash(power=False)
            return
        await self.compare_names()
        disks = session.world.all()
        if not everything and len(disks) > 4:
            disks = session.random.sample(disks, 4)
        durable = session.random.random() < 0.5
        if durable:
            await self.point()
        await self.compare(disks, "at rest", durable)
        await self.compare_counts(disks)

    async def compare_counts(self, disks: list[Disk]) -> None:
        """A vdisk that never was a clone uses the blocks that are not zeros, and reports those."""
        for disk in disks:
            if disk.backing is not None or disk.use_unknown or disk.unsettled:
                continue
            volume = self.session.data.volume(disk)
            if volume is None:
                continue  # a marked snapshot that went when the last split had ended
            used = volume.usage().used_bytes // BLOCK_BYTES
            if used != len(disk.cells):
                raise Wrong(
                    f"{disk.full_name} is said to use {used} blocks, and has {len(disk.cells)}"
                )

    # --- Control ----------------------------------------------------------------------------------

    async def control(self, operation: Operation) -> None:
        session = self.session
        match operation.kind:
            case plans.KILL | plans.POWER:
                await self.crash(operation.kind == plans.POWER)
            case plans.REOPEN:
                session.no_trouble()
                await self.reopen()
            case plans.QUIET:
                await self.quiet(operation.a % 4 == 0)
            case plans.TROUBLE:
                session.trouble(operation)
            case plans.FORGET:
                busy = {id(flight.disk) for flight in session.flying.values()}
                for disk in session.world.all():
                    if id(disk) not in busy and not session.copies:
                        disk.volume = None
                gc.collect()
            case plans.SPREAD:
                await self.spread(operation)
            case plans.BURST:
                self.burst(operation)
            case plans.FILL:
                await self.fill(operation)
            case plans.RACE:
                await self.race(operation)
            case plans.SQUEEZE:
                await self.squeeze(operation)

    async def spread(self, operation: Operation) -> None:
        """One block below each of many level-1 blocks."""
        session, plan = self.session, self.session.plan
        disk = session.data.vdisk(operation.a)
        count = plan.leaves if operation.b % 3 == 0 else min(plan.leaves, 40)
        for leaf in range(count):
            if disk is None or disk.gone or session.read_only or session.data.volume(disk) is None:
                return
            fbn = (leaf * plan.stride * 256 + session.spots[0]) % disk.size_blocks
            session.data.write(plans.WRITE, disk, fbn * SECTORS, SECTORS, 1 << 8)
            if len(session.flying) >= plan.depth:
                await session.drain(plan.depth)

    def burst(self, operation: Operation) -> None:
        """Many commands to a few blocks in one wake-up."""
        session = self.session
        for step in range(2 + operation.b % 24):
            kind = (plans.WRITE, plans.PARTIAL, plans.READ, plans.PARTIAL)[
                (operation.c >> step) % 4
            ]
            number = operation.b ^ (step % 3 << 12)
            session.data.begin(
                Operation(
                    kind, 0.0, operation.a & ~3, number, operation.c * 2654435761 + step * 40503
                )
            )

    async def race(self, operation: Operation) -> None:
        """A split, and clients who write, trim and ask just where it works."""
        session, data = self.session, self.session.data
        disk = session.admin.clone_of(operation.a)
        if disk is None or session.read_only or data.volume(disk) is None:
            return
        session.admin.start_split(disk, operation._replace(b=operation.b >> 3))
        blocks = sorted(disk.cells)
        at = operation.b % len(blocks) if blocks else 0
        for step in range(8 + operation.c % 24):
            await asyncio.sleep(session.random.random() * 0.001)
            near = [fbn for fbn in blocks[at : at + 6] if fbn < disk.size_blocks] or [0]
            if session.stopped or data.volume(disk) is None:
                return
            fbn, chance = session.random.choice(near), session.random.getrandbits(32)
            match chance % 8:
                case 0 | 1:
                    data.report(disk, fbn, chance >> 3 if step % 4 else 0)
                case 2:
                    data.zero(plans.UNMAP, disk, fbn, chance >> 3 | 4)
                case 3:
                    data.read(disk, fbn * SECTORS, SECTORS, operation._replace(kind=plans.READ))
                case 4 | 5:
                    data.write(plans.PARTIAL, disk, fbn * SECTORS + 1, 3, 1 << 8)
                case _:
                    data.write(plans.WRITE, disk, fbn * SECTORS, SECTORS, 1 << 8)
            session.settle()
            if len(session.flying) >= session.plan.depth + 4:
                await session.drain(session.plan.depth + 4)

    async def squeeze(self, operation: Operation) -> None:
        """On a pool that is nearly full: slow reads that pin freed blocks, overwrites that free
        some, and snapshots meanwhile.
        """
        session, data = self.session, self.session.data
        if operation.b & 1:
            await self.fill(operation)
        for _ in range(10 + operation.c % 20):
            number = session.random.getrandbits(32)
            disk = data.vdisk(number)
            if disk is None or session.stopped or data.volume(disk) is None:
                return
            drawn = Operation(
                plans.READ,
                0.0,
                number,
                session.random.getrandbits(32),
                session.random.getrandbits(32),
            )
            match number >> 20 & 7:
                case 0:
                    session.admin.snapshot(drawn)
                case 1:
                    session.admin.snapshot_rm(drawn)
                case 2:
                    data.begin(drawn._replace(kind=plans.UNMAP))
                case 3 | 4:
                    blocks = list(disk.cells)
                    fbn = blocks[drawn.b % len(blocks)] if blocks else 0
                    if fbn < disk.size_blocks:
                        data.write(plans.WRITE, disk, fbn * SECTORS, SECTORS, 1 << 8)
                case 5:
                    session.admin.point(drawn)
                case _:
                    data.begin(drawn)
            await asyncio.sleep(session.random.random() * 0.002)
            session.settle()
            if len(session.flying) >= session.plan.depth + 8:
                await session.drain(session.plan.depth + 8)

    async def fill(self, operation: Operation) -> None:
        """Write until the pool is full. Then writes are refused, and leave nothing behind."""
        session = self.session
        disk = max(session.world.vdisks.values(), key=lambda disk: disk.size_blocks, default=None)
        if disk is None or session.plan.pool_bytes > 64 << 20:
            return
        session.no_trouble()
        refused, fbn = session.tally.refused, 0
        while (
            session.tally.refused == refused
            and fbn < disk.size_blocks
            and not disk.gone
            and not session.read_only
        ):
            if session.data.volume(disk) is None:
                return
            count = min(32, disk.size_blocks - fbn)
            session.data.write(plans.MULTI, disk, fbn * SECTORS, count * SECTORS, 1 << 8)
            fbn += count
            await session.drain(max(2, session.plan.depth))
        await session.drain()
        if session.tally.refused > refused and not disk.gone and not session.read_only:
            await self.refused_writes(disk)

    async def refused_writes(self, disk: Disk) -> None:
        """On a pool that is full and at rest."""
        session = self.session
        for _ in range(2):
            await self.point()
        before, refused = session.pool.show(), session.tally.refused
        if before["deleted_images"] or session.pool.split_list() or session.read_only:
            return
        leaves = max(1, disk.size_blocks // 256)
        for step in range(REFUSED_WRITES):
            fbn = session.random.randrange(leaves) * 256
            session.data.write(
                plans.WRITE, disk, fbn * SECTORS, min(SECTORS * (1 + step % 2), SECTORS), 1 << 8
            )
            await session.drain()
        if session.tally.refused < refused + REFUSED_WRITES:
            return
        await self.point()
        after = session.pool.show()
        if after["used_bytes"] > before["used_bytes"]:
            more = (after["used_bytes"] - before["used_bytes"]) // BLOCK_BYTES
            raise Wrong(f"{REFUSED_WRITES} refused writes to a full pool have taken {more} blocks")
        if after["cp_number"] > before["cp_number"] + 3:
            raise Wrong(
                f"{REFUSED_WRITES} refused writes took {after['cp_number'] - before['cp_number']}"
                " consistency points"
            )

    async def point(self) -> None:
        """A consistency point, unless there is no room for one."""
        session = self.session
        try:
            await session.patiently("a consistency point", session.pool.consistency_point())
        except PoolFull:
            return

    # --- The end ----------------------------------------------------------------------------------

    async def finish(self) -> None:
        """Look at everything; delete everything, and see that nothing is left; close."""
        session = self.session
        session.no_trouble()
        await session.drain()
        await self.quiet()
        await self.check()
        if session.reclaim_failed:
            await self.reopen()
        if session.random.random() < 0.7 and not session.read_only:
            await self.empty()
        session.closing = True
        await self.close()

    async def empty(self) -> None:
        """Delete in any order that is allowed; then the pool is as a new one, and takes writes
        again.
        """
        session, world, pool = self.session, self.session.world, self.session.pool
        while world.all():
            disks = [disk for disk in world.vdisks.values() if not world.snapshots_of(disk)]
            ready = [
                *disks,
                *(snapshot for snapshot in world.snapshots if not world.standing_on(snapshot)),
            ]
            if not ready:
                raise Wrong(f"nothing can be deleted of {[disk.full_name for disk in world.all()]}")
            disk = session.random.choice(ready)
            flight = session.begin(plans.DELETE, disk.full_name)
            error = await self.delete(disk)
            session.land(flight, error)
            await self.compare_gone(disk, error)
        await session.drain()
        for _ in range(2000):
            if not pool.show()["deleted_images"]:
                break
            await asyncio.sleep(0.05)
        for _ in range(3):
            await session.patiently("a consistency point", pool.consistency_point())
        left = (pool.show()["used_bytes"] - self.empty_bytes) // BLOCK_BYTES
        if (
            pool.show()["deleted_images"]
            or left > GROWN_BLOCKS + session.plan.pool_bytes // BLOCK_BYTES // 1024
        ):
            raise Wrong(
                f"everything is deleted, and {left} blocks are left,"
                f" {pool.show()['deleted_images']} deleted images"
            )
        await pool.vdisk_create("last", 64 * BLOCK_BYTES)
        world.vdisks["last"] = disk = Disk("last", 64)
        session.data.volume(disk)
        session.data.write(plans.WRITE, disk, 0, 32 * SECTORS, 1 << 8)
        refused = session.tally.refused
        await session.drain()
        if session.tally.refused > refused:
            raise Wrong("an empty pool refuses a write")
        await self.compare([disk], "on an empty pool")

    async def delete(self, disk: Disk) -> StorageError | None:
        pool = self.session.pool
        work = (
            pool.snapshot_delete(disk.origin.name, disk.name)
            if disk.origin is not None
            else pool.vdisk_delete(disk.name)
        )
        try:
            await self.session.patiently(f"deleting {disk.full_name}", work)
        except StorageError as error:
            return error
        return None

    async def compare_gone(self, disk: Disk, error: StorageError | None) -> None:
        if error is not None and not (
            disk.marked or (disk.is_snapshot and "there is no snapshot" in str(error))
        ):
            raise Wrong(
                f"{disk.full_name} cannot be deleted: {type(error).__name__}: {error}"
            ) from error
        if disk.marked and disk.gone:
            return
        self.session.world.forget(disk)
        await self.compare_names()


async def as_coroutine(future: "asyncio.Future[Any]") -> Any:
    return await future
