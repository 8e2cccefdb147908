"""Starting, steering and showing splits: what the control socket reaches."""

import time
from functools import partial
from typing import Any

from storage.allocation.share_map import ShareMap
from storage.backdoor.handler import BackdoorMessageHandler
from storage.data.backing import next_index
from storage.errors import Conflict, DeviceFull, NotFound, PoolFull, RequestError, StorageError
from storage.images.catalogue import Catalogue
from storage.images.image import Image
from storage.images.record import SplitRecord
from storage.layout import (
    BLOCK_BYTES,
    KIND_VDISK,
    SPLIT_DONE,
    SPLIT_FAILED,
    SPLIT_FLAG_COUNTED,
    SPLIT_MODES,
    SPLIT_NONE,
    SPLIT_PAUSED,
    SPLIT_RUNNING,
    SPLIT_STATES,
)
from storage.slicer import Slicer
from storage.split import states
from storage.split.copying import CopyBuffers
from storage.split.job import BLOCKS_IDLE, SplitJob
from storage.split.loading import holes_at
from storage.state.host_room import HostRoom
from storage.state.point_requests import PointRequests
from storage.state.pool_state import PoolState
from storage.vdisks.deletion import Deletion

# What a split copies a second on an idle daemon, for estimates before one has run (measured on the
# test machine: docs/performance.md).
COPY_BYTES_PER_SECOND = 1 << 30
# What the table entry of a clone can say.
RATE_BYTES_MAX = (1 << 63) - 1


