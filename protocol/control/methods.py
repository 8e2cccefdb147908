"""The methods of the control socket: names, typed parameters, and what each answers.

Methods are named as the commands of `cleavectl`. Sizes are bytes, rates bytes a second. Unknown
parameters are refused, so that a misspelt one is never silently ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

from protocol.control.errors import INVALID_PARAMS, UNKNOWN_METHOD, ControlError
from protocol.control.limits import (
    ACL_INITIATORS_MAX,
    CHAP_CHARACTERS_MAX,
    CHAP_SECRET_CHARACTERS_MIN,
    GROUP_SNAPSHOTS_MAX,
    ISCSI_NAME_CHARACTERS_MAX,
    LUN_MAX,
    NAME_CHARACTERS_MAX,
    REFERENCE_CHARACTERS_MAX,
)

# A vdisk's name ends an iSCSI name, where RFC 7143 4.2.7.1 allows letters, digits, dash, dot and
# colon; the underscore is an addition that initiators take too. Nothing else, so that names need no
# quoting in URLs and shells.
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._:-]*"
_NAME_PATTERN: Final = rf"^{_NAME}\Z"
_REFERENCE_PATTERN: Final = rf"^{_NAME}@{_NAME}\Z"
Name = Annotated[
    str, msgspec.Meta(min_length=1, max_length=NAME_CHARACTERS_MAX, pattern=_NAME_PATTERN)
]
Reference = Annotated[
    str, msgspec.Meta(min_length=3, max_length=REFERENCE_CHARACTERS_MAX, pattern=_REFERENCE_PATTERN)
]
# RFC 7143 4.2.7.2, in the characters that need no preparation (4.2.7.1), and the underscore, which
# initiators use too.
ISCSI_NAME: Final = (
    r"(?:[iI][qQ][nN]\.[0-9]{4}-[0-9]{2}\.[A-Za-z0-9][A-Za-z0-9._:-]*"
    r"|[eE][uU][iI]\.[0-9A-Fa-f]{16}|[nN][aA][aA]\.[0-9A-Fa-f]{16}(?:[0-9A-Fa-f]{16})?)"
)
_ISCSI_PATTERN: Final = rf"^{ISCSI_NAME}\Z"
Initiator = Annotated[
    str, msgspec.Meta(max_length=ISCSI_NAME_CHARACTERS_MAX, pattern=_ISCSI_PATTERN)
]
# An iSCSI name, or what follows the prefix that the daemon gives: the characters are the same.
TargetReference = Annotated[
    str, msgspec.Meta(min_length=1, max_length=ISCSI_NAME_CHARACTERS_MAX, pattern=_NAME_PATTERN)
]
_PATTERN_WORDS: Final = {
    _NAME_PATTERN: (
        "a name of letters, digits, '.', '_', '-' and ':' that begins with a letter or digit"
    ),
    _REFERENCE_PATTERN: "VDISK@SNAPSHOT, each a name of letters, digits, '.', '_', '-' and ':'",
    _ISCSI_PATTERN: "an iSCSI name, as in iqn.1993-08.org.debian:01:9a3c",
}
Lun = Annotated[int, msgspec.Meta(ge=0, le=LUN_MAX)]
ChapName = Annotated[str, msgspec.Meta(min_length=1, max_length=CHAP_CHARACTERS_MAX)]
ChapSecret = Annotated[
    str, msgspec.Meta(min_length=CHAP_SECRET_CHARACTERS_MIN, max_length=CHAP_CHARACTERS_MAX)
]
SizeBytes = Annotated[int, msgspec.Meta(gt=0)]

# Notifications that a client can subscribe to.
SPLIT_PROGRESS: Final = "split.progress"
EventName = Literal["split.progress"]


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of one method; a method without any takes this class itself."""


class Hello(Params, frozen=True, kw_only=True):
    """Who calls, for the log."""

    client: Annotated[str, msgspec.Meta(max_length=NAME_CHARACTERS_MAX)]
    protocol: int


class Subscribe(Params, frozen=True, kw_only=True):
    """Notifications wanted from now on; the list replaces the one before."""

    events: Annotated[list[EventName], msgspec.Meta(max_length=16)]


class Named(Params, frozen=True, kw_only=True):
    """One vdisk (or its split, or its counters)."""

    name: Name


class VdiskCreate(Params, frozen=True, kw_only=True):
    """A new, empty vdisk."""

    name: Name
    size_bytes: SizeBytes


class VdiskResize(Params, frozen=True, kw_only=True):
    """Larger adds zeros. Smaller cuts the end off, with the data in it, and is refused unless
    ``shrink`` is true.
    """

    name: Name
    size_bytes: SizeBytes
    shrink: bool = False


