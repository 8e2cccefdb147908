"""Logical units, and the nexuses through which initiators reach them (SAM-5 4.6, 4.7).

A `LogicalUnit` is shared by all sessions that use its volume; a `UnitNexus` is one initiator port's
relation to it and holds the unit attentions that this port has not been told yet. Invariant:
``plain_read`` (``plain_write``) of a `UnitNexus` is True only while nothing but the CDB itself
decides what a READ (WRITE) does: no attention pending, unit started, no protection. A transport's
fast path asks this one flag.
"""

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from uuid import UUID

from protocol.scsi import sense
from protocol.scsi.gate import Gate
from protocol.scsi.limits import (
    FIRST_TARGET_PORT,
    PHYSICAL_BLOCK_EXPONENT,
    SECTOR_BYTES,
    UNIT_ATTENTIONS_MAX,
)
from protocol.scsi.reservations import NexusId, Reservations
from protocol.scsi.sense import Sense
from protocol.scsi.task import TransportTask
from protocol.turns import Turns
from protocol.volume import BlockVolume, Completion

Keep = Callable[["LogicalUnit", Completion], None]


def _keep_nothing(_unit: "LogicalUnit", done: Completion) -> None:
    """Without a keeper, state lasts as long as the process."""
    done(None)


@dataclass(slots=True)
class Sanitization:
    """A sanitize operation of a logical unit (SBC-3 4.11): while it is there, commands that need
    the medium fail.
    """

    unrestricted_exit: bool  # AUSE: after a failure EXIT FAILURE MODE may give up
    progress: float = 0.0
    failed: bool = False

    def cause(self) -> Sense:
        """Sense data of the commands that have to fail."""
        return sense.SANITIZE_FAILED if self.failed else sense.sanitize_in_progress(self.progress)


class LogicalUnit:
    """One disk as SCSI sees it: a volume, its state, and its nexuses.

    ``physical_block_exponent`` is what clients are told: a physical block is two to this power of
    sectors. ``target_ports()`` are the relative identifiers of all target ports through which the
    unit can be reached. ``keep`` makes durable what has to outlive a restart (`kept_state`).
    """

    __slots__ = (
        "_keep",
        "capacity_bytes",
        "descriptor_sense",
        "gate",
        "nexuses",
        "physical_block_exponent",
        "reservations",
        "sanitization",
        "saved_write_cache",
        "software_write_protect",
        "started",
        "target_ports",
        "turns",
        "volume",
        "write_cache",
    )

    def __init__(
        self,
        volume: BlockVolume,
        physical_block_exponent: int = PHYSICAL_BLOCK_EXPONENT,
        turns: Turns | None = None,
        target_ports: Callable[[], Collection[int]] = lambda: (FIRST_TARGET_PORT,),
        keep: Keep | None = None,
    ) -> None:
        self.volume = volume
        self.turns = Turns() if turns is None else turns
        self.physical_block_exponent = physical_block_exponent
        self.capacity_bytes = volume.size_bytes - volume.size_bytes % SECTOR_BYTES
        self.nexuses: list[UnitNexus] = []
        self.started = True
        self.software_write_protect = False
        self.descriptor_sense = False
        self.write_cache = True
        # A reset restores this. A client that saved the cache as switched off sends no flushes any
        # more: forgetting that would lose data.
        self.saved_write_cache = True
        self.sanitization: Sanitization | None = None  # one that runs, or that has failed
        self.gate = Gate(self.state_changed)
        self.reservations = Reservations(self.state_changed)
        self.target_ports = target_ports
        self._keep = _keep_nothing if keep is None else keep

    @property
    def in_use(self) -> bool:
        """Whether this object holds more than its volume does: nexuses, registrations (SPC-4 5.13),
        a sanitize operation, a write cache that differs from what was saved.
        """
        registered = self.reservations.registrations
        return bool(
            self.nexuses
            or registered
            or self.sanitization is not None
            or self.write_cache != self.saved_write_cache
        )

    @property
    def uuid(self) -> UUID:
        """Identity for life: every designator is made from it."""
        return self.volume.uuid

    @property
    def sectors(self) -> int:
        """Capacity in sectors of 512 bytes."""
        return self.capacity_bytes // SECTOR_BYTES

    @property
    def write_protected(self) -> bool:
        """True for a read-only volume, and while a client asked for software write protection."""
        return self.volume.read_only or self.software_write_protect

    def refresh_capacity(self) -> None:
        """Notice a resize: every nexus is told by a unit attention (SBC-3 4.7.2). Cheap enough for
        every general command.
        """
        size = self.volume.size_bytes
        size -= size % SECTOR_BYTES
        if size != self.capacity_bytes:
            self.capacity_bytes = size
            self.attention(sense.CAPACITY_DATA_CHANGED)

    def durably(self, done: Completion) -> Completion:
        """The completion for a change without a FUA bit: ``done`` itself, or, with the write cache
        switched off, a flush and then ``done``.
        """
        if self.write_cache:
            return done

        def changed(error: Exception | None) -> None:
            if error is not None:
                done(error)
            else:
                self.volume.flush(done)

        return changed

    def keep(self, done: Completion) -> None:
        """Make durable what has to outlive a restart: reservations (APTPL), saved mode pages, that
        a sanitize operation has begun.
        """
        self._keep(self, done)

    def attention(self, cause: Sense, except_for: "UnitNexus | None" = None) -> None:
        """Queue a unit attention for every nexus, or for every other one."""
        for nexus in self.nexuses:
            if nexus is not except_for:
                nexus.attention(cause)

    def reset(self) -> None:
        """Logical unit reset (SAM-5 6.3.3): state goes back to what was saved or is the default,
        and every nexus is told.
        """
        self.started = True
        self.software_write_protect = False
        self.descriptor_sense = False
        self.write_cache = self.saved_write_cache
        self.reservations.spc2_holder = None
        self.attention(sense.BUS_DEVICE_RESET)

    def retire(self) -> None:
        """Break the reference cycles, which would keep the volume alive: this object is not used
        again.
        """
        self.gate.retire()
        self.reservations.retire()
        self._keep = _keep_nothing

    def soft_threshold_reached(self) -> None:
        """The pool is filling up: every nexus is told (SBC-3 4.7.3.7, THIN PROVISIONING SOFT
        THRESHOLD REACHED).
        """
        self.attention(sense.SOFT_THRESHOLD_REACHED)

    def state_changed(self) -> None:
        """The nexuses recompute their flags: call after changing ``started``,
        ``software_write_protect``, ``write_cache`` or the like.
        """
        for nexus in self.nexuses:
            nexus.update()

    def task_set(self) -> list[TransportTask]:
        """The commands under way, of all nexuses (the control mode page says TST 000b: one task
        set).
        """
        return [task for nexus in self.nexuses for task in nexus.tasks()]


