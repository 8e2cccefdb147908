"""SANITIZE (SBC-3 4.11, 5.30): every sector of the unit is overwritten or deallocated, and no other
access is possible meanwhile.

The operation belongs to the logical unit and not to the command or the session that began it:
resets, aborts and the end of the session do not end it, and after a restart of the daemon it has
failed (`StateKeeper` keeps that it began). It goes through the volume in steps, each made durable
before the next begins, and returns to the event loop between them. A pool writes nothing in place:
what is promised is that the old blocks cannot be reached, except through snapshots.
"""

from typing import Final

from protocol.scsi import limits, opcodes, sense
from protocol.scsi.command import NO_DATA, Command, Request
from protocol.scsi.errors import CheckCondition
from protocol.scsi.limits import SECTOR_BYTES
from protocol.scsi.logical_unit import LogicalUnit, Sanitization
from protocol.scsi.plan import Operation, Plan
from protocol.volume import Buffer, Completion

OVERWRITE: Final = 0x01
BLOCK_ERASE: Final = 0x02
EXIT_FAILURE_MODE: Final = 0x1F
_IMMED: Final = 0x80
_AUSE: Final = 0x20
_INVERT: Final = 0x80
_COUNT: Final = 0x1F
_HEAD_BYTES: Final = 4


class _Sanitizing:
    """One operation under way. `_run` loops: a completion that comes at once does not recurse."""

    __slots__ = (
        "_answered",
        "_done",
        "_offset",
        "_pattern",
        "_running",
        "_state",
        "_step_bytes",
        "_unit",
    )

    def __init__(
        self, unit: LogicalUnit, state: Sanitization, sector: bytes | None, done: Completion
    ) -> None:
        self._unit = unit
        self._state = state
        self._done = done
        self._offset = 0
        self._step_bytes = (
            limits.SANITIZE_ERASE_STEP_BYTES if sector is None else limits.SANITIZE_STEP_BYTES
        )
        self._pattern = (
            None if sector is None else memoryview(sector * (self._step_bytes // SECTOR_BYTES))
        )
        self._running = False
        self._answered = True

    def start(self) -> None:
        """Begin; ``done`` is called once at the end."""
        self._run()

    def _run(self) -> None:
        if self._running:
            return
        self._running = True
        while self._answered:
            if self._offset >= self._unit.capacity_bytes:
                self._end(None)
                break
            self._answered = False
            self._step()
        self._running = False

    def _step(self) -> None:
        volume = self._unit.volume
        size = min(self._step_bytes, self._unit.capacity_bytes - self._offset)
        if self._pattern is None:
            volume.unmap(self._offset, size, self._changed)
        else:
            volume.write(self._offset, self._pattern[:size], False, self._changed)
            volume.settle()
        self._offset += size

    def _changed(self, error: Exception | None) -> None:
        if error is not None:
            self._end(error)
        else:
            self._unit.volume.flush(self._durable)

    def _durable(self, error: Exception | None) -> None:
        if error is not None:
            self._end(error)
            return
        self._state.progress = self._offset / max(1, self._unit.capacity_bytes)
        self._answered = True
        self._run()

    def _end(self, error: Exception | None) -> None:
        if error is not None:
            self._kept(error)
            return
        self._unit.sanitization = None
        self._unit.keep(self._kept)

    def _kept(self, error: Exception | None) -> None:
        """A failure stays with the unit until another operation succeeds, or the client exits
        failure mode (SBC-3 4.11.4).
        """
        if error is not None:
            self._unit.sanitization = self._state
            self._state.failed = True
        self._unit.state_changed()
        self._done(None if error is None else CheckCondition(sense.SANITIZE_FAILED))


def _begin(request: Request, sector: bytes | None, done: Completion) -> None:
    """Overwrite with ``sector``, or deallocate if that is None. With IMMED the command ends when
    the beginning of the operation is durable.
    """
    unit, before = request.unit, request.unit.sanitization
    state = unit.sanitization = Sanitization(bool(request.cdb[1] & _AUSE))
    unit.state_changed()

    def kept(error: Exception | None) -> None:
        if error is not None:  # nothing was changed yet
            unit.sanitization = before
            unit.state_changed()
            done(error)
        elif request.cdb[1] & _IMMED:
            done(None)
            _Sanitizing(unit, state, sector, _tell_nobody).start()
        else:
            _Sanitizing(unit, state, sector, done).start()

    unit.keep(kept)


def _tell_nobody(_error: Exception | None) -> None:
    """The command ended before; the outcome of the operation is in the unit's state."""


def _overwrite_sector(data: bytes) -> bytes:
    """The final content of every sector: the pattern repeated, inverted with each pass if asked
    (SBC-3 5.30.2.2).
    """
    count, pattern_bytes = data[0] & _COUNT, int.from_bytes(data[2:4], "big")
    if count == 0 or data[0] & 0x60:
        raise CheckCondition(sense.invalid_field_in_parameter_list(0))
    if not 0 < pattern_bytes <= min(SECTOR_BYTES, len(data) - _HEAD_BYTES):
        raise CheckCondition(sense.invalid_field_in_parameter_list(2))
    pattern = data[_HEAD_BYTES : _HEAD_BYTES + pattern_bytes]
    sector = (pattern * (SECTOR_BYTES // pattern_bytes + 1))[:SECTOR_BYTES]
    inverted = data[0] & _INVERT and count % 2 == 0
    return bytes(255 - byte for byte in sector) if inverted else sector


def overwrite(request: Request) -> Plan:
    """SANITIZE, OVERWRITE. One pass has the effect of several, since no pass would reach the blocks
    of the one before it.
    """
    list_bytes = int.from_bytes(request.cdb[7:9], "big")
    if not _HEAD_BYTES < list_bytes <= _HEAD_BYTES + SECTOR_BYTES:
        raise CheckCondition(sense.invalid_field_in_cdb(7))

    def start(data: Buffer, done: Completion) -> None:
        received = bytes(data)
        try:
            if len(received) < list_bytes:
                raise CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
            sector = _overwrite_sector(received)
        except CheckCondition as error:
            done(error)
            return
        _begin(request, sector, done)

    return Operation(list_bytes, start, exclusive=True, detached=True)


def block_erase(request: Request) -> Plan:
    """SANITIZE, BLOCK ERASE: everything is deallocated."""
    if any(request.cdb[7:9]):
        raise CheckCondition(sense.invalid_field_in_cdb(7))
    return Operation(0, lambda _, done: _begin(request, None, done), exclusive=True, detached=True)


def exit_failure_mode(request: Request) -> Plan:
    """SANITIZE, EXIT FAILURE MODE: only after an operation that was begun with AUSE."""
    if any(request.cdb[7:9]):
        raise CheckCondition(sense.invalid_field_in_cdb(7))
    unit = request.unit
    if unit.sanitization is None:
        return NO_DATA
    if not unit.sanitization.unrestricted_exit:
        raise CheckCondition(sense.invalid_field_in_cdb(1, 4))

    def start(_data: Buffer, done: Completion) -> None:
        unit.sanitization = None
        unit.state_changed()
        unit.keep(done)

    return Operation(0, start, writing=False)


COMMANDS: Final = tuple(
    Command(
        opcodes.SANITIZE,
        f"SANITIZE, {name}",
        "bf0000000000ffff00",
        handler,
        service_action=action,
        needs_medium=True,
        writes=True,
        after_failed_sanitize=True,
    )
    for action, name, handler in (
        (OVERWRITE, "OVERWRITE", overwrite),
        (BLOCK_ERASE, "BLOCK ERASE", block_erase),
        (EXIT_FAILURE_MODE, "EXIT FAILURE MODE", exit_failure_mode),
    )
)
