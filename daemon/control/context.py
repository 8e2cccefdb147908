"""What the handlers of methods work with."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from daemon.nbd.sessions import NbdSessions
from daemon.pool.space_watch import SpaceWatch
from daemon.targets.administration import TargetAdministration
from daemon.targets.directory import Targets
from daemon.targets.reservation_store import ReservationStore
from daemon.tcp.listener import Listener
from protocol.control.limits import ITEMS_PER_PART
from protocol.control.rows import Kind, rows_of
from protocol.iscsi.node import SessionView
from protocol.volume import BlockVolume
from storage.pool import Pool


class IscsiSessions(Protocol):
    """The open iSCSI sessions, and what only they are told."""

    def portals(self) -> list[str]:
        """Addresses as clients should name them."""

    def lun_mapped(self, target_name: str, lun: int, volume: BlockVolume) -> None:
        """The target has one LUN more."""

    def lun_unmapped(self, target_name: str, lun: int, volume: BlockVolume) -> None:
        """The target has a LUN less."""

    def end_sessions(self, sessions: list[SessionView]) -> None:
        """These may not go on."""


class Context(NamedTuple):
    """``listeners`` are those of all protocols, ``iscsi`` among them; ``space`` knows from when on
    requests for more are answered with warnings.
    """

    pool: Pool
    pool_path: str
    targets: Targets
    administration: TargetAdministration
    reservations: ReservationStore
    iscsi: IscsiSessions
    nbd: NbdSessions
    listeners: Sequence[Listener]
    space: SpaceWatch


async def all_rows(kind: type[Kind], found: Sequence[Mapping[str, object]]) -> list[Kind]:
    """Rows of what the pool says, however many: the event loop runs in between (invariant 8)."""
    rows: list[Kind] = []
    for first in range(0, len(found), ITEMS_PER_PART):
        rows += rows_of(kind, found[first : first + ITEMS_PER_PART])
        await asyncio.sleep(0)
    return rows
