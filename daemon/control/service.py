"""The control service: each method of the control socket, carried out on the pool.

Handlers take validated parameters and give what travels as the result. Errors of the pool become
errors of the protocol by their class, in one place (``control_error``).
"""

import asyncio
import os
from collections.abc import Mapping
from typing import Any, Final

from daemon import VERSION
from daemon.control.target_service import Handler, TargetService, Wire
from daemon.pool.interface import PoolInterface, Row
from daemon.pool.space_watch import SpaceWatch, space_warnings
from daemon.process.logs import get_log
from daemon.process.units import format_exact
from daemon.targets.directory import VDISK, Targets
from daemon.targets.reservation_store import ReservationStore
from protocol.control import errors, methods
from protocol.control.errors import ControlError
from protocol.control.limits import PROTOCOL_VERSION
from protocol.iscsi.limits import LOGOUT_SECONDS
from storage.errors import (
    BlockDamaged,
    Conflict,
    DeviceFailed,
    NotFound,
    OutOfRange,
    PoolFull,
    PoolReadOnly,
    RequestError,
    StorageError,
    VolumeClosed,
)

# Most specific first: the first class that fits gives the code.
ERROR_CODES: Final[Mapping[type[StorageError], str]] = {
    NotFound: errors.NOT_FOUND,
    Conflict: errors.CONFLICT,
    OutOfRange: errors.OUT_OF_RANGE,
    RequestError: errors.INVALID_PARAMS,
    PoolFull: errors.POOL_FULL,
    PoolReadOnly: errors.READ_ONLY,
    VolumeClosed: errors.CLOSING,
    BlockDamaged: errors.DAMAGED,
    DeviceFailed: errors.DEVICE_FAILED,
    StorageError: errors.FAILED,
}

# A session that is to end has LOGOUT_SECONDS for that by itself; then it is cut off, at the
# listener's next tick, and what its commands still hold at the device comes back.
SESSION_END_SECONDS: Final = LOGOUT_SECONDS + 10


def control_error(error: StorageError) -> ControlError:
    """The protocol's error for one of the pool's."""
    code = next(code for kind, code in ERROR_CODES.items() if isinstance(error, kind))
    return ControlError(code, str(error))


