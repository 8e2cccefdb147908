"""What clients did with one image. It outlives the `Volume`, which is there only while somebody
holds it.
"""


class Counters:
    """Counts since the pool was opened: operations completed, and their bytes."""

    __slots__ = ("flushes", "read_bytes", "reads", "trims", "writes", "written_bytes")

    def __init__(self) -> None:
        self.reads = self.writes = self.read_bytes = self.written_bytes = self.trims = (
            self.flushes
        ) = 0
