"""Freed blocks on their way back to the write allocator: through the next consistency point, out of
retired epochs, or from the background reclaim.
"""

import asyncio

from storage.allocation.interfaces import Counters
from storage.backdoor.handler import BackdoorMessageHandler, in_background
from storage.backdoor.reclaim import Reclaim
from storage.consistency.retirement import Retired
from storage.state.point_requests import PointRequests
from storage.state.pool_state import PoolState

# How often a write to a full pool looks whether those that borrowed blocks are installed.
LENT_POLL_SECONDS = 0.001
# How often it looks whether background reclaim has freed something.
RECLAIM_POLL_SECONDS = 0.01


class FreedBlocks:
    """Satisfies storage.allocation.interfaces.FreedBlocks."""

    __slots__ = ("_handler", "_requests", "_retired", "_state")

    def __init__(
        self,
        state: PoolState,
        requests: PointRequests,
        retired: Retired,
        handler: BackdoorMessageHandler,
    ) -> None:
        self._state = state
        self._requests = requests
        self._retired = retired
        self._handler = handler

    async def come_back(self, counters: Counters, blocks: int, patient: bool) -> bool:
        """Make freed blocks available, those that background reclaim is still collecting included.
        False: so many are not on their way, or no consistency points are taken yet.

        The background itself does not wait for reclaim: that is a message in the same queue, and
        would wait for it in turn.
        """
        if not self._requests.served:
            return False
        if await self._through_points(counters, blocks, patient):
            return True
        if (
            in_background.get()
            or not self._handler.holds(Reclaim)
            or self._state.read_only_reason is not None
        ):
            return False
        await asyncio.sleep(RECLAIM_POLL_SECONDS)
        return True

    async def _through_points(self, counters: Counters, blocks: int, patient: bool) -> bool:
        """Those that need a consistency point, or are in a retired epoch. False: fewer than
        ``blocks`` are on their way, so that waiting for them would help nobody; or none is left of
        those that came, for a caller that is not ``patient``.
        """
        state = self._state
        epochs = [epoch for epoch in (state.epoch, state.frozen) if epoch is not None]
        on_their_way = sum(epoch.ledger.freed_estimate for epoch in epochs)
        on_their_way += counters.held_blocks + counters.promised_blocks + counters.lent_blocks
        # What is frozen is being moved from its lists to the maps, and cannot be counted.
        unknown = state.frozen is not None or any(epoch.when_durable for epoch in epochs)
        if on_their_way < blocks and not unknown:
            return False
        before, free_before = counters.returned_blocks, counters.free_now
        if unknown or counters.promised_blocks or any(epoch.frees for epoch in epochs):
            await self._requests.request()
        elif counters.lent_blocks:
            # Those writes are still on their way to the device.
            await asyncio.sleep(LENT_POLL_SECONDS)
            return True
        while self._retired.epochs and counters.returned_blocks <= before:
            await self._retired.wait_for_room()
        if patient:
            return counters.returned_blocks > before or counters.lent_blocks > 0
        return counters.free_now > free_before
