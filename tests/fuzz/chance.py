"""A source of chance that is made of given bytes, so that whoever chooses the bytes (a
coverage-guided fuzzer) chooses every decision.
"""

from random import Random


class GivenChance(Random):
    """Decisions come from ``data``, then all are zero: the first choice of each."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        super().__init__(0)

    def getrandbits(self, k: int) -> int:
        """What the next bytes say. The rest of the last byte is not used again, so that decisions
        stay where they are in the data.
        """
        size = (k + 7) // 8
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return int.from_bytes(taken, "big") & ((1 << k) - 1)

    def random(self) -> float:
        """Between 0 and 1, by two bytes."""
        return self.getrandbits(16) / 65536
