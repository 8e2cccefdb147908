"""One daemon: start in order (pool, control socket, listeners, ready), stop in the reverse order
within STOP_SECONDS.
"""

import asyncio
from typing import Any, Final, Self

from daemon.control.context import Context
from daemon.control.listener import ControlListener
from daemon.control.service import ControlService
from daemon.control.split_progress import TICK_SECONDS, SplitProgress, log_fields
from daemon.iscsi.listener import IscsiListener
from daemon.nbd.exports import Shared
from daemon.nbd.listener import NbdListener
from daemon.nbd.sessions import NbdSessions
from daemon.pool.events import PoolEvents
from daemon.pool.space_watch import SpaceWatch
from daemon.process import logs, runtime, signals
from daemon.process.config import Config
from daemon.process.descriptors import PER_LISTENER, Shares, open_now, raise_limit, share_out
from daemon.process.logs import get_log
from daemon.targets.administration import TargetAdministration
from daemon.targets.directory import Targets
from daemon.targets.reservation_store import ReservationStore
from daemon.tcp.listener import Listener
from protocol.control.methods import SPLIT_PROGRESS
from protocol.control.rows import Split, row_of, rows_of
from protocol.scsi.limits import SECTOR_BYTES
from storage.device import is_vacant, remove_leftover
from storage.errors import NotFound
from storage.pool import Pool

# An orderly stop takes at most 10 s in all: clients and control calls get these, the rest is for
# the last consistency point.
LISTENER_STOP_SECONDS: Final = 3.0
CONTROL_STOP_SECONDS: Final = 2.0


class Daemon:
    """A pool and everything around it, made by `open`. `start` and `stop` are called once each, on
    one event loop.
    """

    def __init__(self, config: Config, pool: Pool, events: PoolEvents) -> None:
        """Raises TooFewDescriptors, SectionUnreadable."""
        self._pool = pool
        self._targets = Targets(pool, config.chap, config.open_access)
        self._reservations = ReservationStore(pool)
        shares = _shares(config)
        self._config = config
        self._iscsi = iscsi = _iscsi_listener(
            config, self._targets, self._reservations, shares.iscsi
        )
        nbd_sessions = NbdSessions(self._targets.sessions.take_number)
        self._nbd = NbdListener(
            Shared(pool, self._targets, iscsi.node, nbd_sessions),
            shares.nbd,
            _full(shares.nbd, config.nbd_connections_max),
        )
        # A new protocol is one more item here, and in `start`.
        self._listeners: list[Listener] = [iscsi, self._nbd]
        self._space = SpaceWatch(config.soft_threshold_percent, self._tell_space_low)
        context = Context(
            pool=pool,
            pool_path=config.pool_path,
            targets=self._targets,
            administration=TargetAdministration(self._targets),
            reservations=self._reservations,
            iscsi=iscsi,
            nbd=nbd_sessions,
            listeners=self._listeners,
            space=self._space,
        )
        service = ControlService(context)
        self._control = ControlListener(config.control_path, service.call, shares.control)
        self._progress = SplitProgress(self._show_split, self._notify_progress, log_progress)
        self._ticker: asyncio.TimerHandle | None = None
        events.watch(self._on_event)

    @classmethod
    async def open(cls, config: Config) -> Self:
        """Open the pool. Raises StorageError (PoolRefused, PoolLocked, SectionUnreadable),
        TooFewDescriptors.
        """
        events = PoolEvents()
        pool = await Pool.open(config.pool_path, config.cache_bytes, events)
        try:
            return cls(config, pool, events)
        except BaseException:
            await pool.close()
            raise

    async def start(self) -> None:
        """Raises ListenFailed, ControlPathBusy; `stop` undoes what was done."""
        self._targets.load()
        await self._control.start()
        for address in self._config.iscsi_listen:
            await self._iscsi.listen(address)
        for endpoint in self._config.nbd_listen:
            await self._nbd.listen(endpoint)
        self._look_regularly()

    def ready_line(self) -> str:
        """Names every listener, with the ports that were really taken."""
        listening = [
            f"{listener.protocol} {address}"
            for listener in self._listeners
            for address in listener.addresses
        ]
        return f"cleaved ready: {', '.join([*listening, f'control {self._control.path}'])}"

    async def stop(self) -> None:
        """Stop accepting, let end what is in flight, take a consistency point, release the pool."""
        if self._ticker is not None:
            self._ticker.cancel()
        self._pool.close_soon()
        await asyncio.gather(
            *(listener.stop(LISTENER_STOP_SECONDS) for listener in self._listeners)
        )
        await self._control.stop(CONTROL_STOP_SECONDS)
        await self._reservations.drain()
        await self._pool.close()

    def _on_event(self, event: str, fields: dict[str, Any]) -> None:
        if event == "pool.host_full":
            self._tell_space_low()
        if event.startswith("split."):
            # Those that wait for a split learn of its beginning and end at once, not at the next
            # look.
            self._progress.expect(fields["vdisk"])
            asyncio.get_running_loop().call_soon(self._look)

    def _tell_space_low(self) -> None:
        for listener in self._listeners:
            listener.space_low()

    def _show_split(self, name: str) -> Split | None:
        try:
            return row_of(Split, self._pool.split_show(name))
        except NotFound:
            return None

    def _notify_progress(self, row: Split) -> None:
        self._control.notify(SPLIT_PROGRESS, row)

    def _look_regularly(self) -> None:
        self._ticker = asyncio.get_running_loop().call_later(TICK_SECONDS, self._look_regularly)
        self._look()
        self._space.look(*self._pool.space())

    def _look(self) -> None:
        rows = rows_of(Split, self._pool.split_list())
        self._progress.look(rows, asyncio.get_running_loop().time())


