"""How fast a split goes, for the ETA: a smoothed rate over the holes replaced."""

from time import perf_counter

# The rate follows the last few seconds.
SMOOTHING_SECONDS = 3.0


class Progress:
    """Holes replaced a second, smoothed."""

    __slots__ = ("_at", "_pending", "holes_per_second")

    def __init__(self) -> None:
        self._at = perf_counter()
        self._pending = 0
        self.holes_per_second = 0.0

    def add(self, holes: int) -> None:
        """Note that so many holes were replaced."""
        self._pending += holes
        now = perf_counter()
        passed = now - self._at
        if passed < 0.1:
            return
        rate = self._pending / passed
        weight = min(1.0, passed / SMOOTHING_SECONDS)
        self.holes_per_second = (
            rate
            if not self.holes_per_second
            else self.holes_per_second * (1 - weight) + rate * weight
        )
        self._at, self._pending = now, 0

    def eta_seconds(self, holes_remaining: int) -> float | None:
        """Seconds until so many holes are replaced, or None while the rate is not known."""
        if not holes_remaining:
            return 0.0
        return holes_remaining / self.holes_per_second if self.holes_per_second else None
