"""Takes a device as a power loss left it, and says what is wrong with the pool on it, or nothing.

Mount; the check; every image against what may be found; then use: write, flush, snapshot, split to
the end. What was acknowledged then must survive a second power loss. At last everything is deleted,
and no block may be left in use but the fixed ones and the metafiles'.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from storage.check import check_device
from storage.check.report import CheckReport
from storage.errors import Conflict
from storage.layout import LOG_FIRST_VBN, log_blocks
from storage.pool import Pool
from tests.crash.oracle import SECTORS_PER_BLOCK, Expectation, World, data, differs
from tests.crash.recording import PAGE_BYTES, ZERO_PAGE, PageDevice, Pages, RecordingDevice
from tests.crash.session import Client, abandon, open_steady, read_block, step

# A pool of all the workloads has no more metafile blocks than this when it is empty: table, maps,
# summary and their roots.
EMPTY_METAFILE_BLOCKS_MAX = 16
# Messages that splitting and reclaiming everything of a small pool may take; more means that it
# does not end.
STEPS_MAX = 2000
USE_BLOCK = 7
USE_VERSION = 1_000_000
# What the pool may say of a device that lost power. Anything else that it says (damage, read-only,
# a failed reclaim) is a finding. (A repaired copy is the one that was being written, or that no
# sync had covered.)
EVENTS_EXPECTED = frozenset(
    (
        "pool.opened",
        "pool.closed",
        "log.torn_tail",
        "split.started",
        "split.done",
        "image.reclaimed",
        "snapshot.deleted",
    )
) | {"superblock.repaired"}


class Finding(AssertionError):
    """The pool is not what it was promised to be."""


class PagesReader:
    """What the offline check reads from; ``seen`` is what it looked at."""

    def __init__(self, pages: Mapping[int, bytes], size_bytes: int) -> None:
        self._pages = pages
        self.size_bytes = size_bytes
        self.seen: dict[int, bytes] = {}

    def read(self, vbns: Sequence[int]) -> list[memoryview | None]:
        found = {vbn: self._pages.get(vbn, ZERO_PAGE) for vbn in vbns}
        self.seen |= found
        return [memoryview(content) for content in found.values()]


# Pages that a check looked at, and what it found, by the superblocks. A check is a function of what
# it reads: where the same pages hold the same, it finds the same, and most states of one epoch
# differ only in blocks that nothing reaches yet. (Measured: two checks of three.)
_checks: dict[tuple[bytes, bytes], list[tuple[dict[int, bytes], CheckReport]]] = {}
CHECKS_KEPT_MAX = 20_000


def checked(pages: Pages, size_bytes: int, when: str) -> CheckReport:
    """The outcome of the check. Raises Finding for any difference."""
    known = _checks.setdefault((pages.get(0, ZERO_PAGE), pages.get(1, ZERO_PAGE)), [])
    for seen, report in known:
        if all(pages.get(vbn, ZERO_PAGE) == content for vbn, content in seen.items()):
            return report
    if len(_checks) > CHECKS_KEPT_MAX:
        _checks.clear()
    reader = PagesReader(pages, size_bytes)
    report = check_device(reader, verify_data=True)
    if not report.ok:
        raise Finding(f"check {when}: {'; '.join(report.errors[:3])}")
    known.append((reader.seen, report))
    return report


def nothing(base: Pages, requests: list[Any]) -> None:
    """Nobody listens to this device's syncs."""


