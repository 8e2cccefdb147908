"""What a check found: differences in words, and counters of what was looked at."""

from dataclasses import dataclass, field
from typing import Any, Final

# A pool whose root is gone differs in millions of places. A person reads the first ones, and the
# total tells the rest.
ERRORS_MAX: Final = 1000


@dataclass
class CheckReport:
    """Outcome of one check. ``errors`` holds the first ERRORS_MAX differences, ``errors_total``
    counts them all.
    """

    cp_number: int = 0
    pool_uuid: str = ""
    size_blocks: int = 0
    blocks_used: int = 0
    vdisks: int = 0
    snapshots: int = 0
    deleted_images: int = 0
    pointer_blocks: int = 0
    metafile_blocks: int = 0
    blocks_read: int = 0
    data_blocks_verified: int = 0
    bytes_verified: int = 0
    log_records: int = 0
    errors: list[str] = field(default_factory=list)
    errors_total: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when the pool is what its superblock says."""
        return self.errors_total == 0

    @property
    def images(self) -> int:
        """Table entries of every kind."""
        return self.vdisks + self.snapshots + self.deleted_images

    def error(self, text: str, count: int = 1) -> None:
        """Record ``count`` differences that ``text`` describes."""
        self.errors_total += count
        if len(self.errors) < ERRORS_MAX:
            self.errors.append(text)

    def note(self, text: str) -> None:
        """Record something that is no difference, but that a reader of the report wants to know."""
        self.notes.append(text)

    def as_dict(self) -> dict[str, Any]:
        """The report with stable keys, for JSON and the control socket."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"ok": self.ok, "images": self.images, **values}
