"""Task management (RFC 7143 11.5, 11.6; SAM-5 clause 7): abort and reset.

A function is answered when the last of its aborted commands has ended: one that a volume still
holds may change the disk until then.
"""

from collections.abc import Callable, Iterable
from typing import ClassVar, Final

from protocol.iscsi.limits import TASK_MANAGEMENT_WAITING_MAX
from protocol.iscsi.node import TargetNode
from protocol.iscsi.pdu import REJECT_IMMEDIATE, TASK_MANAGEMENT_RESPONSE, Pdu
from protocol.iscsi.session import Session
from protocol.scsi import sense
from protocol.scsi.logical_unit import LogicalUnit, UnitNexus
from protocol.scsi.lun import decode_lun
from protocol.scsi.task import Abort, TransportTask

ABORT_TASK: Final = 1
ABORT_TASK_SET: Final = 2
CLEAR_TASK_SET: Final = 4
LOGICAL_UNIT_RESET: Final = 5
TARGET_WARM_RESET: Final = 6
TARGET_COLD_RESET: Final = 7
TASK_REASSIGN: Final = 8

COMPLETE: Final = 0
NO_TASK: Final = 1
NO_LUN: Final = 2
NO_REASSIGNMENT: Final = 4
NOT_SUPPORTED: Final = 5
REJECTED: Final = 255


class TaskManagement:
    """The functions of one session.

    Invariant: ``_waiting`` is the number of functions whose answer waits for tasks, of this session
    and of others.
    """

    __slots__ = ("_node", "_session", "_waiting")

    def __init__(self, session: Session, node: TargetNode) -> None:
        self._session = session
        self._node = node
        self._waiting = 0

    def handle(self, pdu: Pdu) -> None:
        """Carry out one function by the table."""
        function = self._FUNCTIONS.get(pdu.flags & 0x7F)
        if self._waiting >= TASK_MANAGEMENT_WAITING_MAX:
            self._refuse(pdu)
        elif function is None:
            self._answer(pdu.itt, NOT_SUPPORTED)
        else:
            function(self, pdu)

    def _refuse(self, pdu: Pdu) -> None:
        if pdu.immediate:
            self._session.reject(pdu, REJECT_IMMEDIATE)
        else:
            self._answer(pdu.itt, REJECTED)

    def _answer(self, itt: int, outcome: int) -> None:
        self._session.sender.put(
            self._session.response_header(TASK_MANAGEMENT_RESPONSE, itt, byte2=outcome)
        )

    def _abort(self, itt: int, tasks: Iterable[TransportTask], cold: bool = False) -> None:
        """Abort, and answer now or when the last has ended."""

        def ended() -> None:
            self._waiting -= 1
            self._answer(itt, COMPLETE)
            if cold:
                self._node.terminate_target(self._session.target_name)
            self._session.sender.wake()

        self._waiting += 1
        Abort(ended).start(tasks)

    def _mapped(self, pdu: Pdu) -> UnitNexus | None:
        mapped = self._session.nexus.units.get(decode_lun(pdu.lun))
        if mapped is None:
            self._answer(pdu.itt, NO_LUN)
        return mapped

    def _abort_task(self, pdu: Pdu) -> None:
        task = self._session.tasks.get(pdu.word20)
        if task is None:
            self._answer(pdu.itt, NO_TASK)
        else:
            self._abort(pdu.itt, (task,))

    def _abort_task_set(self, pdu: Pdu) -> None:
        mapped = self._mapped(pdu)
        if mapped is not None:
            self._abort(pdu.itt, mapped.tasks())

    def _clear_task_set(self, pdu: Pdu) -> None:
        """All sessions' tasks on the unit; the others are told."""
        mapped = self._mapped(pdu)
        if mapped is None:
            return
        tasks = mapped.unit.task_set()
        for nexus in mapped.unit.nexuses:
            if nexus is not mapped and nexus.tasks():
                nexus.attention(sense.COMMANDS_CLEARED_BY_ANOTHER)
        self._abort(pdu.itt, tasks)

    def _reset(self, units: Iterable[LogicalUnit]) -> list[TransportTask]:
        tasks: list[TransportTask] = []
        for unit in units:
            tasks += unit.task_set()
            unit.reset()
        return tasks

    def _logical_unit_reset(self, pdu: Pdu) -> None:
        mapped = self._mapped(pdu)
        if mapped is not None:
            self._abort(pdu.itt, self._reset((mapped.unit,)))

    def _target_reset(self, pdu: Pdu) -> None:
        self._abort(
            pdu.itt, self._reset([mapped.unit for mapped in self._session.nexus.units.values()])
        )

    def _target_cold_reset(self, pdu: Pdu) -> None:
        """The same, and then every session of the target ends, this one too (RFC 7143 11.5.1)."""
        self._abort(
            pdu.itt,
            self._reset([mapped.unit for mapped in self._session.nexus.units.values()]),
            cold=True,
        )

    def _reassign(self, pdu: Pdu) -> None:
        self._answer(pdu.itt, NO_REASSIGNMENT)

    _FUNCTIONS: ClassVar[dict[int, Callable[["TaskManagement", Pdu], None]]] = {
        ABORT_TASK: _abort_task,
        ABORT_TASK_SET: _abort_task_set,
        CLEAR_TASK_SET: _clear_task_set,
        LOGICAL_UNIT_RESET: _logical_unit_reset,
        TARGET_WARM_RESET: _target_reset,
        TARGET_COLD_RESET: _target_cold_reset,
        TASK_REASSIGN: _reassign,
    }
