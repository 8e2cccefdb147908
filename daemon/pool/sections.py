"""Sections of the pool's configuration as typed records: read at start, replaced whole and durably
at each change.

Invariant: ``value`` is what the pool holds durably. Changes of one section follow one another, each
on the result of the last; a caller that awaits ``change`` goes on in the turn of the event loop in
which ``value`` changed.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from storage.errors import StorageError

VERSION: Final = 1


class SectionUnreadable(StorageError):
    """A section is damaged or of a newer version. The daemon does not start: without it, nobody
    could tell who may use what.
    """


class Configurable(Protocol):
    """What keeps sections: a pool."""

    def configuration(self, section: str) -> bytes:
        """What was stored under that name; empty if nothing was."""

    async def configure(self, section: str, value: bytes) -> None:
        """Store durably. Raises RequestError (too large), PoolFull, PoolReadOnly."""


class Versioned(msgspec.Struct, frozen=True, kw_only=True):
    """Root of all sections. The version rises when an older cleaved would misunderstand what is
    stored.
    """

    version: int = VERSION


Record = TypeVar("Record", bound=Versioned)


class Section(Generic[Record]):
    """One section. ``empty`` is what it holds before anything was stored."""

    def __init__(self, pool: Configurable, name: str, empty: Record) -> None:
        self._pool = pool
        self._name = name
        self._lock = asyncio.Lock()
        self.value: Record = _decode(name, pool.configuration(name), empty)

    async def change(self, change: Callable[[Record], Record]) -> None:
        """Replace the value by ``change(value)``, durably. Raises what ``change`` and ``configure``
        raise; then nothing changed.
        """
        async with self._lock:
            changed = change(self.value)
            if changed != self.value:
                await self._pool.configure(self._name, msgspec.msgpack.encode(changed))
                self.value = changed


def _decode(name: str, stored: bytes, empty: Record) -> Record:
    if not stored:
        return empty
    try:
        version = msgspec.msgpack.decode(stored, type=Versioned).version
        if version != VERSION:
            raise SectionUnreadable(
                f"section {name!r} of the pool's configuration has version {version}, and {VERSION}"
                " is known here: use a newer cleaved"
            )
        return msgspec.msgpack.decode(stored, type=type(empty))
    except msgspec.MsgspecError as error:
        # The error's words name fields and types, never values: secrets stay out of the log.
        raise SectionUnreadable(
            f"section {name!r} of the pool's configuration cannot be read ({error}): run `cleaved"
            " check`"
        ) from None
