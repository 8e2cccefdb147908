"""Reservations of one logical unit (SPC-4 5.13; RESERVE(6) of SPC-2 8.1): who is registered, who holds what, what that forbids.

Registrations belong to an I_T nexus, named by the initiator port (iSCSI name and ISID) and the target port; they outlive sessions.
Invariants: ``generation`` never goes back; ``kind`` is 0 exactly when there is no holder; the holder is registered; a holder by
RESERVE(6) (``plain_holder``) and registrations are never there at once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

WRITE_EXCLUSIVE: Final = 1
EXCLUSIVE_ACCESS: Final = 3
WRITE_EXCLUSIVE_REGISTRANTS: Final = 5
EXCLUSIVE_ACCESS_REGISTRANTS: Final = 6
WRITE_EXCLUSIVE_ALL: Final = 7
EXCLUSIVE_ACCESS_ALL: Final = 8
KINDS: Final = frozenset((1, 3, 5, 6, 7, 8))
REGISTRANTS_KINDS: Final = frozenset((5, 6, 7, 8))
ALL_REGISTRANTS_KINDS: Final = frozenset((7, 8))
EXCLUSIVE_KINDS: Final = frozenset((3, 6, 8))
_GENERATION_MASK: Final = 0xFFFFFFFF
# A cluster has tens of nodes with a few paths each; a stranger must not fill memory with registrations.
REGISTRATIONS_MAX: Final = 1024


@dataclass(slots=True)
class Reservations:
    """``registrations`` maps initiator ports to keys. ``changed`` is called after each change: for the nexuses, and to keep it."""

    changed: Callable[[], None]
    registrations: dict[str, int] = field(default_factory=dict)
    holder: str | None = None
    kind: int = 0
    generation: int = 0
    survives_power_loss: bool = False
    plain_holder: str | None = None

    def reserve_plainly(self, port: str) -> bool:
        """RESERVE(6); False where another holds it, or where anyone is registered."""
        if self.registrations or self.plain_holder not in (None, port):
            return False
        self.plain_holder = port
        self.changed()
        return True

    def release_plainly(self, port: str) -> None:
        """RELEASE(6), or the end of the nexus: nothing happens where ``port`` is not the holder."""
        if self.plain_holder == port:
            self.plain_holder = None
            self.changed()

    def excludes(self, port: str) -> bool:
        """Whether a RESERVE(6) of another port forbids this one everything but the few commands that are always allowed."""
        return self.plain_holder is not None and self.plain_holder != port

    @property
    def holder_key(self) -> int:
        """Key of the reservation holder; 0 where all registrants hold it."""
        return 0 if self.holder is None or self.kind in ALL_REGISTRANTS_KINDS else self.registrations[self.holder]

    def holds(self, port: str) -> bool:
        """Whether ``port`` is a holder."""
        return self.kind != 0 and (self.holder == port or (self.kind in ALL_REGISTRANTS_KINDS and port in self.registrations))

    def forbids(self, port: str, writes: bool) -> bool:
        """Whether the reservation conflicts with access to the medium by ``port`` (SPC-4 table 49, SBC-3 table 6)."""
        if self.excludes(port):
            return True
        if self.kind == 0 or self.holds(port) or (self.kind in REGISTRANTS_KINDS and port in self.registrations):
            return False
        return writes or self.kind in EXCLUSIVE_KINDS

    def _advance(self) -> None:
        self.generation = (self.generation + 1) & _GENERATION_MASK
        self.changed()

    def register(self, port: str, key: int, survives_power_loss: bool, others: Iterable[str] = ()) -> bool:
        """Register, change, or (key 0) unregister; True where that released a reservation that others were registered for.

        ``others`` get the same key where they are not registered yet.
        """
        self.survives_power_loss = survives_power_loss
        released = False
        if key:
            self.registrations[port] = key
            for other in others:
                self.registrations.setdefault(other, key)
        elif port in self.registrations:
            released = self._unregister(port)
        self._advance()
        return released

    def move(self, port: str, destination: str, key: int, unregisters: bool, survives_power_loss: bool) -> None:
        """REGISTER AND MOVE: ``destination`` is registered with ``key``, and holds the reservation of ``port``, with the same kind."""
        assert self.holder == port and self.kind not in ALL_REGISTRANTS_KINDS and port != destination
        self.survives_power_loss = survives_power_loss
        self.registrations[destination] = key
        self.holder = destination
        if unregisters:
            del self.registrations[port]
        self._advance()

    def _unregister(self, port: str) -> bool:
        was_holder, kind = self.holder == port, self.kind
        del self.registrations[port]
        if kind in ALL_REGISTRANTS_KINDS:
            if self.registrations:
                self.holder = next(iter(self.registrations))
                return False
            self._clear()
            return False
        if was_holder:
            self._clear()
        return was_holder and kind in REGISTRANTS_KINDS

    def _clear(self) -> None:
        self.holder, self.kind = None, 0

    def reserve(self, port: str, kind: int) -> bool:
        """Take the reservation; False where another one is in the way."""
        if self.kind:
            return self.holds(port) and self.kind == kind
        self.holder, self.kind = port, kind
        self.changed()
        return True

    def release(self) -> bool:
        """Give the reservation back; True where other registrants have to be told."""
        kind = self.kind
        self._clear()
        self.changed()
        return kind in REGISTRANTS_KINDS

    def clear(self) -> list[str]:
        """Remove everything; the ports that were registered."""
        ports = list(self.registrations)
        self.registrations.clear()
        self._clear()
        self._advance()
        return ports

    def preempt(self, port: str, key: int, kind: int) -> tuple[list[str], bool]:
        """Remove the registrations with ``key``, and take the reservation over where its holder is among them.

        Returns the ports that lost their registration, and whether the reservation of remaining registrants was released or
        changed its kind (SPC-4 5.13.11.2.3).
        """
        if self.kind in ALL_REGISTRANTS_KINDS and key == 0:
            removed = [other for other in self.registrations if other != port]
            takes = True
        else:
            removed = [other for other, value in self.registrations.items() if value == key and other != port]
            takes = self.kind != 0 and self.kind not in ALL_REGISTRANTS_KINDS and self.holder_key == key
        before = self.kind
        for other in removed:
            del self.registrations[other]
        if takes:
            self.holder, self.kind = port, kind
        elif self.kind in ALL_REGISTRANTS_KINDS and self.holder not in self.registrations:
            self.holder = port
        self._advance()
        return removed, takes and before != kind

    def export(self) -> dict[str, object]:
        """What has to be kept over a restart (APTPL), with stable keys; `restore` takes it."""
        return {"registrations": dict(self.registrations), "holder": self.holder, "kind": self.kind, "generation": self.generation}

    def restore(self, registrations: dict[str, int], holder: str | None, kind: int, generation: int) -> None:
        """State of an earlier run."""
        self.registrations = dict(registrations)
        self.holder, self.kind, self.generation = holder, kind, generation
        self.survives_power_loss = True
        self.changed()
