"""Plans: what a command asks of its transport once its CDB has been checked.

A handler returns one of four plans, and the transport carries it out: send this reply, ask for one
and send it, stream this extent to the client, or fetch this much data and start this operation.
None of them knows how data travels.
"""

from collections.abc import Callable
from dataclasses import dataclass

from protocol.volume import Buffer, Completion

OperationStart = Callable[[Buffer, Completion], None]


@dataclass(frozen=True, slots=True)
class Reply:
    """Data for the client, complete and cut to the allocation length; empty if there is only the
    status GOOD.
    """

    data: bytes = b""


@dataclass(frozen=True, slots=True)
class ReadExtent:
    """Stream ``length_bytes`` of the volume from ``offset_bytes``."""

    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Operation:
    """Fetch ``data_bytes`` from the client (fewer if it announces fewer), then call ``start(data,
    done)``.

    Where the client announces less, ``data`` is shorter, and a write writes the sectors it has;
    with ``exact`` any other length is refused before data move. ``data`` has the rule of
    `BlockVolume.write`, valid until the volume was settled, unless ``needs_owned_data`` asks for a
    copy that lives as long as the command. An ``exclusive`` one runs alone among the operations
    that are ``writing`` (`protocol.scsi.gate`). A ``detached`` one goes on when its command is
    aborted, which only suppresses the answer (SBC-3 4.11: task management does not end a sanitize
    operation).
    """

    data_bytes: int
    start: OperationStart
    writing: bool = True
    needs_owned_data: bool = False
    exact: bool = False
    exclusive: bool = False
    detached: bool = False


QueryDone = Callable[[bytes | None, Exception | None], None]


@dataclass(frozen=True, slots=True)
class Query:
    """Call ``start(done)``; what ``done`` gets is the data for the client, cut to the allocation
    length.
    """

    start: Callable[[QueryDone], None]


Plan = Reply | ReadExtent | Operation | Query