def _iscsi_listener(
    config: Config, targets: Targets, reservations: ReservationStore, connections_max: int
) -> IscsiListener:
    return IscsiListener(
        targets,
        connections_max,
        keeper=reservations,
        physical_block_exponent=(config.physical_block_bytes // SECTOR_BYTES).bit_length() - 1,
        advertise=config.iscsi_advertise,
        full=_full(connections_max, config.connections_max),
    )


def _full(connections_max: int, wanted: int) -> str | None:
    """Why there can be no more connections than that; None where the configuration says so."""
    if connections_max >= wanted:
        return None
    return f"{connections_max} connections, as many as the limit of open files allows"


def _shares(config: Config) -> Shares:
    """How many connections there may be, once the pool is open. Raises TooFewDescriptors."""
    limit = raise_limit()
    listening = PER_LISTENER * (len(config.iscsi_listen) + len(config.nbd_listen))
    nbd_max = config.nbd_connections_max if config.nbd_listen else 0
    shares = share_out(limit, open_now() + listening, config.connections_max, nbd_max)
    if shares.iscsi < config.connections_max:
        get_log().warning(
            "iscsi.connections_limited",
            connections_max=config.connections_max,
            allowed=shares.iscsi,
            open_files_max=limit,
        )
    if shares.nbd < nbd_max:
        get_log().warning(
            "nbd.connections_limited",
            connections_max=nbd_max,
            allowed=shares.nbd,
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


def log_progress(row: Split) -> None:
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
    """Serve until a signal says stop (`daemon.process.signals`). Raises what `Daemon.open` and
    `Daemon.start` raise.
    """
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_loop_error)
    stopping: asyncio.Queue[str] = asyncio.Queue()
    signals.take_over(loop, stopping.put_nowait)
    daemon = await Daemon.open(config)
    try:
        await daemon.start()
        runtime.tune_memory()
        logs.write_ready_line(daemon.ready_line())
        runtime.notify_systemd("READY=1")
        get_log().info(
            "daemon.ready", pool=config.pool_path, listeners=daemon.ready_line().partition(": ")[2]
        )
        by = await stopping.get()
        runtime.notify_systemd("STOPPING=1")
        get_log().info("daemon.stopping", signal=by)
    finally:
        await daemon.stop()
    get_log().info("daemon.stopped")
