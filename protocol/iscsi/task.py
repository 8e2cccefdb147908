"""A SCSI command under way, from its PDU to its status.

A task is *busy* while a volume holds one of its reads or writes. An aborted task that is busy stays
in the session's table, silent, until the volume lets go of it: only then is the abort answered,
because only then can it no longer touch the disk.
"""

from typing import TYPE_CHECKING, Protocol

from protocol.scsi.errors import STATUS_CHECK_CONDITION, STATUS_GOOD, ReservationConflict, sense_of
from protocol.scsi.logical_unit import UnitNexus
from protocol.scsi.sense import Sense

if TYPE_CHECKING:
    from protocol.iscsi.full_feature import FullFeature


class Watcher(Protocol):
    """Who wants to know when a task has ended."""

    def task_ended(self, task: "Task") -> None:
        """No volume holds anything of ``task`` any more."""


class Task:
    """What the session's table holds for every command: who it is, and how it ends."""

    __slots__ = (
        "aborted",
        "busy",
        "changes",
        "expected_bytes",
        "immediate",
        "itt",
        "mapped",
        "phase",
        "reserved_bytes",
        "wanted_bytes",
        "watchers",
    )

    def __init__(
        self,
        phase: "FullFeature",
        itt: int,
        mapped: UnitNexus | None,
        expected_bytes: int,
        immediate: bool,
    ) -> None:
        self.phase = phase
        self.itt = itt
        self.mapped = mapped
        self.expected_bytes = expected_bytes  # what the initiator's PDU announces
        self.wanted_bytes = 0  # what the CDB asks for; the two make the residual
        self.immediate = immediate
        self.busy = False
        self.changes = False  # True for what alters sectors: exclusive commands wait for it
        self.aborted = False
        self.watchers: tuple[Watcher, ...] = ()  # of this session or of another
        self.reserved_bytes = 0  # taken from the session's write buffer allowance

    def abort(self) -> None:
        """Go silent; end now if no volume holds anything of this task, else when it lets go."""
        if self.aborted:
            return
        self.aborted = True
        if not self.busy:
            self.phase.task_ended(self)

    def end(
        self,
        sequence_count: int = 0,
        cause: Sense | None = None,
        status: int = STATUS_GOOD,
        moved: int | None = None,
    ) -> None:
        """Send the SCSI Response. ``sequence_count`` is the number of R2T or Data-In PDUs sent,
        ``moved`` the bytes transferred.
        """
        self.phase.respond(
            self,
            STATUS_CHECK_CONDITION if cause is not None else status,
            cause,
            sequence_count,
            moved,
        )

    def fail(
        self, error: Exception, writing: bool, sequence_count: int = 0, moved: int | None = None
    ) -> None:
        """End with the sense data of what a volume reported, or with the status of what the
        operation found.
        """
        if isinstance(error, ReservationConflict):
            self.end(sequence_count, status=error.status, moved=moved)
            return
        self.end(sequence_count, sense_of(error, writing), moved=moved)

    def let_go(self) -> bool:
        """A volume's completion has come: True when the task was aborted meanwhile and has now
        ended.
        """
        self.busy = False
        if self.aborted:
            self.phase.task_ended(self)
        return self.aborted
