"""What the write allocator asks of the rooms above: how freed blocks come back."""

from typing import Protocol


class Counters(Protocol):
    """What the write allocator currently knows of blocks."""

    @property
    def free_now(self) -> int:
        """Available or in a window, less those promised."""

    @property
    def promised_blocks(self) -> int:
        """For what the next consistency point will write."""

    @property
    def lent_blocks(self) -> int:
        """Borrowed for writes that are not installed yet."""

    @property
    def held_blocks(self) -> int:
        """Free, but not released yet."""

    @property
    def returned_blocks(self) -> int:
        """How many came back so far."""


class FreedBlocks(Protocol):
    """Where freed blocks come from."""

    async def come_back(self, counters: Counters, blocks: int, patient: bool) -> bool:
        """Wait until freed blocks can be used again. False: fewer than ``blocks`` are on their way,
        or none is left of those that came, for a caller that is not ``patient``.

        One that gives back what it takes is patient: when others were faster there will be some.
        """
