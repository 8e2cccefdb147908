"""Looking whether a pool is as it should be, while it goes on: the live check, and the scrub."""

import asyncio
from typing import Any

from storage.backdoor.scrub import RATE_BYTES_DEFAULT, Scrub
from storage.check import check_live
from storage.errors import Conflict, NotFound
from storage.pool.rooms import Rooms
from storage.superblock.copies import read_copies


class Inspection:
    """Checks and scrubs one pool. Of scrubs the last one since the pool was opened is kept."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._state = rooms.state
        self._scrub: Scrub | None = None

    async def check(self, verify_data: bool) -> dict[str, Any]:
        """Check the state of the last consistency point; its blocks are kept from reuse meanwhile.

        Raises Conflict when the pool ran out of other space.
        """
        state, checks = self._state, self._rooms.retired.checks
        while state.read_only_reason is None:
            await self._rooms.requests.request()
            if state.frozen is None:
                break
        epoch = state.begin_read()
        task = asyncio.create_task(
            check_live(self._rooms.device, await self._durable_superblock(), verify_data)
        )
        checks.add(task)
        try:
            report = await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise Conflict(
                "the pool ran short of space, and the check was keeping what was freed: free some,"
                " and run it again"
            ) from None
        finally:
            checks.discard(task)
            state.end_read(epoch)
        return report.as_dict()

    async def _durable_superblock(self) -> bytearray:
        """The superblock in force. On a pool that went read-only the one in memory may be of a
        consistency point that failed.
        """
        if self._state.read_only_reason is None:
            return self._rooms.superblock.encode()
        return (await read_copies(self._rooms.device)).best.encode()

    def scrub_start(self, rate_max_bytes: int | None) -> dict[str, Any]:
        """Begin to read and verify every block in use, in the background. Raises Conflict,
        PoolReadOnly.
        """
        rooms = self._rooms
        self._state.check_writable()
        if self._scrub is not None and self._scrub.status == "running":
            raise Conflict("a scrub is under way: wait for its end, or cancel it")
        self._scrub = Scrub(
            self._state, rooms.catalogue, rooms.metafiles, rooms.superblock.size_blocks,
            rooms.active_map.used_blocks, rate_max_bytes or RATE_BYTES_DEFAULT,
        )  # fmt: skip
        self._state.on_event("scrub.started", rate_max_bytes=self._scrub.rate_max_bytes)
        rooms.handler.post(self._scrub)
        return self._scrub.as_dict()

    def scrub_show(self) -> dict[str, Any]:
        """State, progress and findings of the last scrub. Raises NotFound."""
        return self._last_scrub().as_dict()

    def scrub_cancel(self) -> dict[str, Any]:
        """End the scrub; what it found so far stays to be shown. Raises NotFound."""
        scrub = self._last_scrub()
        if scrub.status == "running":
            scrub.cancel()
            self._rooms.handler.withdraw(scrub)
        return scrub.as_dict()

    def _last_scrub(self) -> Scrub:
        if self._scrub is None:
            raise NotFound(
                "no scrub was started since the pool was opened: `cleavectl pool scrub` starts one"
            )
        return self._scrub
