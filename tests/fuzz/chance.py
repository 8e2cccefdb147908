"""A random source made of given bytes, so that a coverage-guided fuzzer, which chooses the bytes,
chooses every decision.
"""

from random import Random


class GivenChance(Random):
    """Decisions come from ``data``. After its end all are zero: the first choice of each."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        super().__init__(0)

    def getrandbits(self, k: int) -> int:
        """Return a number from the next bytes. The rest of the last byte is not reused, so that
        decisions keep their position in the data.
        """
        size = (k + 7) // 8
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return int.from_bytes(taken, "big") & ((1 << k) - 1)

    def random(self) -> float:
        """Return a number between 0 and 1, from two bytes."""
        return self.getrandbits(16) / 65536
