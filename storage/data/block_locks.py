"""Range locks over the blocks of one vdisk, for those few operations that read, wait, and write
back.

Race that they close: A (sectors 0 to 3 of a block) reads the old block and waits for the device; B
(sectors 4 to 7) reads the same old block, writes, is acknowledged; A installs its merged block, and
B's sectors are lost. With the lock B waits for A. While any lock is held, every write of the volume
takes this path; that is rare, and keeps the hot path to one test.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class BlockLocks:
    """Exclusive locks on ranges of FBNs, granted in the order they were asked for (a later range
    waits for every earlier one it meets).
    """

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: deque[tuple[int, int, asyncio.Event]] = deque()

    @property
    def held(self) -> bool:
        """Whether anybody holds or waits for a lock."""
        return bool(self._entries)

    @asynccontextmanager
    async def holding(self, first: int, count: int) -> AsyncIterator[None]:
        """Hold [first, first + count) for the body."""
        end = first + count
        before = [entry for entry in self._entries if entry[0] < end and first < entry[1]]
        mine = (first, end, asyncio.Event())
        self._entries.append(mine)
        try:
            for _, _, gone in before:
                await gone.wait()
            yield
        finally:
            self._entries.remove(mine)
            mine[2].set()
