"""Reservations of one logical unit (SPC-4 5.13; RESERVE(6) of SPC-2 8.1): registrations, holders,
and what they forbid.

Registrations belong to an I_T nexus (`NexusId`): initiator port (iSCSI name and ISID) and target
port. An initiator port that reaches the unit through two targets has two. They outlive sessions.
Invariants: ``generation`` never goes back; ``kind`` is 0 exactly when there is no holder; the
holder is registered (`Reservations.held_by` says of whom it is the holder); a holder by RESERVE(6)
(``spc2_holder``) and registrations are never there at once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from protocol.names import TARGET_PORT, fold, target_port

WRITE_EXCLUSIVE: Final = 1
EXCLUSIVE_ACCESS: Final = 3
WRITE_EXCLUSIVE_REGISTRANTS: Final = 5
EXCLUSIVE_ACCESS_REGISTRANTS: Final = 6
WRITE_EXCLUSIVE_ALL: Final = 7
EXCLUSIVE_ACCESS_ALL: Final = 8
ALL_REGISTRANTS_KINDS: Final = frozenset((WRITE_EXCLUSIVE_ALL, EXCLUSIVE_ACCESS_ALL))
REGISTRANTS_KINDS: Final = ALL_REGISTRANTS_KINDS | {
    WRITE_EXCLUSIVE_REGISTRANTS,
    EXCLUSIVE_ACCESS_REGISTRANTS,
}
EXCLUSIVE_KINDS: Final = frozenset(
    (EXCLUSIVE_ACCESS, EXCLUSIVE_ACCESS_REGISTRANTS, EXCLUSIVE_ACCESS_ALL)
)
KINDS: Final = REGISTRANTS_KINDS | EXCLUSIVE_KINDS | {WRITE_EXCLUSIVE}
_GENERATION_MASK: Final = 0xFFFFFFFF
# A cluster has tens of nodes with a few paths each; an initiator must not fill memory with
# registrations.
REGISTRATIONS_MAX: Final = 1024
# The target port of a holder that an earlier version stored, which registered an initiator port for
# all target ports together.
ANY_TARGET_PORT: Final = 0


class NexusId(NamedTuple):
    """An I_T nexus by the names of its ends: the initiator port, and the relative port identifier
    of the target port (SPC-4 7.8.6.8).
    """

    initiator_port: str
    target_port: int

    def __str__(self) -> str:
        """As it is stored. Without a target port: as earlier versions stored it."""
        if self.target_port == ANY_TARGET_PORT:
            return self.initiator_port
        return target_port(self.initiator_port, self.target_port)

    @classmethod
    def parse(cls, text: str) -> "NexusId":
        """What ``str`` made. Of an earlier version's text the target port is ANY_TARGET_PORT; some
        had upper-case letters.
        """
        port, found, number = fold(text).rpartition(TARGET_PORT)
        return cls(port, int(number, 16)) if found else cls(number, ANY_TARGET_PORT)


def _nothing() -> None:
    """The callback of reservations whose unit is not used any more."""


@dataclass(slots=True)
class Reservations:
    """``registrations`` maps nexuses to keys. ``changed`` is called after each change, for the
    flags of the nexuses.
    """

    changed: Callable[[], None]
    registrations: dict[NexusId, int] = field(default_factory=dict)
    holder: NexusId | None = None
    kind: int = 0
    generation: int = 0
    survives_power_loss: bool = False
    spc2_holder: NexusId | None = None

    def reserve_spc2(self, nexus: NexusId) -> bool:
        """RESERVE(6); False where another holds it, or where anyone is registered."""
        if self.registrations or self.spc2_holder not in (None, nexus):
            return False
        self.spc2_holder = nexus
        self.changed()
        return True

    def release_spc2(self, nexus: NexusId) -> None:
        """RELEASE(6), or the end of the nexus: nothing happens where ``nexus`` is not
        the holder.
        """
        if self.spc2_holder == nexus:
            self.spc2_holder = None
            self.changed()

    def excludes(self, nexus: NexusId) -> bool:
        """Whether a RESERVE(6) of another nexus forbids this one everything but the few commands
        that are always allowed.
        """
        return self.spc2_holder is not None and self.spc2_holder != nexus

    @property
    def holder_key(self) -> int:
        """Key of the reservation holder; 0 where all registrants hold it."""
        if self.holder is None or self.kind in ALL_REGISTRANTS_KINDS:
            return 0
        return next(key for nexus, key in self.registrations.items() if self.held_by(nexus))

    def held_by(self, nexus: NexusId) -> bool:
        """Whether ``nexus`` is the one that took the reservation, or was given it. Earlier versions
        did not store which nexus of its port that was: then it is each of them.
        """
        return self.holder in (nexus, (nexus.initiator_port, ANY_TARGET_PORT))

    def holds(self, nexus: NexusId) -> bool:
        """Whether ``nexus`` is a holder."""
        return self.kind != 0 and (
            self.held_by(nexus)
            or (self.kind in ALL_REGISTRANTS_KINDS and nexus in self.registrations)
        )

    def forbids(self, nexus: NexusId, writes: bool) -> bool:
        """Whether the reservation conflicts with access to the medium by ``nexus`` (SPC-4 table 49,
        SBC-3 table 6).
        """
        if self.excludes(nexus):
            return True
        if (
            self.kind == 0
            or self.holds(nexus)
            or (self.kind in REGISTRANTS_KINDS and nexus in self.registrations)
        ):
            return False
        return writes or self.kind in EXCLUSIVE_KINDS

    def _advance(self) -> None:
        self.generation = (self.generation + 1) & _GENERATION_MASK
        self.changed()

    def register(
        self,
        nexuses: Iterable[NexusId],
        key: int,
        survives_power_loss: bool,
        others: Iterable[NexusId] = (),
    ) -> bool:
        """Register, change, or (key 0) unregister; True where that released a reservation that
        others were registered for.

        ``others`` get the same key where they are not registered yet.
        """
        self.survives_power_loss = survives_power_loss
        released = False
        if key:
            self.registrations |= dict.fromkeys(nexuses, key)
            for other in others:
                self.registrations.setdefault(other, key)
        else:
            for nexus in nexuses:
                released = (nexus in self.registrations and self._unregister(nexus)) or released
        self._advance()
        return released

    def move(
        self,
        nexus: NexusId,
        destination: NexusId,
        key: int,
        unregisters: bool,
        survives_power_loss: bool,
    ) -> None:
        """REGISTER AND MOVE: ``destination`` is registered with ``key``, and holds the reservation
        of ``nexus``, with the same kind.
        """
        assert (
            self.held_by(nexus) and self.kind not in ALL_REGISTRANTS_KINDS and nexus != destination
        )
        self.survives_power_loss = survives_power_loss
        self.registrations[destination] = key
        self.holder = destination
        if unregisters:
            del self.registrations[nexus]
        self._advance()

    def _unregister(self, nexus: NexusId) -> bool:
        was_holder, kind = self.held_by(nexus), self.kind
        del self.registrations[nexus]
        if kind in ALL_REGISTRANTS_KINDS:
            if self.registrations:
                self.holder = next(iter(self.registrations))
                return False
            self._clear()
            return False
        if not was_holder or any(self.held_by(other) for other in self.registrations):
            return False
        self._clear()
        return kind in REGISTRANTS_KINDS

    def _clear(self) -> None:
        self.holder, self.kind = None, 0

    def reserve(self, nexus: NexusId, kind: int) -> bool:
        """Take the reservation; False if there is another one."""
        if self.kind:
            return self.holds(nexus) and self.kind == kind
        self.holder, self.kind = nexus, kind
        self.changed()
        return True

    def release(self) -> bool:
        """Give the reservation back; True where other registrants have to be told."""
        kind = self.kind
        self._clear()
        self.changed()
        return kind in REGISTRANTS_KINDS

    def clear(self) -> list[NexusId]:
        """Remove everything; the nexuses that were registered."""
        removed = list(self.registrations)
        self.registrations.clear()
        self._clear()
        self._advance()
        return removed

    def preempt(self, nexus: NexusId, key: int, kind: int) -> tuple[list[NexusId], bool]:
        """Remove the registrations with ``key``, and take the reservation over where its holder is
        among them.

        Returns the nexuses that lost their registration, and whether the reservation of remaining
        registrants was released or changed its kind (SPC-4 5.13.11.2.3).
        """
        if self.kind in ALL_REGISTRANTS_KINDS and key == 0:
            removed = [other for other in self.registrations if other != nexus]
            takes = True
        else:
            removed = [
                other
                for other, value in self.registrations.items()
                if value == key and other != nexus
            ]
            takes = (
                self.kind != 0 and self.kind not in ALL_REGISTRANTS_KINDS and self.holder_key == key
            )
        before = self.kind
        for other in removed:
            del self.registrations[other]
        if takes:
            self.holder, self.kind = nexus, kind
        elif self.kind in ALL_REGISTRANTS_KINDS and self.holder not in self.registrations:
            self.holder = nexus
        self._advance()
        return removed, takes and before != kind

    def retire(self) -> None:
        """Stop calling ``changed``: the unit is not used any more."""
        self.changed = _nothing

    def export(self) -> dict[str, object]:
        """What has to be kept over a restart (APTPL), with stable keys; `restore` takes it."""
        registrations = {str(nexus): key for nexus, key in self.registrations.items()}
        holder = None if self.holder is None else str(self.holder)
        return {
            "registrations": registrations,
            "holder": holder,
            "kind": self.kind,
            "generation": self.generation,
        }

    def restore(
        self,
        registrations: dict[str, int],
        holder: str | None,
        kind: int,
        generation: int,
        target_ports: Iterable[int],
    ) -> None:
        """State of an earlier run. What an earlier version stored counts for each of
        ``target_ports``, as it did there.
        """
        self.registrations = {}
        for text, key in registrations.items():
            nexus = NexusId.parse(text)
            ports = (nexus.target_port,) if nexus.target_port else tuple(target_ports)
            self.registrations |= {NexusId(nexus.initiator_port, port): key for port in ports}
        self.holder = None if holder is None else NexusId.parse(holder)
        self.kind, self.generation = kind, generation
        self.survives_power_loss = True
        self.changed()