class Verification:
    """One crash state under examination."""

    def __init__(self, pages: Pages, size_bytes: int, expectation: Expectation) -> None:
        self.device = RecordingDevice(size_bytes, pages, nothing)
        self.expectation = expectation
        self.size_bytes = size_bytes
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.pool: Pool

    def _on_event(self, name: str, **fields: Any) -> None:
        self.events.append((name, fields))

    async def run(self, use: bool = True) -> None:
        """Raises Finding."""
        self.pool = await open_steady(self.device, self._on_event)
        try:
            world = await self._compare()
            self._nothing_reported()
            checked(self.device.pages, self.size_bytes, "after recovery")
            if use:
                await self._use(world)
                await self._delete_everything()
            self._nothing_reported()
        finally:
            await abandon(self.pool)

    def _nothing_reported(self) -> None:
        for name, fields in self.events:
            if name not in EVENTS_EXPECTED:
                raise Finding(f"the pool reports {name} {fields}")
        if self.pool._state.read_only_reason is not None:
            raise Finding(f"the pool is read-only: {self.pool._state.read_only_reason}")

    async def _compare(self) -> World:
        """The world that the pool is in."""
        found = image_names(self.pool)
        wrong: list[str] = []
        for world in self.expectation.worlds:
            if found != world.sizes.keys():
                wrong.append(f"images are {sorted(found)}, should be {sorted(world.sizes)}")
                continue
            difference = await self._difference(world)
            if difference is None:
                return world
            wrong.append(difference)
        raise Finding(" | ".join(wrong))

    async def _difference(self, world: World) -> str | None:
        for name, blocks in world.blocks.items():
            volume = self.pool.volume(name)
            if volume.size_bytes != world.sizes[name] * PAGE_BYTES:
                return (
                    f"{name} has {volume.size_bytes} bytes, should have"
                    f" {world.sizes[name] * PAGE_BYTES}"
                )
            for fbn, expected in blocks.items():
                wrong = differs(expected, await read_block(volume, fbn))
                if wrong is not None:
                    return f"{name} block {fbn}: {wrong}"
        for name, writes in world.atomic.items():
            for write in writes:
                torn = write.torn(
                    {fbn: await read_block(self.pool.volume(name), fbn) for fbn in write.blocks()}
                )
                if torn is not None:
                    return f"{name}: {torn}"
        return None

    async def _use(self, world: World) -> None:
        """Go on with the pool, and lose power again: what was acknowledged since is there."""
        client, pool = Client(self.pool), self.pool
        name = self._a_vdisk(world)
        content = data(name, USE_BLOCK * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK, USE_VERSION)
        before = await self._holdings(world)
        await client.write(name, USE_BLOCK * SECTORS_PER_BLOCK, content)
        await client.flush(name)
        before[name][USE_BLOCK] = content
        await self._second_crash(before)
        await pool.snapshot_create([(name, "after")])
        for clone in pool.names():
            if pool._catalogue.vdisk(clone).backing is not None and clone not in [
                one["name"] for one in pool.split_list()
            ]:
                await pool.split_start(clone, "copy")
        await self._background_to_the_end()
        before[f"{name}@after"] = dict(before[name])
        await self._same(pool, before, "after the splits")
        checked(self.device.pages, self.size_bytes, "after the splits")

    @staticmethod
    def _a_vdisk(world: World) -> str:
        return min(name for name in world.sizes if "@" not in name)

    async def _holdings(self, world: World) -> dict[str, dict[int, bytes]]:
        return {
            name: {fbn: await read_block(self.pool.volume(name), fbn) for fbn in blocks}
            for name, blocks in world.blocks.items()
        }

    async def _second_crash(self, holdings: dict[str, dict[int, bytes]]) -> None:
        device = PageDevice(self.size_bytes, copy(self.device.base))
        try:
            pool = await open_steady(device)
        except Exception as error:
            raise Finding(f"the second recovery fails: {error!r}") from error
        try:
            await self._same(pool, holdings, "after a second power loss")
            checked(device.pages, self.size_bytes, "after a second power loss")
            if pool._state.read_only_reason is not None:
                raise Finding(
                    "after a second power loss the pool is read-only:"
                    f" {pool._state.read_only_reason}"
                )
        finally:
            pool.rooms.device.close()
            await abandon_quietly(pool)

    async def _same(self, pool: Pool, holdings: dict[str, dict[int, bytes]], when: str) -> None:
        for name, blocks in holdings.items():
            volume = pool.volume(name)
            for fbn, expected in blocks.items():
                wrong = differs(expected, await read_block(volume, fbn))
                if wrong is not None:
                    raise Finding(f"{when} {name} block {fbn}: {wrong}")

    async def _background_to_the_end(self) -> None:
        for _ in range(STEPS_MAX):
            if not await step(self.pool):
                return
        raise Finding("the background does not come to an end")

    async def _delete_everything(self) -> None:
        pool = self.pool
        while names := image_names(pool):
            refused = [name for name in sorted(names) if not await deleted(pool, name)]
            if len(refused) == len(names):
                raise Finding(f"none of {refused} can be deleted")
        await self._background_to_the_end()
        await pool.consistency_point()
        report = checked(self.device.pages, self.size_bytes, "after everything was deleted")
        fixed = LOG_FIRST_VBN + log_blocks(self.size_bytes // PAGE_BYTES)
        if report.images or not fixed < report.blocks_used <= fixed + EMPTY_METAFILE_BLOCKS_MAX:
            raise Finding(f"blocks are lost: {report.as_dict()}")


def image_names(pool: Pool) -> set[str]:
    catalogue = pool._catalogue
    snapshots = {
        f"{name}@{snapshot}"
        for name, number in catalogue.vdisks.items()
        for snapshot in catalogue.snapshots.get(number, ())
    }
    return snapshots | catalogue.vdisks.keys()


async def deleted(pool: Pool, name: str) -> bool:
    """Delete a vdisk or a snapshot, unless something stands on it."""
    try:
        vdisk, _, snapshot = name.partition("@")
        await (pool.snapshot_delete(vdisk, snapshot) if snapshot else pool.vdisk_delete(vdisk))
    except Conflict:
        return False
    return True


async def abandon_quietly(pool: Pool) -> None:
    """End the tasks of one pool only: another one is at work in the same loop."""
    for task in (pool.rooms.points._task, pool.rooms.log._worker):
        if task is not None:
            task.cancel()
