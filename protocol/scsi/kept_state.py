"""The state of a logical unit that outlives a restart: persistent reservations (APTPL, SPC-4
5.13.5), the saved caching mode page, and that a sanitize operation has not ended.

The state is a dict: the keys of `Reservations.export`, and beside them ``write_cache`` (missing:
True) and ``sanitize_unrestricted_exit`` (missing: there is no such operation).
"""

from typing import Any, Final, Protocol
from uuid import UUID

from protocol.scsi.logical_unit import Keep, LogicalUnit, Sanitization
from protocol.volume import Completion

# Kept for a unit without registrations.
NO_RESERVATIONS: Final[dict[str, Any]] = {
    "registrations": {},
    "holder": None,
    "kind": 0,
    "generation": 0,
}


class StateKeeper(Protocol):
    """Keeps the state of all logical units."""

    def kept(self, uuid: UUID) -> dict[str, Any] | None:
        """State of an earlier run; None for nothing."""

    def keep(self, uuid: UUID, state: dict[str, Any] | None, done: Completion) -> None:
        """Make the state durable (None: nothing is to be kept), then call ``done``."""


def keeping(keeper: StateKeeper) -> Keep:
    """What a `LogicalUnit` calls with each change that has to outlive a restart."""
    return lambda unit, done: keeper.keep(unit.uuid, export(unit), done)


def export(unit: LogicalUnit) -> dict[str, Any] | None:
    """The unit's state; None where all of it is the default."""
    reservations, beside = unit.reservations, dict[str, Any]()
    if not unit.saved_write_cache:
        beside["write_cache"] = False
    if unit.sanitization is not None:
        beside["sanitize_unrestricted_exit"] = unit.sanitization.unrestricted_exit
    if reservations.survives_power_loss and reservations.registrations:
        return reservations.export() | beside
    return NO_RESERVATIONS | beside if beside else None


def restore(
    unit: LogicalUnit,
    write_cache: bool = True,
    sanitize_unrestricted_exit: bool | None = None,
    **reservations: Any,
) -> None:
    """Give a new unit the state of an earlier run."""
    unit.write_cache = unit.saved_write_cache = write_cache
    if sanitize_unrestricted_exit is not None:
        # The restart interrupted it: SBC-3 4.11.4.
        unit.sanitization = Sanitization(sanitize_unrestricted_exit, failed=True)
    if reservations["registrations"]:
        unit.reservations.restore(**reservations, target_ports=unit.target_ports())
