"""The form that every step of a check has: a generator that yields the VBNs it wants and is sent
their blocks.

So the same walk runs offline (blocks are read there and then) and live (each yield is one slice of
the event loop). An empty request is only an offer to pause. A block that the device could not read
is sent as None.
"""

from collections.abc import Generator, Sequence
from typing import Final, TypeVar

T = TypeVar("T")
Block = memoryview | None
Steps = Generator[Sequence[int], list[Block], T]

# Pointer blocks in one slice: 2048 fields take about half a millisecond of the event loop's 5, and
# twice that on fresh memory.
POINTER_BATCH_BLOCKS: Final = 8
# The same above level 1, where each child also costs two entries of dicts.
UPPER_BATCH_BLOCKS: Final = 2
# Data blocks in one slice, 1 MiB: their checksums take 0.1 ms, and the device is kept busy.
DATA_BATCH_BLOCKS: Final = 256
# Table entries looked at in one slice.
ENTRY_BATCH: Final = 128
