"""Arrays of VBNs, made and joined without a stall."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from storage.slicer import CHUNK, Slicer

VbnArray = npt.NDArray[np.uint64]


async def as_array(values: Sequence[int], slicer: Slicer) -> VbnArray:
    """The values as an array, made in slices: numpy takes 0.1 us for each, with the interpreter
    lock held.
    """
    parts = []
    for start in range(0, len(values), CHUNK):
        parts.append(np.array(values[start : start + CHUNK], dtype=np.uint64))
        await slicer.breathe()
    return concatenated(parts)


def concatenated(arrays: Sequence[VbnArray]) -> VbnArray:
    """One array of all; empty when there are none."""
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.uint64)
