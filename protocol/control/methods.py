"""The methods of the control socket, each defined once (`protocol.control.definition`).

They are named as the commands of `cleavectl`. CONTRIBUTING.md says what a new one takes.
"""

from collections.abc import Mapping
from typing import Final

from protocol.control import rows
from protocol.control.definition import Method
from protocol.control.parameters import (
    ChapName,
    ChapSecret,
    ClientName,
    EventName,
    EventNames,
    Initiator,
    Initiators,
    Lun,
    Name,
    Reference,
    References,
    SessionId,
    SizeBytes,
    SplitMode,
    TargetReference,
)

# Notifications that a client can subscribe to, and what they carry.
SPLIT_PROGRESS: Final = "split.progress"
EVENTS: Final[Mapping[str, type[rows.Row]]] = {SPLIT_PROGRESS: rows.Split}


# --- The protocol itself --------------------------------------------------------------------------


class Hello(Method[rows.Greeting], frozen=True, kw_only=True):
    """First call: names the client; answers server, version, protocol and pool."""

    METHOD = "hello"

    client: ClientName
    protocol: int


class ListMethods(Method[list[rows.MethodDescription]], frozen=True, kw_only=True):
    """Describe all methods."""

    METHOD = "rpc.list"


class Subscribe(Method[list[EventName]], frozen=True, kw_only=True):
    """Choose the notifications that this connection gets.

    The list replaces the one before.
    """

    METHOD = "rpc.subscribe"

    events: EventNames


# --- Vdisks ---------------------------------------------------------------------------------------


class VdiskCreate(Method[rows.NewVdisk], frozen=True, kw_only=True):
    """Create an empty vdisk."""

    METHOD = "vdisk.create"

    name: Name
    size_bytes: SizeBytes


class VdiskList(Method[list[rows.Vdisk]], frozen=True, kw_only=True):
    """List all vdisks."""

    METHOD = "vdisk.ls"


class VdiskShow(Method[rows.VdiskDetail], frozen=True, kw_only=True):
    """One vdisk in full."""

    METHOD = "vdisk.show"

    name: Name


class VdiskResize(Method[rows.ResizedVdisk], frozen=True, kw_only=True):
    """Change a vdisk's size; a smaller one wants shrink.

    A larger size adds zeros. A smaller one cuts the end off, with the data in it, and is refused
    unless ``shrink`` is true.
    """

    METHOD = "vdisk.resize"

    name: Name
    size_bytes: SizeBytes
    shrink: bool = False


class VdiskRename(Method[rows.VdiskDetail], frozen=True, kw_only=True):
    """Rename a vdisk.

    Its iSCSI target name follows.
    """

    METHOD = "vdisk.rename"

    name: Name
    new_name: Name


class VdiskDelete(Method[rows.Deleted], frozen=True, kw_only=True):
    """Delete a vdisk; its space is reclaimed in the background."""

    METHOD = "vdisk.rm"

    name: Name


# --- Snapshots and clones -------------------------------------------------------------------------


class SnapshotCreate(Method[list[rows.NewSnapshot]], frozen=True, kw_only=True):
    """Take snapshots, all at one moment.

    Each is VDISK@SNAPSHOT; all of them are made, or none.
    """

    METHOD = "snapshot.create"

    snapshots: References


class SnapshotList(Method[list[rows.Snapshot]], frozen=True, kw_only=True):
    """List snapshots.

    Those of one vdisk, or all.
    """

    METHOD = "snapshot.ls"

    vdisk: Name | None = None


class SnapshotDelete(Method[rows.Deleted], frozen=True, kw_only=True):
    """Delete a snapshot; its space is reclaimed in the background.

    With ``after_split``, a snapshot that has clones goes when the last of them has been split.
    """

    METHOD = "snapshot.rm"

    snapshot: Reference
    after_split: bool = False


class CloneCreate(Method[rows.NewVdisk], frozen=True, kw_only=True):
    """Create a clone of a snapshot.

    It is a vdisk like any other; ``split`` starts its split at once.
    """

    METHOD = "clone.create"

    snapshot: Reference
    name: Name
    split: bool = False


# --- Splits ---------------------------------------------------------------------------------------


class SplitStart(Method[rows.Split], frozen=True, kw_only=True):
    """Start to split a clone from its backing store.

    ``copy`` moves data, ``share`` takes the backing store's own pointers. The rates are floor and
    ceiling of the copying.
    """

    METHOD = "split.start"

    name: Name
    mode: SplitMode = "copy"
    rate_min_bytes: SizeBytes | None = None
    rate_max_bytes: SizeBytes | None = None


class SplitShow(Method[rows.Split], frozen=True, kw_only=True):
    """State and progress of one split."""

    METHOD = "split.show"

    name: Name


class SplitList(Method[list[rows.Split]], frozen=True, kw_only=True):
    """State and progress of all splits.

    Those that run or are paused.
    """

    METHOD = "split.ls"


class SplitPause(Method[rows.Split], frozen=True, kw_only=True):
    """Pause a split.

    It goes on where it was when it is resumed.
    """

    METHOD = "split.pause"

    name: Name


class SplitResume(Method[rows.Split], frozen=True, kw_only=True):
    """Resume a paused split."""

    METHOD = "split.resume"

    name: Name


class SplitCancel(Method[rows.Split], frozen=True, kw_only=True):
    """Cancel a split; the clone keeps its backing store."""

    METHOD = "split.cancel"

    name: Name


