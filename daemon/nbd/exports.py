"""Which exports there are for one client: the vdisks of the pool, and their snapshots as
``NAME@SNAPSHOT``, read-only. Satisfies `protocol.nbd.export.ExportDirectory`.

Over a Unix socket its permissions decide. Over TCP without TLS nobody proves a name, so that an
export is for everybody or for nobody: it is open where access is, the vdisk has no list of
initiators, and initiators need no CHAP.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, cast

from daemon.nbd.sessions import NbdSessions
from daemon.pool.volumes import AttachableVolume, Volumes
from daemon.targets.directory import Targets
from protocol.iscsi.node import TargetNode
from protocol.nbd.connection import NbdConnection
from protocol.nbd.export import Attached, Listed, MetaContext
from storage.errors import StorageError

SNAPSHOT_MARK: Final = "@"


class Shared(NamedTuple):
    """What the directories of all connections share. ``node`` knows what iSCSI clients have
    reserved.
    """

    pool: Volumes
    targets: Targets
    node: TargetNode
    sessions: NbdSessions


class PoolExports:
    """The exports for one client. ``trusted``: it came by a Unix socket; ``local`` is where it
    came to.
    """

    def __init__(self, shared: Shared, trusted: bool, local: str) -> None:
        self._shared = shared
        self._trusted = trusted
        self._local = local

    def list(self) -> Iterator[Listed]:
        """By name, each vdisk before its snapshots."""
        pool = self._shared.pool
        for name in pool.names():
            try:
                if not self._may(pool.volume(name).uuid.hex):
                    continue
                snapshots = pool.snapshot_names(name)
            except StorageError:
                continue  # deleted or renamed since the list was begun
            yield Listed(name, "vdisk", False)
            for snapshot in snapshots:
                yield Listed(f"{name}{SNAPSHOT_MARK}{snapshot}", "snapshot", False)

    def find(self, name: str) -> "PoolExport | None":
        """There is no default export."""
        pool = self._shared.pool
        try:
            uuid = pool.volume(name.partition(SNAPSHOT_MARK)[0]).uuid.hex
            if not self._may(uuid):
                return None
            volume = pool.volume(name)
        except StorageError:
            return None
        return PoolExport(self._shared, volume, lambda: self._may(uuid), self._local)

    def _may(self, uuid: str) -> bool:
        """Whether this client may use the vdisk of this UUID."""
        return self._trusted or self._shared.targets.open_to_everybody(uuid)


class PoolExport:
    """One of them. Satisfies `protocol.nbd.export.Export`."""

    tls_required: Final = False

    def __init__(
        self, shared: Shared, volume: AttachableVolume, may: Callable[[], bool], local: str
    ) -> None:
        self._shared = shared
        self._may = may
        self._local = local
        self._uuid = volume.uuid
        self.volume = volume

    @property
    def name(self) -> str:
        """As it is called now."""
        return self.volume.name

    @property
    def description(self) -> str:
        """What it is."""
        return "snapshot" if SNAPSHOT_MARK in self.volume.name else "vdisk"

    @property
    def read_only(self) -> bool:
        """Snapshots are, and all of a pool that went read-only."""
        return self.volume.read_only

    @property
    def read_errno(self) -> int:
        """EPERM while a reservation of an iSCSI client forbids others to read."""
        return self._shared.node.errno_for_others(self._uuid, writes=False)

    @property
    def write_errno(self) -> int:
        """EPERM while a reservation of an iSCSI client forbids others to write."""
        return self._shared.node.errno_for_others(self._uuid, writes=True)

    def context_names(self) -> Iterable[str]:
        """None yet."""
        return ()

    def context(self, name: str) -> MetaContext | None:
        """None yet."""
        return None

    def attach(self, connection: Attached) -> None:
        """A client uses the export from now on: it cannot be deleted."""
        self._shared.node.recall(self.volume)
        self._shared.sessions.opened(
            cast("NbdConnection", connection), self.volume, self._local, self._may
        )

    def detach(self, connection: Attached) -> None:
        """It does not any more."""
        self._shared.sessions.closed(connection)
