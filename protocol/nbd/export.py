"""What the NBD server asks of the process: which exports there are, and what each of them is.

Names are looked up, never paths. Who the client is (its address, its Unix user, the name in its
certificate) is known to the directory: each connection has one of its own, and another one once TLS
has said who it is.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from protocol.nbd import wire
from protocol.volume import BlockVolume

# Extents from the offset asked for, in order: (length in bytes, status). At least one; they may end
# early or go beyond the length asked for.
Extents = list[tuple[int, int]]
ExtentsCompletion = Callable[[Extents | None, Exception | None], None]


class MetaContext(Protocol):
    """One metadata context of one export ("Metadata querying"). Its status has 32 bits."""

    @property
    def name(self) -> str:
        """Namespace, colon, leaf name."""

    def extents(
        self, offset_bytes: int, length_bytes: int, extents_max: int, done: ExtentsCompletion
    ) -> None:
        """Report the status of a range within the volume, in about ``extents_max`` extents."""


@runtime_checkable
class ReportsDepth(Protocol):
    """What a volume may have beside `protocol.volume.ReportsAllocation`: it can say where in its
    chain of backing stores a range is allocated, as ``qemu:allocation-depth`` shows it.
    """

    def allocation_depth(
        self, offset_bytes: int, length_bytes: int, runs_max: int, done: ExtentsCompletion
    ) -> None:
        """Runs from the offset on, in order: length in bytes, and 0 where nothing is allocated, 1
        for the volume's own blocks, 2 for those of its backing store, and so on.
        """


class Attached(Protocol):
    """A connection in its transmission phase, as an export knows it."""

    def shutdown(self, reason: str) -> None:
        """The export goes, shrinks, or the process stops: answer with NBD_ESHUTDOWN from now on,
        then close.
        """


class Export(Protocol):
    """One volume under one name, for one client. Attributes may change: they are read again for
    each request.
    """

    @property
    def name(self) -> str:
        """The canonical name."""

    @property
    def description(self) -> str:
        """One line for people; may be empty."""

    @property
    def volume(self) -> BlockVolume:
        """The disk."""

    @property
    def read_only(self) -> bool:
        """True for snapshots, and for whom writing is not allowed at all."""

    @property
    def tls_required(self) -> bool:
        """Nobody may know of this export, or use it, without TLS."""

    @property
    def read_errno(self) -> int:
        """0, or why nothing may be read now: another client's persistent reservation, say."""

    @property
    def write_errno(self) -> int:
        """0, or why nothing may be written now."""

    def context_names(self) -> Iterable[str]:
        """Contexts of this export beside those of `protocol.nbd.meta_context`, as
        NBD_OPT_LIST_META_CONTEXT lists them.
        """

    def context(self, name: str) -> MetaContext | None:
        """One of them."""

    def attach(self, connection: Attached) -> None:
        """A client uses the export from now on."""

    def detach(self, connection: Attached) -> None:
        """It does not any more, and nothing of it is at the volume."""


class Listed(NamedTuple):
    """An export as NBD_OPT_LIST shows it."""

    name: str
    description: str
    tls_required: bool


class ExportDirectory(Protocol):
    """The exports that one client may know of."""

    def list(self) -> Iterator[Listed]:
        """Each of them. The iterator is used over many turns of the event loop, in which exports
        may come and go.
        """

    def find(self, name: str) -> Export | None:
        """The export of that name; of the empty name, the default export, if there is one."""


def transmission_flags(export: Export, structured: bool, extended: bool, contexts: bool) -> int:
    """What an export is and can do ("Transmission flags"). A volume's flush makes durable what any
    connection was told is written: CAN_MULTI_CONN.
    """
    flags = (
        wire.FLAG_HAS_FLAGS
        | wire.FLAG_SEND_FLUSH
        | wire.FLAG_SEND_FUA
        | wire.FLAG_CAN_MULTI_CONN
        | wire.FLAG_SEND_CACHE
    )
    if export.read_only:
        flags |= wire.FLAG_READ_ONLY
    else:
        flags |= wire.FLAG_SEND_TRIM | wire.FLAG_SEND_WRITE_ZEROES | wire.FLAG_SEND_FAST_ZERO
    if structured or extended:
        flags |= wire.FLAG_SEND_DF
    if extended and contexts:
        flags |= wire.FLAG_BLOCK_STATUS_PAYLOAD
    return flags
