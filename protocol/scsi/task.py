"""What SCSI asks of a transport's tasks, and how they are aborted.

An aborted task that a volume still holds may yet change the disk. Task management and PREEMPT AND
ABORT are answered only when none of the tasks that they abort can do so any more.
"""

from collections.abc import Callable, Iterable
from typing import Protocol


class TransportTask(Protocol):
    """A command under way, of any session that uses the logical unit."""

    @property
    def busy(self) -> bool:
        """A volume holds one of its reads or writes."""

    @property
    def changes(self) -> bool:
        """It alters sectors."""

    @property
    def mapped(self) -> object:
        """The `UnitNexus` that it came by."""

    watchers: "tuple[TaskWatcher, ...]"

    def abort(self) -> None:
        """Go silent; end now, or when the volume has completed what it holds of this task."""


class TaskWatcher(Protocol):
    """Is told when a task has ended."""

    def task_ended(self, task: TransportTask) -> None:
        """No volume holds anything of ``task`` any more."""


class Abort:
    """The watcher of tasks that were aborted together. ``ended`` is called once, when no volume
    holds anything of them.
    """

    __slots__ = ("_busy", "_ended")

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended
        self._busy = 0

    def start(self, tasks: Iterable[TransportTask]) -> None:
        """Abort them all; ``ended`` may be called before this returns."""
        for task in tasks:
            task.abort()
            if task.busy:
                self._busy += 1
                task.watchers = (*task.watchers, self)
        if not self._busy:
            self._ended()

    def task_ended(self, task: TransportTask) -> None:
        """One of them has ended."""
        self._busy -= 1
        if not self._busy:
            self._ended()
