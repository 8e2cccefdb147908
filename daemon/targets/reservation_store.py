"""Persistent reservations (and saved mode pages) that outlive a restart (APTPL), in the pool's
configuration, section ``reservations``.

Satisfies `protocol.scsi.kept_state.StateKeeper`. Changes that come while one is being written are
written together.
"""

import asyncio
from typing import Any, Final
from uuid import UUID

import msgspec

from daemon.pool.sections import Configurable, Section, Versioned
from protocol.volume import Completion
from storage.errors import StorageError

SECTION: Final = "reservations"


class Kept(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Registrations (initiator port to key), and the reservation, of one vdisk: what
    `Reservations.export` gives; whether its write cache is on, as a client saved it; and whether a
    sanitize operation that has not ended may be given up (None: there is none).
    """

    registrations: dict[str, int]
    holder: str | None
    kind: int
    generation: int
    write_cache: bool = True
    sanitize_unrestricted_exit: bool | None = None


class StoredReservations(Versioned, frozen=True, kw_only=True):
    """The section: by the vdisk's UUID, 32 hex digits."""

    units: dict[str, Kept] = {}


class ReservationStore:
    """Invariant: ``_latest`` is what the last callers wanted kept; ``_waiting`` are the completions
    of what is not written yet.
    """

    def __init__(self, pool: Configurable) -> None:
        self._section = Section(pool, SECTION, StoredReservations())
        self._latest = dict(self._section.value.units)
        self._waiting: list[Completion] = []
        self._writer: asyncio.Task[None] | None = None

    def kept(self, uuid: UUID) -> dict[str, Any] | None:
        """What `Reservations.restore` takes."""
        found = self._latest.get(uuid.hex)
        kept: dict[str, Any] | None = None if found is None else msgspec.to_builtins(found)
        return kept

    def keep(self, uuid: UUID, state: dict[str, Any] | None, done: Completion) -> None:
        """Write down the state of one vdisk, and call ``done`` when that is durable, or with the
        error.
        """
        if state is None:
            self._latest.pop(uuid.hex, None)
        else:
            self._latest[uuid.hex] = msgspec.convert(state, Kept)
        if self._writer is None and self._latest == self._section.value.units:
            done(None)
            return
        self._waiting.append(done)
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def forget(self, uuid: UUID) -> None:
        """The vdisk is gone. Raises what the pool raises."""
        if uuid.hex in self._latest:
            del self._latest[uuid.hex]
            await self._section.change(lambda _: StoredReservations(units=dict(self._latest)))

    async def drain(self) -> None:
        """Wait until everything is written."""
        if self._writer is not None:
            await self._writer

    async def _write(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            failure: StorageError | None = None
            try:
                await self._section.change(lambda _: StoredReservations(units=dict(self._latest)))
            except StorageError as error:
                failure = error
            for done in waiting:
                done(failure)
        self._writer = None
