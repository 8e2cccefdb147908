"""One daemon: start in order (pool, listeners, control socket, ready), stop in the reverse order
within STOP_SECONDS.
"""

import asyncio
from typing import Any, Final

from daemon.control.service import ControlService
from daemon.control.socket import ControlServer
from daemon.control.split_progress import TICK_SECONDS, SplitProgress, log_fields
from daemon.iscsi.listener import IscsiListener
from daemon.pool.space_watch import SpaceWatch
from daemon.process import logs, runtime, signals
from daemon.process.config import Config
from daemon.process.descriptors import PER_LISTENER, Shares, open_now, raise_limit, share_out
from daemon.process.logs import get_log, log_at
from daemon.process.notify import notify
from daemon.targets.directory import Targets
from daemon.targets.reservation_store import ReservationStore
from protocol.control.methods import SPLIT_PROGRESS
from protocol.iscsi.node import TargetNode
from protocol.scsi.limits import SECTOR_BYTES
from storage.device import is_vacant, remove_leftover
from storage.errors import NotFound
from storage.pool import Pool

# An orderly stop takes at most 10 s in all: initiators and control calls get these, the rest is for
# the last consistency point.
ISCSI_STOP_SECONDS: Final = 3.0
CONTROL_STOP_SECONDS: Final = 2.0

# Events of the pool that somebody should look at; all others are logged at level info.
EVENT_LEVELS: Final = {
    "pool.read_only": "error",
    "pool.host_full": "error",
    "pool.closed_on_full_host": "warning",
    "block.damaged": "error",
    "image.damaged": "error",
    "log.record_damaged": "error",
    "log.record_mended": "warning",
    "log.unreadable": "warning",
    "references.crowded": "warning",
    "pool.cp_number_high": "warning",
    "reclaim.failed": "error",
    "scrub.damaged": "error",
    "scrub.failed": "error",
    "split.failed": "error",
    "split.lost": "error",
    "log.unknown_image": "warning",
    "superblock.repaired": "warning",
    "device.discard_failed": "warning",
}


