"""Reclaim: the blocks of a deleted image come free in the background, only those that it alone
holds (design section 4).

The tree itself is the durable cursor: each message trims some of it, so what is left to do is what
is left of the tree, and after a crash it goes on with that. When the tree is empty the table entry
is cleared.
"""

import asyncio

from storage.backdoor.handler import BackdoorMessageHandler
from storage.data.trim import trim_blocks
from storage.errors import PoolFull, StorageError
from storage.images.catalogue import Catalogue
from storage.images.image import KIND_FREE, Image
from storage.layout import (
    BLOCK_BYTES,
    FIELDS_MASK,
    FIELDS_PER_BLOCK,
    FIELDS_SHIFT,
    ZERO_POINTER,
)
from storage.state.point_requests import PointRequests
from storage.state.pool_state import PoolState
from storage.tree.search import first_block

# Freed blocks are of use only after a consistency point; this many (1 GiB) are worth one of their
# own.
FREED_WANTED = 1 << 18
# How long a reclaim that found not even a block for its own pointer blocks waits before it tries
# again.
RETRY_SECONDS = 1.0


class Reclaim:
    """The work of taking one deleted image apart. Reclaim is not paced by bytes, and has no
    ceiling.
    """

    rate_min_bytes = 0
    rate_max_bytes = 0

    def __init__(
        self,
        state: PoolState,
        requests: PointRequests,
        image: Image,
        deleted: set[int],
        handler: BackdoorMessageHandler,
    ) -> None:
        self._state = state
        self._requests = requests
        self._image = image
        self._deleted = deleted
        self._handler = handler
        self._next_index = 0

    async def message(self, idle: bool) -> int | None:
        """Trim what one level-2 block covers, and that block with it; trimming gives way to clients
        by itself.

        Returns None when the entry is cleared (with the next consistency point).
        """
        image = self._image
        tree = image.tree
        shared = await self._drop_shared_root()
        index = None if shared else await first_block(tree, self._next_index)
        if index is None:
            await self._clear_entry()
            return None
        first = index & ~FIELDS_MASK
        await trim_blocks(
            image, first << FIELDS_SHIFT, FIELDS_PER_BLOCK << FIELDS_SHIFT, keep_count=False
        )
        self._next_index = first + FIELDS_PER_BLOCK
        if self._state.epoch.ledger.freed_estimate > FREED_WANTED:
            self._requests.want()
        return FIELDS_PER_BLOCK * BLOCK_BYTES

    async def _drop_shared_root(self) -> bool:
        """Give up a root that others refer to as well, and with it everything below."""
        tree, state = self._image.tree, self._state
        if tree.root_vbn <= ZERO_POINTER or tree.root_birth > tree.shared_cp:
            return False
        if not await self._image.share_map.count(tree.root_vbn):
            return False
        state.epoch.ledger.count_pointer(tree.root_vbn, -1)
        self._image.editor.forget_all(state.epoch)
        return True

    async def _clear_entry(self) -> None:
        """Trim what levels above 2 are left, free the root, and clear the entry."""
        tree, state = self._image.tree, self._state
        await trim_blocks(self._image, 0, 1 << FIELDS_SHIFT * tree.levels, keep_count=False)
        if tree.root_vbn > ZERO_POINTER:
            state.epoch.ledger.freed.append(tree.root_vbn)
            self._image.editor.forget_all(state.epoch)
        self._image.touch()
        self._image.kind = KIND_FREE
        self._deleted.discard(self._image.number)
        state.on_event("image.reclaimed", number=self._image.number)
        self._requests.want()

    async def failed(self, error: StorageError) -> None:
        """A full pool: try again soon. Else the tree is damaged, or the device failed: the rest
        stays until the pool is opened again.
        """
        if isinstance(error, PoolFull):
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._handler.post, self)
        else:
            self._state.on_event("reclaim.failed", number=self._image.number, error=str(error))


class Reclaims:
    """Has deleted images taken apart."""

    __slots__ = ("_catalogue", "_handler", "_requests", "_state")

    def __init__(
        self,
        state: PoolState,
        requests: PointRequests,
        catalogue: Catalogue,
        handler: BackdoorMessageHandler,
    ) -> None:
        self._state = state
        self._requests = requests
        self._catalogue = catalogue
        self._handler = handler

    def begin(self, image: Image) -> None:
        """Take one apart, in the background. Its deletion is durable."""
        self._handler.post(
            Reclaim(self._state, self._requests, image, self._catalogue.deleted, self._handler)
        )

    def begin_all(self) -> None:
        """At open: all that an earlier process has not finished."""
        for number in sorted(self._catalogue.deleted):
            self.begin(self._catalogue.image(number))
