"""Types of parameters: what a name, a reference, a LUN and so on may be."""

from typing import Annotated, Final, Literal

import msgspec

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
from protocol.names import ISCSI_NAME, NAME

_NAME_PATTERN: Final = rf"^{NAME}\Z"
_REFERENCE_PATTERN: Final = rf"^{NAME}@{NAME}\Z"
_ISCSI_PATTERN: Final = rf"^{ISCSI_NAME}\Z"
# What an error says instead of a pattern.
PATTERN_WORDS: Final = {
    _NAME_PATTERN: (
        "a name of letters, digits, '.', '_', '-' and ':' that begins with a letter or digit"
    ),
    _REFERENCE_PATTERN: "VDISK@SNAPSHOT, each a name of letters, digits, '.', '_', '-' and ':'",
    _ISCSI_PATTERN: "an iSCSI name, as in iqn.1993-08.org.debian:01:9a3c",
}

Name = Annotated[
    str, msgspec.Meta(min_length=1, max_length=NAME_CHARACTERS_MAX, pattern=_NAME_PATTERN)
]
# VDISK@SNAPSHOT.
Reference = Annotated[
    str, msgspec.Meta(min_length=3, max_length=REFERENCE_CHARACTERS_MAX, pattern=_REFERENCE_PATTERN)
]
References = Annotated[list[Reference], msgspec.Meta(min_length=1, max_length=GROUP_SNAPSHOTS_MAX)]
Initiator = Annotated[
    str, msgspec.Meta(max_length=ISCSI_NAME_CHARACTERS_MAX, pattern=_ISCSI_PATTERN)
]
Initiators = Annotated[list[Initiator], msgspec.Meta(min_length=1, max_length=ACL_INITIATORS_MAX)]
# An iSCSI name, or what follows the prefix that the daemon gives: the characters are the same.
TargetReference = Annotated[
    str, msgspec.Meta(min_length=1, max_length=ISCSI_NAME_CHARACTERS_MAX, pattern=_NAME_PATTERN)
]
Lun = Annotated[int, msgspec.Meta(ge=0, le=LUN_MAX)]
ChapName = Annotated[str, msgspec.Meta(min_length=1, max_length=CHAP_CHARACTERS_MAX)]
ChapSecret = Annotated[
    str, msgspec.Meta(min_length=CHAP_SECRET_CHARACTERS_MIN, max_length=CHAP_CHARACTERS_MAX)
]
SizeBytes = Annotated[int, msgspec.Meta(gt=0)]
SessionId = Annotated[int, msgspec.Meta(ge=1)]
ClientName = Annotated[str, msgspec.Meta(max_length=NAME_CHARACTERS_MAX)]
SplitMode = Literal["copy", "share"]
EventName = Literal["split.progress"]
EventNames = Annotated[list[EventName], msgspec.Meta(max_length=16)]
