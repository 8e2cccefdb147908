"""What methods answer: rows, whose fields are the keys on the wire and in the JSON of `cleavectl`,
in this order. The keys are stable: they are added to, and never change their meaning. A key that
is added gets a default, since a client may be newer than its daemon.

The unit of a number is the end of its key's name: ``_bytes``, ``_bytes_per_second``, ``_seconds``,
``_ns`` (since 1970), ``percent``. A field's description, and the table of keys in
docs/operations.md, come from here.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar, get_args

import msgspec

from protocol.control.parameters import SplitMode


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One document. ``COLUMNS`` are the keys that a table shows of rows that come in lists."""

    COLUMNS: ClassVar[tuple[str, ...]] = ()


Kind = TypeVar("Kind", bound=Row)


def rows_of(kind: type[Kind], found: Sequence[Mapping[str, object]]) -> list[Kind]:
    """Rows of what the pool says, which must have these keys and no others: what differs is a
    mistake of ours, and raises ValidationError or AssertionError.
    """
    rows = msgspec.convert(found, list[kind])  # type: ignore[valid-type]  # known when it runs
    keys = kind.__struct_fields__
    assert all(len(one) == len(keys) for one in found), f"{kind.__name__} has exactly {keys}"
    return rows


def row_of(kind: type[Kind], found: Mapping[str, object]) -> Kind:
    """One row of what the pool says, as `rows_of`."""
    return rows_of(kind, [found])[0]


def _described(words: str) -> msgspec.Meta:
    return msgspec.Meta(description=words)


def metas_of(kind: type[Row]) -> dict[str, msgspec.Meta]:
    """What each key's annotation says beside its type."""
    return {
        field.encode_name: next(
            (found for found in get_args(field.type) if isinstance(found, msgspec.Meta)),
            msgspec.Meta(),
        )
        for field in msgspec.structs.fields(kind)
    }


Warnings = Annotated[list[str], _described("sentences; empty when there is nothing to say")]
# How tables show a list of initiators that is null, and one that is empty.
NO_LIST: Final = "(no list)"
NOBODY: Final = "(nobody)"
AllowedInitiators = Annotated[
    list[str] | None,
    msgspec.Meta(description="null: no list", extra={"null": NO_LIST, "empty": NOBODY}),
]
SplitStateName = Literal["running", "paused", "done", "failed", "cancelled"]


# --- The protocol itself --------------------------------------------------------------------------


class Greeting(Row, frozen=True, kw_only=True):
    """The daemon behind the socket."""

    server: str
    version: str
    protocol: int
    pool: str
    pid: int


class ParameterDescription(Row, frozen=True, kw_only=True):
    """One parameter of a method."""

    name: str
    required: bool
    schema: Annotated[dict[str, Any], _described("JSON schema")]


class MethodDescription(Row, frozen=True, kw_only=True):
    """One method."""

    method: str
    summary: str
    params: list[ParameterDescription]


# --- Vdisks, snapshots, clones --------------------------------------------------------------------


class Vdisk(Row, frozen=True, kw_only=True):
    """What lists say of a vdisk."""

    COLUMNS = ("name", "size_bytes", "used_bytes", "backing", "split")

    name: str
    uuid: str
    size_bytes: int
    used_bytes: int
    backing: Annotated[str | None, _described("VDISK@SNAPSHOT; null: no clone, or split")]
    created_ns: int
    split: Literal["none"] | SplitStateName


class NewVdisk(Vdisk, frozen=True, kw_only=True):
    """A vdisk that was just made."""

    warnings: Warnings


class VdiskDetail(Vdisk, frozen=True, kw_only=True):
    """One vdisk in full."""

    exclusive_bytes: int
    shared_bytes: int
    snapshots: list[str]
    backed_bytes: int


class ResizedVdisk(VdiskDetail, frozen=True, kw_only=True):
    """A vdisk that was just resized."""

    warnings: Warnings


class Snapshot(Vdisk, frozen=True, kw_only=True):
    """What lists say of a snapshot."""

    COLUMNS = ("name", "size_bytes", "used_bytes", "clones", "created_ns")

    clones: list[str]


class NewSnapshot(Snapshot, frozen=True, kw_only=True):
    """A snapshot that was just taken."""

    warnings: Warnings


class Deleted(Row, frozen=True, kw_only=True):
    """A vdisk or a snapshot that is to go."""

    name: str
    deleted: Annotated[
        bool, _described("false: it goes when the last of its clones has been split")
    ]


# --- Splits ---------------------------------------------------------------------------------------


class Split(Row, frozen=True, kw_only=True):
    """State and progress of one split."""

    COLUMNS = (
        "name", "state", "mode", "percent", "holes_remaining", "rate_bytes_per_second",
        "eta_seconds", "reason",
    )  # fmt: skip

    name: str
    state: SplitStateName
    mode: SplitMode
    phase: str
    reason: Annotated[str | None, _described("why it is paused or failed, else null")]
    backing: str | None
    holes_total: int
    holes_remaining: int
    counted: Annotated[bool, _described("false: the numbers of holes are not final")]
    blocks_copied: int
    blocks_shared: int
    percent: float
    rate_bytes_per_second: int
    eta_seconds: Annotated[float | None, _described("null: unknown")]
    rate_min_bytes: Annotated[int | None, _described("null: none")]
    rate_max_bytes: Annotated[int | None, _described("null: none")]
    started_ns: int


class SplitEstimate(Row, frozen=True, kw_only=True):
    """What a split by copying would move."""

    name: str
    blocks_to_copy: int
    bytes_to_copy: int
    seconds_estimated: float