class SplitService:
    """Holds the jobs of all splits that are running or paused, by image number."""

    def __init__(
        self,
        state: PoolState,
        host_room: HostRoom,
        requests: PointRequests,
        share_map: ShareMap,
        catalogue: Catalogue,
        handler: BackdoorMessageHandler,
        deletion: Deletion,
    ) -> None:
        self._state = state
        self._host_room = host_room
        self._requests = requests
        self._share_map = share_map
        self._catalogue = catalogue
        self._handler = handler
        self._deletion = deletion
        self._jobs: dict[int, SplitJob] = {}
        self._buffers = CopyBuffers(BLOCKS_IDLE)

    def take_up(self) -> None:
        """At open, before replay: a job for every split that was running or paused, so that replay
        keeps their counts.
        """
        for number in list(self._catalogue.numbers(KIND_VDISK)):
            if self._catalogue.split_state(number) in (SPLIT_RUNNING, SPLIT_PAUSED):
                try:
                    self._new_job(self._catalogue.image(number))
                except StorageError as error:
                    # Its backing store's entry is damaged: this clone cannot be used, all others
                    # can.
                    self._state.on_event("split.lost", number=number, error=str(error))

    def go_on(self) -> None:
        """After replay: let the running ones run."""
        for job in self._jobs.values():
            if job.record.state == SPLIT_RUNNING:
                self._handler.post(job)

    def _new_job(self, image: Image) -> SplitJob:
        """The job of a clone; it hears of the clone's holes from now on."""
        job = SplitJob(image, self._requests, self._buffers, self)
        self._jobs[image.number] = image.watcher = job
        return job

    # --- Commands ---------------------------------------------------------------------------------

    async def start(
        self, name: str, mode: str, rate_min_bytes: int | None, rate_max_bytes: int | None
    ) -> dict[str, Any]:
        """Begin a split. Raises NotFound, Conflict (not a clone, or one is under way),
        RequestError.
        """
        if mode not in SPLIT_MODES:
            raise RequestError(f"a split has no mode {mode!r}: use copy or share")
        low, high = rate_min_bytes or 0, rate_max_bytes or 0
        if high and low > high:
            raise RequestError(
                f"the minimum rate {low} is above the maximum rate {high}: make it smaller"
            )
        if not 0 <= min(low, high) <= max(low, high) <= RATE_BYTES_MAX:
            raise RequestError(
                f"rates of {low} and {high} bytes a second cannot be: use 0 (not set) to"
                f" {RATE_BYTES_MAX}"
            )
        if mode == "share":
            self._share_map.check_room(Conflict)
        image = self._catalogue.vdisk(name)
        if image.backing is None:
            raise Conflict(f"{name} has no backing store: it is not a clone, or was split already")
        following = states.after(image.split.state, "start", name)
        self._state.check_writable()
        image.touch()
        image.split = SplitRecord(
            state=following,
            mode=SPLIT_MODES.index(mode),
            rate_min_bytes=low,
            rate_max_bytes=high,
            started_ns=time.time_ns(),
        )
        job = self._new_job(image)
        # Not left to this call: it may be cancelled, and the split goes on all the same.
        self._state.epoch.when_durable.append(partial(self._started, job, mode))
        await self._requests.request()
        return self._describe(image)

    def _started(self, job: SplitJob, mode: str) -> None:
        self._state.on_event("split.started", vdisk=job.image.name, mode=mode)
        self._handler.post(job)

    async def pause(self, name: str) -> dict[str, Any]:
        """Stop until ``resume``; over restarts, too. Raises NotFound, Conflict."""
        return await self._change(self._catalogue.vdisk(name), "pause")

    async def resume(self, name: str) -> dict[str, Any]:
        """Go on after a pause. Raises NotFound, Conflict."""
        return await self._change(self._catalogue.vdisk(name), "resume")

    async def cancel(self, name: str) -> dict[str, Any]:
        """End the split; what was separated stays so, and the clone stays a clone. Raises NotFound,
        Conflict.
        """
        return await self._change(self._catalogue.vdisk(name), "cancel")

    async def _change(self, image: Image, command: str) -> dict[str, Any]:
        following = states.after(image.split.state, command, image.name)
        self._state.check_writable()
        image.touch()
        image.split.state, image.split.reason = following, ""
        if command == "cancel":
            self._end(image)  # before anybody can start the next one
        self._state.epoch.when_durable.append(partial(self._changed, image, following))
        await self._requests.request()
        return self._describe(image)

    def _changed(self, image: Image, following: int) -> None:
        self._state.on_event(f"split.{SPLIT_STATES[following]}", vdisk=image.name)
        job = self._jobs.get(image.number)
        if following == SPLIT_RUNNING and job is not None and job.image is image:
            # Unless it was cancelled, or the clone deleted, meanwhile.
            self._handler.post(job)

    def _end(self, image: Image) -> None:
        job = self._jobs.get(image.number)
        if job is not None:
            if image.split.state != SPLIT_DONE:
                image.touch()
                image.split.flags &= ~SPLIT_FLAG_COUNTED  # nobody counts on from here
            job.abandon()
            self._handler.withdraw(job)

    # --- What jobs report -------------------------------------------------------------------------

    async def release(self, job: SplitJob) -> None:
        """No hole is left: the association ends. When that is durable, a backing store that is
        marked for it is deleted.
        """
        image = job.image
        released: list[Image | None] = []

        def at_freeze() -> None:
            if job.gone or image.split.state != SPLIT_RUNNING:
                return  # paused, cancelled or deleted in the last moment
            image.touch()
            image.split.state = states.after(SPLIT_RUNNING, "finish", image.name)
            image.split.holes_remaining = 0
            image.split.flags |= SPLIT_FLAG_COUNTED
            released.append(self._catalogue.release_backing(image))
            self._state.epoch.when_durable.append(partial(self._catalogue.is_released, image))
            self._end(image)

        try:
            await self._requests.request(at_freeze)
        except StorageError as error:
            if released:
                # The pool has failed, and after a restart the split goes on: it must not be shown
                # as done meanwhile.
                image.split.state, image.split.reason = SPLIT_FAILED, str(error)
                self._state.on_event("split.failed", vdisk=image.name, reason=str(error))
            raise
        finally:
            self._catalogue.is_released(image)
        if not released:
            return
        (backing,) = released
        if backing is not None:
            self._deletion.unused(backing)
        self._state.on_event(
            "split.done", vdisk=image.name, mode=SPLIT_MODES[image.split.mode],
            blocks_copied=image.split.blocks_copied, blocks_shared=image.split.blocks_shared,
        )  # fmt: skip

    async def stopped(self, job: SplitJob, error: StorageError) -> None:
        """A message failed: a full pool or host pauses the split, anything else ends it; both keep
        the reason.
        """
        image = job.image
        if image.split.state != SPLIT_RUNNING:
            return  # paused meanwhile: whatever it was shows again after the resume
        image.touch()
        if isinstance(error, DeviceFull):
            self._host_room.met(error)
        command = "pause" if isinstance(error, PoolFull | DeviceFull) else "fail"
        image.split.state = states.after(image.split.state, command, image.name)
        image.split.reason = str(error)
        if command == "fail":
            self._end(image)
        self._state.on_event(
            f"split.{SPLIT_STATES[image.split.state]}", vdisk=image.name, reason=str(error)
        )
        self._requests.want()

    def gone(self, job: SplitJob) -> None:
        """The split has ended, or its clone is being deleted."""
        if self._jobs.get(job.image.number) is job:
            del self._jobs[job.image.number]
        if not self._jobs:
            self._buffers.clear()

    # --- Showing ----------------------------------------------------------------------------------

    def show(self, name: str) -> dict[str, Any]:
        """State and progress of a vdisk's split. Raises NotFound when it never had one."""
        image = self._catalogue.vdisk(name)
        if image.split.state == SPLIT_NONE:
            raise NotFound(f"{name} has no split: start one with `cleavectl split start {name}`")
        return self._describe(image)

    def _describe(self, image: Image) -> dict[str, Any]:
        split, job = image.split, self._jobs.get(image.number)
        state, reason = self._shown_state(image)
        done = split.blocks_copied + split.blocks_shared
        total = max(split.holes_total, split.holes_remaining + done)
        running = job is not None and state == SPLIT_RUNNING
        return {
            "name": image.name,
            "state": SPLIT_STATES[state],
            "mode": SPLIT_MODES[split.mode],
            "phase": job.phase if job is not None else "ended",
            "reason": reason or None,
            "backing": self._catalogue.backing_name(image.number),
            "holes_total": total,
            "holes_remaining": split.holes_remaining,
            "counted": bool(split.flags & SPLIT_FLAG_COUNTED),
            "blocks_copied": split.blocks_copied,
            "blocks_shared": split.blocks_shared,
            "percent": percent_done(
                split, total, counting=job is not None and job.phase == "counting"
            ),
            "rate_bytes_per_second": (
                round(job.progress.holes_per_second * BLOCK_BYTES)
                if running and job is not None
                else 0
            ),
            "eta_seconds": (
                job.progress.eta_seconds(split.holes_remaining)
                if running and job is not None
                else None
            ),
            "rate_min_bytes": split.rate_min_bytes or None,
            "rate_max_bytes": split.rate_max_bytes or None,
            "started_ns": split.started_ns,
        }

    def _shown_state(self, image: Image) -> tuple[int, str]:
        """What counts is what is durable; and on a pool that takes no changes nothing runs, so that
        nobody waits for it.
        """
        split, read_only = image.split, self._state.read_only_reason
        state = SPLIT_RUNNING if image.number in self._catalogue.releasing else split.state
        if state == SPLIT_RUNNING and read_only is not None:
            return (
                SPLIT_FAILED,
                (
                    f"the pool is read-only: {read_only}; the split goes on when the pool takes"
                    " changes again"
                ),
            )
        return state, split.reason

    def list(self) -> list[dict[str, Any]]:
        """All splits that are running or paused."""
        under_way = [job.image for _, job in sorted(self._jobs.items())]
        return [
            self._describe(image)
            for image in under_way
            if image.split.state in (SPLIT_RUNNING, SPLIT_PAUSED)
        ]

    async def estimate(self, name: str) -> dict[str, Any]:
        """What a copy split of this clone would move now, and how long that takes on an idle
        daemon. Raises NotFound, Conflict.
        """
        image = self._catalogue.vdisk(name)
        if image.backing is None:
            raise Conflict(f"{name} has no backing store: it is not a clone, or was split already")
        slicer = Slicer()
        blocks, index = 0, await next_index(image, 0)
        while index is not None:
            blocks += len(await holes_at(image, index))
            await slicer.breathe()
            index = await next_index(image, index + 1)
        if image.backing is None:
            raise Conflict(
                f"the split of {name} has ended meanwhile: it has no backing store any more"
            )
        return {
            "name": name,
            "blocks_to_copy": blocks,
            "bytes_to_copy": blocks * BLOCK_BYTES,
            "seconds_estimated": round(blocks * BLOCK_BYTES / COPY_BYTES_PER_SECOND, 3),
        }


def percent_done(split: SplitRecord, total: int, counting: bool) -> float:
    """How much of the holes is replaced; 0 while it is not known how many there are."""
    if split.state == SPLIT_DONE:
        return 100.0
    if counting and not split.holes_total:
        return 0.0
    return round(100.0 * (total - split.holes_remaining) / total, 2) if total else 100.0
