"""The pool against the model: any sequence of what clients and administrators do, with power
losses, and a check after every reopen.

The seed is printed first; CLEAVED_SEED=<seed> repeats a run, CLEAVED_LONG=1 makes it long. Design
section 6, invariants 1 to 5 and 7.
"""

import asyncio
import os
import random
from collections.abc import Coroutine
from typing import Any

import hypothesis
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from storage.errors import Conflict, StorageError
from tests.storage.crash_device import Fuse, Loss
from tests.storage.model import BLOCK_BYTES, SECTOR_BYTES, SECTORS_PER_BLOCK
from tests.storage.model_rules import (
    DATA,
    FUSES,
    IMAGES_MAX,
    LOSSES,
    NAMES,
    POOL_BYTES,
    POPULATED,
    SEEDS,
    SIZES_BLOCKS,
    SNAPSHOTS,
    TURNS,
    ClientRules,
)
from tests.storage.running_pool import RunningPool


class PoolMachine(ClientRules):
    """Rules are what may happen; each changes the pool and the model, and reads compare them."""

    @initialize(
        deferred=st.sampled_from([True, True, False]),
        miss_rate=st.sampled_from([1.0, 0.3, 0.0]),
        seed=st.integers(0, 99),
        cache_bytes=st.sampled_from([1 << 18, 64 << 20]),
        clones=st.sampled_from([2, 1, 0]),
    )
    def begin(
        self, deferred: bool, miss_rate: float, seed: int, cache_bytes: int, clones: int
    ) -> None:
        """A new pool; in it, mostly, a clone, or a clone of a clone: few sequences of rules would
        get there.
        """
        self.pool = RunningPool(
            POOL_BYTES, cache_bytes, deferred=deferred, miss_rate=miss_rate, seed=seed
        )
        for vdisk, clone in (("a", "b"), ("b", "c"))[:clones]:
            if vdisk not in self.model.images:
                self.create(vdisk, 70000)
            self.populate(vdisk)
            self.clone_now(f"{vdisk}@s", clone)

    def populate(self, vdisk: str) -> None:
        for fbn in POPULATED:
            self.write_now(vdisk, fbn * SECTORS_PER_BLOCK, 3 * SECTORS_PER_BLOCK + 1)
        self.snapshot_now([vdisk], "s")

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        try:
            if self.pool.is_open:
                self.compare_all()
                self.pool.check_live()
                self.pool.close()
                self.pool.check_offline()
        finally:
            self.pool.stop()

    # --- Drawing ---

    # --- The table ---

    @rule(name=st.sampled_from(NAMES), size_blocks=st.sampled_from(SIZES_BLOCKS))
    def create(self, name: str, size_blocks: int) -> None:
        if self.expect(
            name in self.model.images, self.pool.pool.vdisk_create(name, size_blocks * BLOCK_BYTES)
        ):
            self.model.create(name, size_blocks)

    def expect(self, conflict: bool, work: Coroutine[Any, Any, Any], either: bool = False) -> bool:
        """Run a change of the table that should be refused with a Conflict, or not, or either.
        Returns whether it was made.

        A change that was made is durable, and so is all that was written before.
        """
        try:
            self.pool.run(work)
        except Conflict:
            assert conflict or either
            return False
        assert not conflict or either
        self.model.all_durable()
        return True

    @precondition(lambda self: self.model.vdisks())
    @rule(data=DATA, new=st.sampled_from(NAMES))
    def rename(self, data: st.DataObject, new: str) -> None:
        old = self.draw_vdisk(data)
        if old == new:
            self.pool.run(
                self.pool.pool.vdisk_rename(old, new)
            )  # changes nothing, so nothing becomes durable by it
        elif self.expect(new in self.model.images, self.pool.pool.vdisk_rename(old, new)):
            self.model.rename(old, new)
            if old in self.splits:
                self.splits[new] = self.splits.pop(old)

    @precondition(lambda self: self.model.vdisks())
    @rule(data=DATA, size_blocks=st.sampled_from(SIZES_BLOCKS))
    def resize(self, data: st.DataObject, size_blocks: int) -> None:
        name = self.draw_vdisk(data)
        if size_blocks == self.model.images[name].size_blocks:
            self.pool.run(self.pool.pool.vdisk_resize(name, size_blocks * BLOCK_BYTES))
        elif self.expect(False, self.pool.pool.vdisk_resize(name, size_blocks * BLOCK_BYTES)):
            self.model.images[name].resize(size_blocks)

    @precondition(lambda self: self.model.vdisks())
    @rule(data=DATA)
    def delete(self, data: st.DataObject) -> None:
        name = self.draw_vdisk(data)
        conflict = bool(self.model.snapshots_of(name)) or self.model.images[name].sessions > 0
        if self.expect(conflict, self.pool.pool.vdisk_delete(name)):
            self.model.delete(name)
            self.splits.pop(name, None)

    @precondition(lambda self: self.model.vdisks())
    @rule(data=DATA, attach=st.booleans())
    def attach_or_detach(self, data: st.DataObject, attach: bool) -> None:
        name = self.draw_vdisk(data)
        image = self.model.images[name]
        volume = self.pool.pool.volume(name)
        self.pool.held[image.number] = volume
        (volume.attach if attach else volume.detach)("session")
        image.sessions = int(attach)

    @precondition(lambda self: self.model.vdisks())
    @rule(data=DATA, snapshot=st.sampled_from(SNAPSHOTS))
    def snapshot(self, data: st.DataObject, snapshot: str) -> None:
        vdisks = data.draw(
            st.lists(st.sampled_from(self.model.vdisks()), min_size=1, max_size=3, unique=True),
            "vdisks",
        )
        self.snapshot_now(vdisks, snapshot)

    def snapshot_now(self, vdisks: list[str], snapshot: str) -> None:
        conflict = any(f"{vdisk}@{snapshot}" in self.model.images for vdisk in vdisks)
        if self.expect(
            conflict, self.pool.pool.snapshot_create([(vdisk, snapshot) for vdisk in vdisks])
        ):
            for vdisk in vdisks:
                self.model.snapshot(vdisk, snapshot)
                self.refresh_backing(f"{vdisk}@{snapshot}")
            self.refresh_splits()

    @precondition(lambda self: self.model.snapshots())
    @rule(data=DATA)
    def delete_snapshot(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.model.snapshots()), "snapshot")
        vdisk, snapshot = name.split("@")
        clones = self.model.clones_of(name)
        # A split that runs may let go of it at any moment.
        either = bool(clones) and all(self.splits.get(clone) == "running" for clone in clones)
        if self.expect(bool(clones), self.pool.pool.snapshot_delete(vdisk, snapshot), either):
            self.model.delete(name)

    @precondition(lambda self: self.model.snapshots())
    @rule(data=DATA, name=st.sampled_from(NAMES))
    def clone(self, data: st.DataObject, name: str) -> None:
        self.clone_now(data.draw(st.sampled_from(self.model.snapshots()), "snapshot"), name)

    def clone_now(self, snapshot: str, name: str) -> None:
        vdisk, short = snapshot.split("@")
        if self.expect(name in self.model.images, self.pool.pool.clone_create(vdisk, short, name)):
            self.model.clone(snapshot, name)

    # --- Split ---

    def clones(self) -> list[str]:
        return [name for name in self.model.vdisks() if self.model.images[name].backing is not None]

    def running_split(self, data: st.DataObject, mode: str) -> str:
        """A clone whose split runs; begins one where there is none, on a clone that is made for it
        if need be.
        """
        running = [name for name, state in self.splits.items() if state == "running"]
        if len(running) > 0 and data.draw(st.booleans(), "the one that runs"):
            return data.draw(st.sampled_from(sorted(running)), "running clone")
        waiting = [name for name in self.clones() if name not in self.splits]
        if waiting:
            name = data.draw(st.sampled_from(waiting), "clone")
        else:
            name = self.make_clone()
        self.pool.run(self.pool.pool.split_start(name, mode))
        self.splits[name] = "running"
        self.model.all_durable()
        return name

    def make_clone(self) -> str:
        """A clone of a populated vdisk, both new. What was left behind by earlier ones is deleted
        when it gets too much.
        """
        if len(self.model.images) >= IMAGES_MAX:
            self.delete_what_may_be()
        self.model.next_number += 1
        vdisk, clone = f"v{self.model.next_number}", f"w{self.model.next_number}"
        self.create(vdisk, 70000)
        self.populate(vdisk)
        self.clone_now(f"{vdisk}@s", clone)
        return clone

    def delete_what_may_be(self) -> None:
        """All that nothing stands on and nobody uses, from the newest on, so that what it stood on
        can follow.
        """
        for name, image in reversed(list(self.model.images.items())):
            if (
                self.model.clones_of(name)
                or self.model.snapshots_of(name)
                or image.sessions
                or name in self.splits
            ):
                continue
            vdisk, _, snapshot = name.partition("@")
            pool = self.pool.pool
            if self.expect(
                False,
                pool.snapshot_delete(vdisk, snapshot) if snapshot else pool.vdisk_delete(vdisk),
            ):
                self.model.delete(name)

    @rule(
        data=DATA,
        mode=st.sampled_from(["copy", "share"]),
        begun=st.booleans(),
        turns=TURNS,
        loss=st.none() | LOSSES,
        seed=SEEDS,
    )
    def split(
        self, data: st.DataObject, mode: str, begun: bool, turns: int, loss: Loss | None, seed: int
    ) -> None:
        """A split goes on, while its clone is written where it has yet to come; often power fails
        right then.
        """
        name = self.running_split(data, mode)
        if begun:
            self.pool.run(self.has_begun(name))
        self.pool.turns(turns)
        step = data.draw(st.integers(0, 3), "step")
        self.write_together(
            name,
            [
                fbn + step
                for fbn in data.draw(st.sampled_from([(), POPULATED[3:5], POPULATED]), "blocks")
            ],
        )
        self.pool.turns(turns)
        self.refresh_splits()
        if loss is not None:
            self.crash(loss, seed)

    async def has_begun(self, name: str) -> None:
        """Wait until the split has replaced some holes, but not yet all."""
        while (shown := self.pool.pool.split_show(name))["state"] == "running" and not 0 < shown[
            "holes_remaining"
        ] < shown["holes_total"]:
            await asyncio.sleep(0)

    def write_together(self, name: str, blocks: list[int]) -> None:
        """One block each, all in one turn: in every level-1 block that the split may be at just
        then.
        """
        blocks = [fbn for fbn in blocks if fbn < self.model.images[name].size_blocks]
        contents = {
            fbn: self.model.data(name, fbn * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK) for fbn in blocks
        }
        self.pool.run(self.pool.write_blocks(name, contents))
        for fbn, content in contents.items():
            self.wrote(name, fbn * SECTORS_PER_BLOCK, content)

    @rule(data=DATA, mode=st.sampled_from(["copy", "share"]), turns=TURNS)
    def pause_and_perhaps_resume(self, data: st.DataObject, mode: str, turns: int) -> None:
        paused = [name for name, state in self.splits.items() if state == "paused"]
        if len(paused) > 0 and data.draw(st.booleans(), "resume"):
            name = data.draw(st.sampled_from(sorted(paused)), "clone")
            self.pool.run(self.pool.pool.split_resume(name))
            self.splits[name] = "running"
        else:
            name = self.running_split(data, mode)
            self.pool.turns(turns)
            if self.steer(name, self.pool.pool.split_pause(name)):
                self.splits[name] = "paused"
        self.refresh_splits()

    def steer(self, name: str, command: Coroutine[Any, Any, Any]) -> bool:
        """A command for a split that runs. Returns whether it came in time."""
        try:
            self.pool.run(command)
        except StorageError:
            # The split has ended by itself; perhaps that is not durable yet.
            self.pool.run(self.ended(name))
            self.refresh_splits()
            assert name not in self.splits
            return False
        self.model.all_durable()
        return True

    @rule(data=DATA, mode=st.sampled_from(["copy", "share"]), turns=TURNS)
    def split_cancel(self, data: st.DataObject, mode: str, turns: int) -> None:
        name = self.running_split(data, mode)
        self.pool.turns(turns)
        if self.steer(name, self.pool.pool.split_cancel(name)):
            self.refresh_backing(name)
            self.splits.pop(name, None)

    @rule(data=DATA, mode=st.sampled_from(["copy", "share"]))
    def split_to_the_end(self, data: st.DataObject, mode: str) -> None:
        name = self.running_split(data, mode)
        self.pool.run(self.ended(name))
        self.refresh_splits()
        assert name not in self.splits and self.model.images[name].backing is None

    async def ended(self, name: str) -> None:
        while self.pool.pool.split_show(name)["state"] == "running":
            await asyncio.sleep(0.001)

    def refresh_splits(self) -> None:
        """A split ends by itself: take notice of those that did."""
        for name in [name for name, state in self.splits.items() if state == "running"]:
            # The association may end earlier, but only then can no crash bring it back.
            if self.pool.pool.split_show(name)["state"] == "done":
                self.refresh_backing(name)
                assert self.model.images[name].backing is None
                del self.splits[name]

    def refresh_backing(self, name: str) -> None:
        if "@" in name:
            vdisk, snapshot = name.split("@")
            rows = self.pool.run(self.pool.pool.snapshot_list(vdisk))
            found = next(row for row in rows if row["name"].removeprefix(f"{vdisk}@") == snapshot)[
                "backing"
            ]
        else:
            found = self.pool.run(self.pool.pool.vdisk_show(name))["backing"]
        if found is None:
            self.model.images[name].backing = None
        assert found == self.model.images[name].backing

    # --- Time, and its end ---

    @rule()
    def consistency_point(self) -> None:
        self.pool.run(self.pool.pool.consistency_point())
        self.model.all_durable()

    @rule()
    def restart(self) -> None:
        self.compare_all()
        self.pool.reopen()
        self.model.all_durable()
        self.after_open()

    @rule(loss=LOSSES, seed=SEEDS)
    def crash(self, loss: Loss, seed: int) -> None:
        self.pool.lose_power(loss, seed)
        self.after_open()

    @precondition(lambda self: self.model.vdisks())
    @rule(
        data=DATA,
        loss=LOSSES,
        seed=SEEDS,
        fuse=FUSES,
        others=st.sampled_from(["", "flush", "point", "both"]),
    )
    def crash_in_the_middle(
        self, data: st.DataObject, loss: Loss, seed: int, fuse: Fuse, others: str
    ) -> None:
        """Power fails while a write is on its way, with a flush and a consistency point beside it:
        what was acknowledged counts.
        """
        name = self.draw_vdisk(data)
        image = self.model.images[name]
        lba, count = self.draw_range(data, image)
        content = self.model.data(name, lba, count)
        pool = self.pool
        commands = {
            "write": pool.write(name, lba * SECTOR_BYTES, content, fua=True),
            "flush": pool.flush(name) if others in {"flush", "both"} else None,
            "point": pool.pool.consistency_point() if others in {"point", "both"} else None,
        }
        done = pool.cut_short(
            fuse, {key: command for key, command in commands.items() if command is not None}
        )
        if "point" in done:
            self.model.all_durable()
        if "flush" in done:
            image.durable()
        # The two promise nothing about the write that was under way together with them.
        self.wrote(name, lba, content, "write" in done)
        pool.lose_power(loss, seed)
        self.after_open()

    @precondition(lambda self: self.model.vdisks())
    @rule(data=DATA, loss=LOSSES, seed=SEEDS, fuse=FUSES)
    def crash_in_a_snapshot(self, data: st.DataObject, loss: Loss, seed: int, fuse: Fuse) -> None:
        """Power fails while a group of snapshots is made: all of them are there afterwards, or
        none.
        """
        vdisks = data.draw(
            st.lists(st.sampled_from(self.model.vdisks()), min_size=1, max_size=3, unique=True),
            "vdisks",
        )
        self.model.next_number += 1
        snapshot = f"x{self.model.next_number}"
        done = self.pool.cut_short(
            fuse, {"made": self.pool.pool.snapshot_create([(vdisk, snapshot) for vdisk in vdisks])}
        )
        self.pool.lose_power(loss, seed)
        made = {vdisk for vdisk in vdisks if self.pool.run(self.has_snapshot(vdisk, snapshot))}
        assert made in ([set(vdisks)] if done else [set(), set(vdisks)])
        if made:
            # They hold what the vdisks held at their freeze, so that is durable, too.
            for vdisk in vdisks:
                self.model.snapshot(vdisk, snapshot)
            self.model.all_durable()
        self.after_open()

    async def has_snapshot(self, vdisk: str, snapshot: str) -> bool:
        return any(
            row["name"] == f"{vdisk}@{snapshot}"
            for row in await self.pool.pool.snapshot_list(vdisk)
        )

    def after_open(self) -> None:
        """The pool holds what the model allows, the model takes that over, and the maps
        are right.
        """
        for image in self.model.images.values():
            image.sessions = 0
        assert self.pool.pool.names() == self.model.vdisks()
        self.pool.run(self.take_over_all())
        self.refresh_after_open()
        self.pool.check_live()

    async def take_over_all(self) -> None:
        for name, image in self.model.images.items():
            for fbn in image.blocks_to_read():
                image.take_over(fbn, await self.pool.read(name, fbn * BLOCK_BYTES, BLOCK_BYTES))
            image.durable()

    def refresh_after_open(self) -> None:
        """Splits that ran go on, and those that were paused stay paused."""
        for name, state in list(self.splits.items()):
            found = self.pool.pool.split_show(name)["state"]
            assert found == state or (state == "running" and found == "done"), (name, state, found)
        self.refresh_splits()
        for name in self.model.images:
            if name not in self.splits:
                self.refresh_backing(name)

    def compare_all(self) -> None:
        """Every touched block of every image reads as the model says."""
        self.pool.run(self._compare_all())

    async def _compare_all(self) -> None:
        for name, image in self.model.images.items():
            for fbn in image.blocks_to_read():
                found = await self.pool.read(name, fbn * BLOCK_BYTES, BLOCK_BYTES)
                assert found == image.read(fbn * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK), (
                    f"{name}: block {fbn}"
                )

    @invariant()
    def nothing_is_reported_damaged(self) -> None:
        if hasattr(self, "pool"):
            assert not [
                event for event in self.pool.events if "damage" in event[0] or "failed" in event[0]
            ]
            assert not self.pool.surprises


def test_pool_against_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("CLEAVED_SEED", random.SystemRandom().randrange(1 << 32)))
    with capsys.disabled():
        print(f"\n[CLEAVED_SEED={seed}] ", end="", flush=True)
    steps, examples = (60, settings().max_examples) if os.environ.get("CLEAVED_LONG") else (30, 60)
    run_state_machine_as_test(
        hypothesis.seed(seed)(PoolMachine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )
