"""Windows: free runs that were claimed for one purpose, and are handed out in order."""


class Window:
    """The current run is [next, end), the others wait in ``runs`` (last one first)."""

    __slots__ = ("end", "next", "runs", "size_blocks")

    def __init__(self, size_blocks: int) -> None:
        self.size_blocks = size_blocks
        self.next = 0
        self.end = 0
        self.runs: list[tuple[int, int]] = []

    @property
    def left_blocks(self) -> int:
        """Blocks that are left to hand out. Not for the hot path: it counts the runs."""
        return self.end - self.next + sum(end - first for first, end in self.runs)

    def advance(self) -> bool:
        """Move on to the next run when the current one is used up. False: the window is empty."""
        while self.next == self.end:
            if not self.runs:
                return False
            self.next, self.end = self.runs.pop()
        return True

    def take_scattered(self, count: int) -> list[tuple[int, int]]:
        """Extents (first VBN, length) of ``count`` blocks, which the window has."""
        extents: list[tuple[int, int]] = []
        while count:
            self.advance()
            length = min(count, self.end - self.next)
            extents.append((self.next, length))
            self.next += length
            count -= length
        return extents

    def empty(self) -> list[tuple[int, int]]:
        """Take out all that is left: runs (first VBN, end)."""
        runs = self.runs
        if self.next < self.end:
            runs.append((self.next, self.end))
        self.runs = []
        self.next = self.end = 0
        return runs