class VdiskRename(Params, frozen=True, kw_only=True):
    """The iSCSI target name follows the new name."""

    name: Name
    new_name: Name


class SnapshotCreate(Params, frozen=True, kw_only=True):
    """Each is VDISK@SNAPSHOT; all are of one moment, or none is made."""

    snapshots: Annotated[
        list[Reference], msgspec.Meta(min_length=1, max_length=GROUP_SNAPSHOTS_MAX)
    ]


class SnapshotList(Params, frozen=True, kw_only=True):
    """Of one vdisk, or of all."""

    vdisk: Name | None = None


class SnapshotDelete(Params, frozen=True, kw_only=True):
    """``after_split``: where clones stand on it, delete it when the last of them has been split."""

    snapshot: Reference
    after_split: bool = False


class CloneCreate(Params, frozen=True, kw_only=True):
    """A writable clone of a snapshot; ``split`` starts its split at once."""

    snapshot: Reference
    name: Name
    split: bool = False


class SplitStart(Params, frozen=True, kw_only=True):
    """``copy`` moves data, ``share`` takes the backing store's own pointers. Rates are floors and
    ceilings of the copying.
    """

    name: Name
    mode: Literal["copy", "share"] = "copy"
    rate_min_bytes: SizeBytes | None = None
    rate_max_bytes: SizeBytes | None = None


class Target(Params, frozen=True, kw_only=True):
    """One target: an iSCSI name, or the NAME after the daemon's own prefix."""

    target: TargetReference


class TargetMap(Params, frozen=True, kw_only=True):
    """A vdisk becomes a LUN of a created target; without a number, the lowest free one."""

    target: TargetReference
    vdisk: Name
    lun: Lun | None = None


class TargetUnmap(Params, frozen=True, kw_only=True):
    """The LUN is named by its vdisk or by its number: exactly one of them."""

    target: TargetReference
    vdisk: Name | None = None
    lun: Lun | None = None


class AclAdd(Params, frozen=True, kw_only=True):
    """Initiators that may use a target; from the first one on, nobody else may."""

    target: TargetReference
    initiators: Annotated[
        list[Initiator], msgspec.Meta(min_length=1, max_length=ACL_INITIATORS_MAX)
    ]


class AclRemove(Params, frozen=True, kw_only=True):
    """An initiator that may not use a target any more. A list that becomes empty stays, and lets
    nobody in.
    """

    target: TargetReference
    initiator: Initiator


class AclList(Params, frozen=True, kw_only=True):
    """Of one target, or of all."""

    target: TargetReference | None = None


class ChapSet(Params, frozen=True, kw_only=True):
    """What an initiator must prove; with the ``mutual`` pair, what the target proves to it."""

    initiator: Initiator
    user: ChapName
    secret: ChapSecret
    mutual_user: ChapName | None = None
    mutual_secret: ChapSecret | None = None

    def __repr__(self) -> str:
        return f"ChapSet(initiator={self.initiator!r}, user={self.user!r})"


class OneInitiator(Params, frozen=True, kw_only=True):
    """An initiator, by its iSCSI name."""

    initiator: Initiator


class SessionEnd(Params, frozen=True, kw_only=True):
    """``id`` as ``session.ls`` shows it."""

    id: Annotated[int, msgspec.Meta(ge=1)]


class Connect(Params, frozen=True, kw_only=True):
    """What a client needs to use a vdisk; what it must prove and whether it may depends on its
    ``initiator`` name.
    """

    name: Name
    initiator: Initiator | None = None


class PoolCheck(Params, frozen=True, kw_only=True):
    """``verify_data`` reads every data block too, and compares its checksum."""

    verify_data: bool = False


class PoolScrub(Params, frozen=True, kw_only=True):
    """``rate_max_bytes``: a ceiling, bytes a second; without it the pool's own."""

    rate_max_bytes: SizeBytes | None = None


class Method(NamedTuple):
    """A method's parameters and its description in ``rpc.list``."""

    params: type[Params]
    summary: str


