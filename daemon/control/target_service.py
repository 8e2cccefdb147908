"""The control methods about targets, access and CHAP. What a change takes from open sessions ends
them.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol
from uuid import UUID

from daemon.pool.interface import Row, Volumes
from daemon.targets.access import Credentials
from daemon.targets.directory import Targets
from protocol.control import methods
from protocol.iscsi.node import SessionView
from protocol.names import fold
from protocol.volume import BlockVolume
from storage.errors import RequestError

Handler = Callable[[Any], Awaitable[Any]]


class Wire(Protocol):
    """What open sessions are told."""

    def portals(self) -> list[str]:
        """Addresses as clients should name them."""

    def volume_resized(self, volume: BlockVolume) -> None:
        """The volume has another size."""

    def volume_deleted(self, uuid: UUID) -> None:
        """The volume is no more."""

    def lun_mapped(self, target_name: str, lun: int, volume: BlockVolume) -> None:
        """The target has one LUN more."""

    def lun_unmapped(self, target_name: str, lun: int, volume: BlockVolume) -> None:
        """The target has a LUN less."""

    def end_sessions(self, sessions: list[SessionView]) -> None:
        """These may not go on."""


class TargetService:
    """Handlers by method. All raise what the pool raises."""

    def __init__(self, pool: Volumes, targets: Targets, wire: Wire) -> None:
        self._pool = pool
        self._targets = targets
        self._wire = wire
        self.handlers: dict[str, Handler] = {
            "target.create": self._target_create,
            "target.ls": self._target_list,
            "target.rm": self._target_remove,
            "target.map": self._target_map,
            "target.unmap": self._target_unmap,
            "acl.add": self._acl_add,
            "acl.rm": self._acl_remove,
            "acl.clear": self._acl_clear,
            "acl.ls": self._acl_list,
            "chap.set": self._chap_set,
            "chap.rm": self._chap_remove,
            "chap.ls": self._chap_list,
        }

    def _end_sessions(self) -> int:
        """End those that a change has shut out; how many there were."""
        sessions = self._targets.no_longer_allowed()
        self._wire.end_sessions(sessions)
        return len(sessions)

    async def _target_create(self, params: methods.Target) -> Row:
        created = await self._targets.create(params.target)
        return self._targets.describe(created.name)

    async def _target_list(self, params: methods.Params) -> list[Row]:
        return [self._targets.describe(name) for name in sorted(self._targets.table.targets)]

    async def _target_remove(self, params: methods.Target) -> Row:
        name = await self._targets.remove(params.target)
        self._end_sessions()
        return {"target": name, "deleted": True}

    async def _target_map(self, params: methods.TargetMap) -> Row:
        volume = self._pool.volume(params.vdisk)
        name, lun = await self._targets.map(params.target, volume, params.lun)
        self._wire.lun_mapped(name, lun, volume)
        self._end_sessions()
        return self._targets.describe(name)

    async def _target_unmap(self, params: methods.TargetUnmap) -> Row:
        if (params.vdisk is None) == (params.lun is None):
            raise RequestError("name the LUN by its vdisk or by its number, one of them")
        name, lun, volume = await self._targets.unmap(params.target, params.vdisk, params.lun)
        if volume is not None:
            self._wire.lun_unmapped(name, lun, volume)
        return self._targets.describe(name)

    async def _acl_add(self, params: methods.AclAdd) -> Row:
        found = await self._targets.allow(params.target, params.initiators)
        return self._list_of(found.key, found.name)

    async def _acl_remove(self, params: methods.AclRemove) -> Row:
        found = self._targets.named(params.target)
        await self._targets.access.remove(found.key, params.initiator)
        return self._list_of(found.key, found.name)

    async def _acl_clear(self, params: methods.Target) -> Row:
        found = self._targets.named(params.target)
        await self._targets.access.clear(found.key)
        return self._list_of(found.key, found.name)

    def _list_of(self, key: str, name: str) -> Row:
        """A list after a change; None: the target has none, and is as open as the configuration
        says.
        """
        ended = self._end_sessions()
        return {
            "target": name,
            "initiators": self._targets.access.acls.get(key),
            "sessions_ended": ended,
        }

    async def _acl_list(self, params: methods.AclList) -> list[Row]:
        rows = self._targets.lists()
        if params.target is None:
            return rows
        name = self._targets.named(params.target).name
        return [row for row in rows if row["target"] == name]

    async def _chap_set(self, params: methods.ChapSet) -> Row:
        if (params.mutual_user is None) != (params.mutual_secret is None):
            raise RequestError(
                "mutual_user and mutual_secret belong together: give both or neither"
            )
        if params.secret == params.mutual_secret:
            # RFC 7143 9.2.1: or an answer of one direction could be reflected as that of the other.
            raise RequestError(
                "the mutual secret is the same as the secret: give two different ones"
            )
        given = Credentials(
            user=params.user,
            secret=params.secret,
            mutual_user=params.mutual_user,
            mutual_secret=params.mutual_secret,
        )
        await self._targets.access.set_chap(params.initiator, given)
        return _shown(fold(params.initiator), given)

    async def _chap_remove(self, params: methods.OneInitiator) -> Row:
        await self._targets.access.remove_chap(params.initiator)
        return {"initiator": fold(params.initiator), "deleted": True}

    async def _chap_list(self, params: methods.Params) -> list[Row]:
        return [
            _shown(initiator, found)
            for initiator, found in sorted(self._targets.access.chap.items())
        ]


def _shown(initiator: str, credentials: Credentials) -> Row:
    """Credentials without their secrets."""
    return {
        "initiator": initiator,
        "user": credentials.user,
        "mutual_user": credentials.mutual_user,
    }
