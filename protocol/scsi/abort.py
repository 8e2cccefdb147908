"""Aborting commands, and knowing when that is true: an aborted command that a volume still holds
may yet change the disk.

Task management and PREEMPT AND ABORT share this.
"""

from collections.abc import Callable, Iterable

from protocol.scsi.logical_unit import TransportTask


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
        """No volume holds anything of one of them any more."""
        self._busy -= 1
        if not self._busy:
            self._ended()