class SplitEstimate(Method[rows.SplitEstimate], frozen=True, kw_only=True):
    """How much a split would copy, and how long that takes."""

    METHOD = "split.estimate"

    name: Name


# --- The pool -------------------------------------------------------------------------------------


class PoolShow(Method[rows.Pool], frozen=True, kw_only=True):
    """Size, use and state of the pool."""

    METHOD = "pool.show"


class PoolCheck(Method[rows.CheckReport], frozen=True, kw_only=True):
    """Check the whole pool while it serves.

    ``verify_data`` reads every data block too, and compares its checksum.
    """

    METHOD = "pool.check"

    verify_data: bool = False


class PoolScrub(Method[rows.Scrub], frozen=True, kw_only=True):
    """Read and verify every block in use, in the background.

    ``rate_max_bytes`` is a ceiling; without it the pool's own counts.
    """

    METHOD = "pool.scrub"

    rate_max_bytes: SizeBytes | None = None


class PoolScrubShow(Method[rows.Scrub], frozen=True, kw_only=True):
    """State, progress and findings of the last scrub."""

    METHOD = "pool.scrub_show"


class PoolScrubCancel(Method[rows.Scrub], frozen=True, kw_only=True):
    """End the scrub."""

    METHOD = "pool.scrub_cancel"


# --- Targets and access ---------------------------------------------------------------------------


class TargetCreate(Method[rows.Target], frozen=True, kw_only=True):
    """Create a target without LUNs, beside the vdisks' own.

    Give it a list of initiators (acl add) before you map anything into it.
    """

    METHOD = "target.create"

    target: TargetReference


class TargetList(Method[list[rows.Target]], frozen=True, kw_only=True):
    """List the targets that were created."""

    METHOD = "target.ls"


class TargetDelete(Method[rows.DeletedTarget], frozen=True, kw_only=True):
    """Remove a created target; its vdisks stay."""

    METHOD = "target.rm"

    target: TargetReference


class TargetMap(Method[rows.Target], frozen=True, kw_only=True):
    """Make a vdisk a LUN of a created target.

    Without a number it gets the lowest free one.
    """

    METHOD = "target.map"

    target: TargetReference
    vdisk: Name
    lun: Lun | None = None


class TargetUnmap(Method[rows.Target], frozen=True, kw_only=True):
    """Take a LUN out of a created target.

    The LUN is named by its vdisk or by its number: exactly one of them.
    """

    METHOD = "target.unmap"

    target: TargetReference
    vdisk: Name | None = None
    lun: Lun | None = None


class AclAdd(Method[rows.ChangedAccessList], frozen=True, kw_only=True):
    """Let initiators use a target, and from then on nobody else."""

    METHOD = "acl.add"

    target: TargetReference
    initiators: Initiators


class AclRemove(Method[rows.ChangedAccessList], frozen=True, kw_only=True):
    """Take an initiator off a target's list, and end its sessions.

    A list that becomes empty stays, and lets nobody in.
    """

    METHOD = "acl.rm"

    target: TargetReference
    initiator: Initiator


class AclClear(Method[rows.ChangedAccessList], frozen=True, kw_only=True):
    """Remove a target's list.

    The target is then for everybody where access is open (iscsi.open_access), else for nobody.
    """

    METHOD = "acl.clear"

    target: TargetReference


class AclList(Method[list[rows.AccessList]], frozen=True, kw_only=True):
    """The lists of initiators.

    That of one target, or all.
    """

    METHOD = "acl.ls"

    target: TargetReference | None = None


class ChapSet(Method[rows.ChapUser], frozen=True, kw_only=True):
    """Set what an initiator must prove.

    With the ``mutual`` pair, also what the target proves to it.
    """

    METHOD = "chap.set"

    initiator: Initiator
    user: ChapName
    secret: ChapSecret
    mutual_user: ChapName | None = None
    mutual_secret: ChapSecret | None = None

    def __repr__(self) -> str:
        return f"ChapSet(initiator={self.initiator!r}, user={self.user!r})"


class ChapDelete(Method[rows.DeletedChapUser], frozen=True, kw_only=True):
    """Remove an initiator's credentials.

    Those of the configuration file, if any, are asked of it then.
    """

    METHOD = "chap.rm"

    initiator: Initiator


class ChapList(Method[list[rows.ChapUser]], frozen=True, kw_only=True):
    """Which initiators have credentials, without their secrets."""

    METHOD = "chap.ls"


# --- Sessions and clients -------------------------------------------------------------------------


class SessionList(Method[list[rows.Session]], frozen=True, kw_only=True):
    """List the iSCSI sessions."""

    METHOD = "session.ls"


class SessionEnd(Method[rows.EndedSession], frozen=True, kw_only=True):
    """End an iSCSI session: its initiator is asked to log out, and cut off if it does not.

    ``id`` is as ``session.ls`` shows it.
    """

    METHOD = "session.end"

    id: SessionId


class Stats(Method[rows.Stats], frozen=True, kw_only=True):
    """Counters of one vdisk since the daemon started."""

    METHOD = "stats"

    name: Name


class Connect(Method[rows.Portal], frozen=True, kw_only=True):
    """What a client needs to connect to a vdisk.

    What it must prove, and whether it may, depends on its ``initiator`` name.
    """

    METHOD = "connect"

    name: Name
    initiator: Initiator | None = None
