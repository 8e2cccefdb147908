"""Tries whether the host has room again, from the moment when it was found full until it has."""

import asyncio

from storage.allocation.node_stock import NodeStock
from storage.errors import StorageError
from storage.state.host_room import HostRoom


class HostProbe:
    """``stock`` is None where room cannot be asked for: then it is taken to be there when nothing
    was refused for a while.
    """

    __slots__ = ("_room", "_stock", "_task")

    def __init__(self, room: HostRoom, stock: NodeStock | None) -> None:
        self._room = room
        self._stock = stock
        self._task: asyncio.Task[None] | None = None
        room.filled.listen(self._begin)

    def _begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._probe())

    async def _probe(self) -> None:
        room = self._room
        try:
            while True:
                await room.pause()
                if await self._has_room() and not room.awaited:
                    break
        except StorageError:
            # The device itself has failed, which others find out as well; nobody can tell about its
            # room any more.
            return
        finally:
            self._task = None
        room.found()

    async def _has_room(self) -> bool:
        return self._room.is_quiet if self._stock is None else await self._stock.has_room()

    async def stop(self) -> None:
        """End with the pool."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