class ControlService:
    """Carries out calls. ``wire`` is told what open sessions must learn. ``space`` knows from when
    on to warn who wants more.
    """

    def __init__(
        self,
        pool: PoolInterface,
        pool_path: str,
        targets: Targets,
        reservations: ReservationStore,
        wire: Wire,
        space: SpaceWatch,
    ) -> None:
        self._pool = pool
        self._space = space
        self._pool_path = pool_path
        self._targets = targets
        self._reservations = reservations
        self._wire = wire
        self._handlers: dict[str, Handler] = {
            "hello": self._hello,
            "vdisk.create": self._vdisk_create,
            "vdisk.ls": self._vdisk_list,
            "vdisk.show": self._vdisk_show,
            "vdisk.resize": self._vdisk_resize,
            "vdisk.rename": self._vdisk_rename,
            "vdisk.rm": self._vdisk_delete,
            "snapshot.create": self._snapshot_create,
            "snapshot.ls": self._snapshot_list,
            "snapshot.rm": self._snapshot_delete,
            "clone.create": self._clone_create,
            "split.start": self._split_start,
            "split.show": self._split_show,
            "split.ls": self._split_list,
            "split.pause": self._split_pause,
            "split.resume": self._split_resume,
            "split.cancel": self._split_cancel,
            "split.estimate": self._split_estimate,
            "pool.show": self._pool_show,
            "pool.check": self._pool_check,
            "pool.scrub": self._pool_scrub,
            "pool.scrub_show": self._pool_scrub_show,
            "pool.scrub_cancel": self._pool_scrub_cancel,
            "session.ls": self._session_list,
            "session.end": self._session_end,
            "stats": self._stats,
            "connect": self._connect,
            **TargetService(pool, targets, wire).handlers,
        }

    @property
    def method_names(self) -> frozenset[str]:
        """What this service answers."""
        return frozenset(self._handlers)

    async def call(self, method: str, params: methods.Params) -> Any:
        """The result of one call. Raises ControlError, and nothing else that the pool raises on
        purpose.
        """
        try:
            return await self._handlers[method](params)
        except StorageError as error:
            raise control_error(error) from error

    async def _hello(self, params: methods.Hello) -> Row:
        who = {"server": "cleaved", "version": VERSION, "protocol": PROTOCOL_VERSION}
        return {**who, "pool": self._pool_path, "pid": os.getpid()}

    def _warnings(self) -> list[str]:
        """For who asked for something that will want room. It was made all the same: what takes the
        room are writes.
        """
        return space_warnings(self._pool.show(), self._space.threshold_percent)

    async def _vdisk_create(self, params: methods.VdiskCreate) -> Row:
        with self._targets.claim(VDISK, params.name):
            created = await self._pool.vdisk_create(params.name, params.size_bytes)
        return {**created, "warnings": self._warnings()}

    async def _vdisk_list(self, params: methods.Params) -> list[Row]:
        return await self._pool.vdisk_list()

    async def _vdisk_show(self, params: methods.Named) -> Row:
        return await self._pool.vdisk_show(params.name)

    async def _vdisk_resize(self, params: methods.VdiskResize) -> Row:
        before_bytes = self._pool.volume(params.name).size_bytes
        if params.size_bytes < before_bytes and not params.shrink:
            raise _would_cut(params.name, before_bytes, params.size_bytes)
        # No wait in between: the pool takes the vdisk for this resize in the same step, and no
        # other one can come first.
        await self._pool.vdisk_resize(params.name, params.size_bytes)
        self._wire.volume_resized(self._pool.volume(params.name))
        return {**await self._pool.vdisk_show(params.name), "warnings": self._warnings()}

    async def _vdisk_rename(self, params: methods.VdiskRename) -> Row:
        with self._targets.claim(VDISK, params.new_name, self._pool.volume(params.name)):
            await self._pool.vdisk_rename(params.name, params.new_name)
        return await self._pool.vdisk_show(params.new_name)

    async def _vdisk_delete(self, params: methods.Named) -> Row:
        volume = self._pool.volume(params.name)
        self._targets.check_unmapped(volume)
        self._targets.check_unused(volume)
        await self._pool.vdisk_delete(params.name)
        await self._targets.forget(volume)
        self._wire.volume_deleted(volume.uuid)
        await self._reservations.forget(volume.uuid)
        return {"name": params.name, "deleted": True}

    async def _snapshot_create(self, params: methods.SnapshotCreate) -> list[Row]:
        created = await self._pool.snapshot_create(
            [_two_names(reference) for reference in params.snapshots]
        )
        warnings = self._warnings()
        return [{**row, "warnings": warnings} for row in created]

    async def _snapshot_list(self, params: methods.SnapshotList) -> list[Row]:
        return await self._pool.snapshot_list(params.vdisk)

    async def _snapshot_delete(self, params: methods.SnapshotDelete) -> Row:
        deleted = await self._pool.snapshot_delete(*_two_names(params.snapshot), params.after_split)
        return {"name": params.snapshot, "deleted": deleted}

    async def _clone_create(self, params: methods.CloneCreate) -> Row:
        with self._targets.claim(VDISK, params.name):
            created = await self._pool.clone_create(*_two_names(params.snapshot), params.name)
        if params.split:
            await self._pool.split_start(params.name)
        return {**created, "warnings": self._warnings()}

    async def _split_start(self, params: methods.SplitStart) -> Row:
        return await self._pool.split_start(
            params.name, params.mode, params.rate_min_bytes, params.rate_max_bytes
        )

    async def _split_show(self, params: methods.Named) -> Row:
        return self._pool.split_show(params.name)

    async def _split_list(self, params: methods.Params) -> list[Row]:
        return self._pool.split_list()

    async def _split_pause(self, params: methods.Named) -> Row:
        await self._pool.split_pause(params.name)
        return self._pool.split_show(params.name)

    async def _split_resume(self, params: methods.Named) -> Row:
        await self._pool.split_resume(params.name)
        return self._pool.split_show(params.name)

    async def _split_cancel(self, params: methods.Named) -> Row:
        await self._pool.split_cancel(params.name)
        return self._pool.split_show(params.name)

    async def _split_estimate(self, params: methods.Named) -> Row:
        return await self._pool.split_estimate(params.name)

    async def _pool_show(self, params: methods.Params) -> Row:
        return {**self._pool.show(), **self._space.shown()}

    async def _pool_check(self, params: methods.PoolCheck) -> Row:
        return await self._pool.check(verify_data=params.verify_data)

    async def _pool_scrub(self, params: methods.PoolScrub) -> Row:
        return await self._pool.scrub_start(params.rate_max_bytes)

    async def _pool_scrub_show(self, params: methods.Params) -> Row:
        return self._pool.scrub_show()

    async def _pool_scrub_cancel(self, params: methods.Params) -> Row:
        return await self._pool.scrub_cancel()

    async def _session_list(self, params: methods.Params) -> list[Row]:
        return self._targets.sessions()

    async def _stats(self, params: methods.Named) -> Row:
        return self._targets.stats(params.name)

    async def _session_end(self, params: methods.SessionEnd) -> Row:
        session, ended = self._targets.session(params.id)
        who = {"id": params.id, "initiator": session.initiator_name, "target": session.target_name}
        get_log().info("session.ending", **who)
        self._wire.end_sessions([session])
        try:
            await asyncio.wait_for(ended.wait(), SESSION_END_SECONDS)
        except TimeoutError:
            raise ControlError(
                errors.FAILED,
                f"session {params.id} was cut off, and commands of it are still under way: the"
                " pool's device does not answer them",
                "look at the device and the daemon's log; the session ends when they do",
            ) from None
        return {**who, "ended": True}

    async def _connect(self, params: methods.Connect) -> Row:
        volume = self._pool.volume(params.name)
        where = {
            "name": params.name,
            "target": self._targets.target_name(params.name),
            "lun": 0,
            "portals": self._wire.portals(),
        }
        return {**where, **self._targets.access_to(volume, params.initiator)}


def _would_cut(name: str, before_bytes: int, after_bytes: int) -> ControlError:
    """A vdisk was to shrink, and nobody said that this is meant."""
    return ControlError(
        errors.CONFLICT,
        f"vdisk {name} has {format_exact(before_bytes)}: a size of {format_exact(after_bytes)}"
        f" would cut off its last {format_exact(before_bytes - after_bytes)}, with the data in"
        " them",
        f"nothing was changed; if that is meant: cleavectl vdisk resize {name} {after_bytes}"
        " --shrink",
    )


def _two_names(reference: str) -> tuple[str, str]:
    vdisk, _, snapshot = reference.partition("@")
    return vdisk, snapshot
