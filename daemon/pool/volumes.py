"""What targets ask of a pool. `storage.pool.Pool` satisfies it; so does the small one in memory
that unit tests use.

The types of `storage` and `protocol` meet here: a pool's volume is a BlockVolume that can also be
attached.
"""

from collections.abc import Collection
from typing import Protocol

from daemon.pool.sections import Configurable
from protocol.volume import BlockVolume
from storage.vdisks.counters import Counters


class AttachableVolume(BlockVolume, Protocol):
    """A volume that knows its users; an attached one refuses to be deleted (Conflict), naming the
    labels.

    ``counters`` are its image's, since the pool was opened.
    """

    counters: Counters

    def attach(self, label: str) -> None:
        """One session more. The same label may be attached several times."""

    def detach(self, label: str) -> None:
        """One session less."""


class Volumes(Configurable, Protocol):
    """The vdisks of a pool, and the sections of its configuration."""

    def volume(self, name: str) -> AttachableVolume:
        """By ``VDISK`` or ``VDISK@SNAPSHOT``. Raises NotFound."""

    def names(self) -> list[str]:
        """Names of the vdisks, sorted."""

    def snapshot_names(self, vdisk: str) -> list[str]:
        """Names of the snapshots of a vdisk, sorted. Raises NotFound."""

    def names_alike(self, name: str) -> list[str]:
        """Names of the vdisks whose names are this one in any case, sorted."""

    def names_with_case(self) -> Collection[str]:
        """Names, in lower case, for which there are vdisks whose names have upper-case letters;
        mostly none.
        """

    def names_of_uuids(self, wanted: Collection[bytes]) -> dict[bytes, str]:
        """Names of the vdisks of these UUIDs, as far as there are any."""