METHODS: Final[Mapping[str, Method]] = {
    "hello": Method(
        Hello, "first call: names the client; answers server, version, protocol and pool"
    ),
    "rpc.list": Method(Params, "describe all methods"),
    "rpc.subscribe": Method(Subscribe, "choose the notifications that this connection gets"),
    "vdisk.create": Method(VdiskCreate, "create an empty vdisk"),
    "vdisk.ls": Method(Params, "list all vdisks"),
    "vdisk.show": Method(Named, "one vdisk in full"),
    "vdisk.resize": Method(VdiskResize, "change a vdisk's size; a smaller one wants shrink"),
    "vdisk.rename": Method(VdiskRename, "rename a vdisk"),
    "vdisk.rm": Method(Named, "delete a vdisk; its space is reclaimed in the background"),
    "snapshot.create": Method(SnapshotCreate, "take snapshots, all at one moment"),
    "snapshot.ls": Method(SnapshotList, "list snapshots"),
    "snapshot.rm": Method(
        SnapshotDelete, "delete a snapshot; its space is reclaimed in the background"
    ),
    "clone.create": Method(CloneCreate, "create a clone of a snapshot"),
    "split.start": Method(SplitStart, "start to split a clone from its backing store"),
    "split.show": Method(Named, "state and progress of one split"),
    "split.ls": Method(Params, "state and progress of all splits"),
    "split.pause": Method(Named, "pause a split"),
    "split.resume": Method(Named, "resume a paused split"),
    "split.cancel": Method(Named, "cancel a split; the clone keeps its backing store"),
    "split.estimate": Method(Named, "how much a split would copy, and how long that takes"),
    "pool.show": Method(Params, "size, use and state of the pool"),
    "pool.check": Method(PoolCheck, "check the whole pool while it serves"),
    "pool.scrub": Method(PoolScrub, "read and verify every block in use, in the background"),
    "pool.scrub_show": Method(Params, "state, progress and findings of the last scrub"),
    "pool.scrub_cancel": Method(Params, "end the scrub"),
    "target.create": Method(Target, "create a target without LUNs, beside the vdisks' own"),
    "target.ls": Method(Params, "list the targets that were created"),
    "target.rm": Method(Target, "remove a created target; its vdisks stay"),
    "target.map": Method(TargetMap, "make a vdisk a LUN of a created target"),
    "target.unmap": Method(TargetUnmap, "take a LUN out of a created target"),
    "acl.add": Method(AclAdd, "let initiators use a target, and from then on nobody else"),
    "acl.rm": Method(AclRemove, "take an initiator off a target's list, and end its sessions"),
    "acl.clear": Method(Target, "remove a target's list"),
    "acl.ls": Method(AclList, "the lists of initiators"),
    "chap.set": Method(ChapSet, "set what an initiator must prove"),
    "chap.rm": Method(OneInitiator, "remove an initiator's credentials"),
    "chap.ls": Method(Params, "which initiators have credentials, without their secrets"),
    "session.ls": Method(Params, "list the iSCSI sessions"),
    "session.end": Method(
        SessionEnd,
        "end an iSCSI session: its initiator is asked to log out, and cut off if it does not",
    ),
    "stats": Method(Named, "counters of one vdisk since the daemon started"),
    "connect": Method(Connect, "what a client needs to connect to a vdisk"),
}


def validate(method: str, params: Any) -> Params:
    """Typed parameters of a request. Raises ControlError (UNKNOWN_METHOD, INVALID_PARAMS) with a
    sentence on what would be right.
    """
    known = METHODS.get(method)
    if known is None:
        raise ControlError(
            UNKNOWN_METHOD, f"there is no method {method!r}", "rpc.list names them all"
        )
    try:
        return msgspec.convert(_named(params), known.params)
    except msgspec.ValidationError as error:
        raise ControlError(
            INVALID_PARAMS,
            f"{method}: {_in_words(str(error))}",
            f"{method} takes {_signature(known.params)}",
        ) from None


def _in_words(message: str) -> str:
    """A pattern that a name must match is what msgspec shows; people are told what it says."""
    for pattern, words in _PATTERN_WORDS.items():
        message = message.replace(f"`str` matching regex {pattern!r}", words)
    return message


def _named(params: Any) -> Any:
    """The map of parameters: itself, or the only item of an array; nothing counts as an
    empty one.
    """
    if params is None or params == []:
        return {}
    if isinstance(params, list) and len(params) == 1:
        return params[0]
    return params


def describe() -> list[dict[str, Any]]:
    """The answer to ``rpc.list``: method, summary, and params with name, JSON schema
    and default.
    """
    return [
        {"method": name, "summary": method.summary, "params": _describe_params(method.params)}
        for name, method in METHODS.items()
    ]


def _describe_params(params: type[Params]) -> list[dict[str, Any]]:
    _, components = msgspec.json.schema_components([params])
    found = components[params.__name__]
    return [
        {"name": name, "required": name in found["required"], "schema": schema}
        for name, schema in found["properties"].items()
    ]


def _signature(params: type[Params]) -> str:
    fields = msgspec.structs.fields(params)
    if not fields:
        return "no parameters"
    return ", ".join(
        field.encode_name if field.required else f"[{field.encode_name}]" for field in fields
    )