class UnitNexus:
    """One I_T_L nexus. Create it with `Nexus.map`; the flags are kept by `update`."""

    __slots__ = ("attentions", "lun", "nexus", "plain_read", "plain_write", "unit")

    def __init__(self, nexus: "Nexus", lun: int, unit: LogicalUnit) -> None:
        self.nexus = nexus
        self.lun = lun
        self.unit = unit
        self.attentions: deque[Sense] = deque(maxlen=UNIT_ATTENTIONS_MAX)
        self.plain_read = False
        self.plain_write = False
        unit.nexuses.append(self)
        self.attention(sense.POWER_ON_OCCURRED)

    def attention(self, cause: Sense) -> None:
        """Queue one unit attention, unless the same one waits already (SAM-5 5.14 allows to report
        it once).
        """
        if cause not in self.attentions:
            self.attentions.append(cause)
        self.update()

    def take_attention(self) -> Sense | None:
        """Remove and return the oldest unit attention."""
        if not self.attentions:
            return None
        cause = self.attentions.popleft()
        self.update()
        return cause

    def tasks(self) -> list[TransportTask]:
        """Commands under way that came by this nexus."""
        return [task for task in self.nexus.tasks if task.mapped is self]

    def update(self) -> None:
        """Recompute ``plain_read`` and ``plain_write`` from what they depend on."""
        unit = self.unit
        nexus, reserved = self.nexus.id, unit.reservations
        ready = not self.attentions and unit.started and unit.sanitization is None
        self.plain_read = ready and not reserved.forbids(nexus, writes=False)
        writable = unit.write_cache and not unit.write_protected and not unit.gate.closed
        self.plain_write = ready and writable and not reserved.forbids(nexus, writes=True)

    def detach(self) -> None:
        """End of the nexus."""
        self.plain_read = self.plain_write = False
        self.unit.nexuses.remove(self)
        self.unit.reservations.release_spc2(self.nexus.id)


@dataclass(slots=True)
class CopyProgress:
    """How far an EXTENDED COPY is; RECEIVE COPY RESULTS tells (SPC-4 6.18)."""

    running: bool = True
    failed: bool = False
    segments: int = 0
    copied_bytes: int = 0


class Nexus:
    """One I_T nexus: an initiator port, a target port, and the logical units between them.

    ``tasks`` are the commands under way, which the transport keeps: task management reaches those
    of other sessions through it.
    """

    __slots__ = ("copies", "id", "target_name", "tasks", "units")

    def __init__(
        self,
        initiator_port: str,
        target_name: str,
        target_port: int = FIRST_TARGET_PORT,
        tasks: Collection[TransportTask] = (),
    ) -> None:
        self.tasks = tasks
        self.id = NexusId(initiator_port, target_port)
        self.target_name = target_name
        self.units: dict[int, UnitNexus] = {}
        # Third-party copies by their list identifier, a byte: those that run, and those whose
        # outcome was not reported yet.
        self.copies: dict[int, CopyProgress] = {}

    def map(self, lun: int, unit: LogicalUnit) -> UnitNexus:
        """Make ``unit`` reachable as ``lun``."""
        mapped = UnitNexus(self, lun, unit)
        self.units[lun] = mapped
        return mapped

    def unmap(self, lun: int) -> bool:
        """``lun`` is reachable no more; False where it was not."""
        mapped = self.units.pop(lun, None)
        if mapped is not None:
            mapped.detach()
        return mapped is not None

    def attention(self, cause: Sense, except_for: int | None = None) -> None:
        """Queue a unit attention on every unit of this nexus, or on those other than one."""
        for lun, mapped in self.units.items():
            if lun != except_for:
                mapped.attention(cause)

    def close(self) -> None:
        """Detach all units."""
        for mapped in self.units.values():
            mapped.detach()
        self.units.clear()