class Daemon:
    """A pool and everything around it. `start` and `stop` are called once each, on one
    event loop.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._pool: Pool | None = None
        self._reservations: ReservationStore | None = None
        self._iscsi: IscsiListener | None = None
        self._control: ControlServer | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._progress: SplitProgress | None = None
        self._space: SpaceWatch | None = None

    async def start(self) -> None:
        """Raises StorageError (PoolRefused, PoolLocked), ListenFailed, ControlPathBusy,
        TooFewDescriptors; `stop` undoes what was done.
        """
        config = self._config
        self._pool = await Pool.open(config.pool_path, config.cache_bytes, self._on_event)
        targets = Targets(self._pool, config.chap, config.open_access)
        self._reservations = ReservationStore(self._pool)
        await targets.load()
        exponent = (config.physical_block_bytes // SECTOR_BYTES).bit_length() - 1
        node = TargetNode(targets, keeper=self._reservations, physical_block_exponent=exponent)
        shares = _shares(config)
        full = (
            f"{shares.iscsi} connections, as many as the limit of open files allows"
            if shares.iscsi < config.connections_max
            else None
        )
        self._iscsi = IscsiListener(node, shares.iscsi, advertise=config.iscsi_advertise, full=full)
        self._space = SpaceWatch(
            config.soft_threshold_percent, self._iscsi.node.soft_threshold_reached
        )
        service = ControlService(
            self._pool, config.pool_path, targets, self._reservations, self._iscsi, self._space
        )
        self._control = ControlServer(config.control_path, service.call, shares.control)
        await self._control.start()
        for address in config.iscsi_listen:
            await self._iscsi.listen(address)
        self._progress = SplitProgress(self._show_split, self._notify_progress, log_progress)
        self._look_regularly()

    def ready_line(self) -> str:
        """Names every listener, with the ports that were really taken."""
        assert self._iscsi is not None
        listeners = [f"iscsi {address}" for address in self._iscsi.addresses] + [
            f"control {self._config.control_path}"
        ]
        return f"cleaved ready: {', '.join(listeners)}"

    async def stop(self) -> None:
        """Stop accepting, let end what is in flight, take a consistency point, release the pool."""
        if self._ticker is not None:
            self._ticker.cancel()
        if self._pool is not None:
            self._pool.close_soon()
        if self._iscsi is not None:
            await self._iscsi.stop(ISCSI_STOP_SECONDS)
        if self._control is not None:
            await self._control.stop(CONTROL_STOP_SECONDS)
        if self._reservations is not None:
            await self._reservations.drain()
        if self._pool is not None:
            await self._pool.close()

    def _on_event(self, event: str, **fields: Any) -> None:
        log_event(event, **fields)
        if event == "pool.host_full" and self._iscsi is not None:
            self._iscsi.node.soft_threshold_reached()
        if event.startswith("split.") and self._progress is not None:
            # Whoever waits for a split learns of its beginning and end at once, not at the next
            # look.
            self._progress.expect(fields["vdisk"])
            asyncio.get_running_loop().call_soon(self._look)

    def _show_split(self, name: str) -> dict[str, Any] | None:
        assert self._pool is not None
        try:
            return self._pool.split_show(name)
        except NotFound:
            return None

    def _notify_progress(self, row: dict[str, Any]) -> None:
        assert self._control is not None
        self._control.notify(SPLIT_PROGRESS, row)

    def _look_regularly(self) -> None:
        assert self._pool is not None
        assert self._space is not None
        self._ticker = asyncio.get_running_loop().call_later(TICK_SECONDS, self._look_regularly)
        self._look()
        self._space.look(*self._pool.space())

    def _look(self) -> None:
        assert self._pool is not None
        assert self._progress is not None
        self._progress.look(self._pool.split_list(), asyncio.get_running_loop().time())


def _shares(config: Config) -> Shares:
    """How many connections there may be, once the pool is open. Raises TooFewDescriptors."""
    limit = raise_limit()
    shares = share_out(
        limit, open_now() + PER_LISTENER * len(config.iscsi_listen), config.connections_max
    )
    if shares.iscsi < config.connections_max:
        get_log().warning(
            "iscsi.connections_limited",
            connections_max=config.connections_max,
            allowed=shares.iscsi,
            open_files_max=limit,
        )
    return shares


def create_pool(config: Config) -> None:
    """Create the pool when a size is configured, and nothing is there yet, or a blank block device.
    Call it before the event loop runs.

    Raises StorageError.
    """
    if config.pool_size_bytes is None:
        return
    if is_vacant(config.pool_path):
        get_log().info("pool.created", **Pool.create(config.pool_path, config.pool_size_bytes))
    else:
        remove_leftover(config.pool_path)


def log_event(event: str, **fields: Any) -> None:
    """The pool's events are the log's: same names, same fields."""
    level = EVENT_LEVELS.get(event, "info")
    if event == "split.paused" and fields.get("reason"):
        level = "warning"  # not by an operator
    log_at(level, event, **fields)


def log_progress(row: dict[str, Any]) -> None:
    """How far a split is."""
    get_log().info("split.progress", **log_fields(row))


def log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception that nobody caught: one connection or one background task is affected, the
    daemon goes on.
    """
    get_log().error(
        "internal.error", message=context.get("message"), exc_info=context.get("exception")
    )


async def run(config: Config) -> None:
    """Serve until a signal says stop (`daemon.process.signals`). Raises what
    `Daemon.start` raises.
    """
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_loop_error)
    stopping: asyncio.Queue[str] = asyncio.Queue()
    signals.take_over(loop, stopping.put_nowait)
    daemon = Daemon(config)
    try:
        await daemon.start()
        runtime.tune_memory()
        logs.write_ready_line(daemon.ready_line())
        notify("READY=1")
        get_log().info(
            "daemon.ready", pool=config.pool_path, listeners=daemon.ready_line().partition(": ")[2]
        )
        by = await stopping.get()
        notify("STOPPING=1")
        get_log().info("daemon.stopping", signal=by)
    finally:
        await daemon.stop()
    get_log().info("daemon.stopped")