# --- The pool -------------------------------------------------------------------------------------


class NewPool(Row, frozen=True, kw_only=True):
    """A pool that was just created."""

    path: str
    uuid: str
    size_bytes: int


class Pool(Row, frozen=True, kw_only=True):
    """Size, use and state of the pool."""

    path: str
    uuid: str
    size_bytes: int
    used_bytes: int
    free_bytes: int
    available_bytes: int
    available_limited_by: Literal["pool", "host"]
    host_available_bytes: Annotated[int | None, _described("null: a block device")]
    host_full: bool
    host_full_since_ns: Annotated[int | None, _described("null: it is not full")]
    host_reserve_bytes: int
    reserve_bytes: int
    cp_number: int
    cp_seconds_last: float
    log_commits: int
    read_only: bool
    read_only_reason: str | None
    vdisks: int
    snapshots: int
    deleted_images: int
    cached_nodes: int
    background_messages: int
    full: bool
    space_warning_percent: Annotated[Literal[90, 95] | None, _described("null: less is used")]


class CheckReport(Row, frozen=True, kw_only=True):
    """What a check walked, and what it found."""

    ok: bool
    images: int
    cp_number: int
    pool_uuid: str
    size_blocks: int
    blocks_used: int
    vdisks: int
    snapshots: int
    deleted_images: int
    pointer_blocks: int
    metafile_blocks: int
    blocks_read: int
    data_blocks_verified: int
    bytes_verified: int
    log_records: int
    errors: Annotated[list[str], _described("sentences, the first 1,000")]
    errors_total: int
    notes: Annotated[list[str], _described("sentences")]


class Damage(Row, frozen=True, kw_only=True):
    """One block that a scrub found damaged."""

    where: str
    offset_bytes: int
    vbn: int
    what: str

    def __str__(self) -> str:
        return f"{self.where} at byte {self.offset_bytes}: {self.what} (VBN {self.vbn})"


class Scrub(Row, frozen=True, kw_only=True):
    """State, progress and findings of a scrub."""

    state: Literal["running", "done", "cancelled", "failed"]
    percent: float
    bytes_verified: int
    bytes_total: int
    rate_max_bytes: int
    damages: Annotated[list[Damage], _described("a list of `where, offset_bytes, vbn, what`")]
    damages_total: int


# --- Targets, access, sessions --------------------------------------------------------------------


class MappedLun(Row, frozen=True, kw_only=True):
    """One LUN of a created target."""

    lun: int
    vdisk: str | None
    uuid: str

    def __str__(self) -> str:
        return f"{self.lun}={self.vdisk or '(missing)'}"


class Target(Row, frozen=True, kw_only=True):
    """A created target."""

    COLUMNS = ("target", "luns", "initiators", "sessions")

    target: str
    luns: Annotated[
        list[MappedLun],
        _described("a list of `lun, vdisk, uuid`; `vdisk` is null where it is missing"),
    ]
    initiators: AllowedInitiators
    sessions: int


class DeletedTarget(Row, frozen=True, kw_only=True):
    """A target that was removed."""

    target: str
    deleted: bool


class AccessList(Row, frozen=True, kw_only=True):
    """The initiators that may use a target."""

    COLUMNS = ("target", "initiators")

    target: str
    initiators: AllowedInitiators


class ChangedAccessList(AccessList, frozen=True, kw_only=True):
    """A list that was just changed."""

    sessions_ended: int


class ChapUser(Row, frozen=True, kw_only=True):
    """Credentials of one initiator, without their secrets."""

    COLUMNS = ("initiator", "user", "mutual_user")

    initiator: str
    user: str
    mutual_user: Annotated[str | None, _described("null: the target proves nothing")]


class DeletedChapUser(Row, frozen=True, kw_only=True):
    """Credentials that were removed."""

    initiator: str
    deleted: bool


class Session(Row, frozen=True, kw_only=True):
    """One session: of iSCSI, or an NBD connection, whose ``target`` is the export's name. NBD has
    neither initiator names nor digests.
    """

    COLUMNS = ("id", "type", "initiator", "target", "address", "commands_in_flight")

    id: int
    type: str
    initiator: str
    target: str
    address: str
    portal: str
    tsih: int
    state: str
    header_digest: bool
    data_digest: bool
    commands_in_flight: int
    commands: int
    read_bytes: int
    write_bytes: int


class EndedSession(Row, frozen=True, kw_only=True):
    """A session that was ended."""

    id: int
    initiator: str
    target: str
    ended: bool


class Stats(Row, frozen=True, kw_only=True):
    """Counters of one vdisk since the daemon started, by the names of `storage.vdisks.counters`."""

    name: str
    reads: int
    writes: int
    read_bytes: int
    written_bytes: int
    trims: int
    flushes: int
    sessions: int


# What counts up, so that it has a rate (`cleavectl stats --watch`).
COUNTERS: Final = tuple(key for key in Stats.__struct_fields__ if key not in {"name", "sessions"})


class Portal(Row, frozen=True, kw_only=True):
    """Where a vdisk is reached, and what a login there takes."""

    name: str
    target: str
    lun: int
    portals: list[str]
    initiators: AllowedInitiators
    initiator: Annotated[
        str | None, _described("the one asked for, else the only one that may, else null")
    ]
    allowed: bool
    chap: bool
    chap_user: Annotated[str | None, _described("null: none, or not the same for all")]
    nbd: Annotated[list[str], _described("addresses and paths on which NBD is served")]
    nbd_open: Annotated[bool, _described("whether NBD clients may use it over TCP")]
