"""Aborting commands, and knowing when that is true: an aborted command that a volume still holds
may yet change the disk.

Task management and PREEMPT AND ABORT share this. Tasks are the transport's, of any session that
uses the logical unit.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from protocol.scsi.logical_unit import UnitNexus


class AbortedTask(Protocol):
    """What this module asks of a transport's task."""

    @property
    def busy(self) -> bool:
        """A volume holds one of its reads or writes."""

    @property
    def mapped(self) -> UnitNexus | None:
        """The nexus that it came by."""

    watchers: tuple[Any, ...]

    def abort(self) -> None:
        """Go silent; end now if no volume holds anything of this task, else when it lets go."""


class Abort:
    """The watcher of tasks that were aborted together. ``ended`` is called once, when no volume
    holds anything of them.
    """

    __slots__ = ("_busy", "_ended")

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended
        self._busy = 0

    def start(self, tasks: Iterable[AbortedTask]) -> None:
        """Abort them all; ``ended`` may be called before this returns."""
        for task in tasks:
            task.abort()
            if task.busy:
                self._busy += 1
                task.watchers = (*task.watchers, self)
        if not self._busy:
            self._ended()

    def task_ended(self, task: object) -> None:
        """A volume has let go of one of them."""
        self._busy -= 1
        if not self._busy:
            self._ended()


def tasks_of(mapped: UnitNexus) -> list[Any]:
    """Commands under way that came by this nexus."""
    return [task for task in mapped.nexus.tasks() if task.mapped is mapped]
