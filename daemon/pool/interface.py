"""What the daemon asks of a pool. `storage.pool.Pool` satisfies it; so does the small one in memory
that unit tests use.

The types of `storage` and `protocol` meet here: a pool's volume is a BlockVolume that can also be
attached.
"""

from collections.abc import Callable, Collection
from typing import Any, Protocol

from daemon.pool.sections import Configurable
from protocol.volume import BlockVolume
from storage.vdisks.counters import Counters

Row = dict[str, Any]


class AttachableVolume(BlockVolume, Protocol):
    """A volume that knows who uses it; an attached one refuses to be deleted (Conflict), naming the
    labels.

    ``counters`` are its image's, since the pool was opened.
    """

    counters: Counters

    def attach(self, label: str) -> None:
        """One session more. The same label may be attached several times."""

    def detach(self, label: str) -> None:
        """One session less."""


class Volumes(Configurable, Protocol):
    """What the iSCSI side asks of a pool."""

    def volume(self, name: str) -> AttachableVolume:
        """By ``VDISK`` or ``VDISK@SNAPSHOT``. Raises NotFound."""

    def names(self) -> list[str]:
        """Names of the vdisks, sorted."""

    def names_alike(self, name: str) -> list[str]:
        """Names of the vdisks whose names are this one in any case, sorted."""

    def names_with_case(self) -> Collection[str]:
        """Names, in lower case, for which there are vdisks whose names have upper-case letters;
        mostly none.
        """

    def names_of_uuids(self, wanted: Collection[bytes]) -> dict[bytes, str]:
        """Names of the vdisks of these UUIDs, as far as there are any."""

    async def vdisk_list(self) -> list[Row]:
        """All vdisks, sorted by name."""


class PoolInterface(Volumes, Protocol):
    """Names are ``VDISK`` and ``VDISK@SNAPSHOT``; sizes are bytes. Errors are those of
    storage.errors.
    """

    on_event: Callable[..., None]

    async def close(self) -> None:
        """Take a consistency point and release the device."""

    async def vdisk_create(self, name: str, size_bytes: int) -> Row:
        """Raises Conflict, RequestError."""

    async def vdisk_show(self, name: str) -> Row:
        """Raises NotFound."""

    async def vdisk_resize(self, name: str, size_bytes: int) -> Any:
        """Raises NotFound, RequestError."""

    async def vdisk_rename(self, old: str, new: str) -> Any:
        """Raises NotFound, Conflict."""

    async def vdisk_delete(self, name: str) -> Any:
        """Raises NotFound, Conflict."""

    async def snapshot_create(self, pairs: list[tuple[str, str]]) -> list[Row]:
        """All of one moment, or none. Raises NotFound, Conflict."""

    async def snapshot_list(self, vdisk: str | None) -> list[Row]:
        """Of one vdisk or of all."""

    async def snapshot_delete(self, vdisk: str, name: str, after_split: bool = False) -> bool:
        """Whether it is gone; with ``after_split`` it goes with its last clone's split. Raises
        NotFound, Conflict (it has clones).
        """

    async def clone_create(self, vdisk: str, snapshot: str, name: str) -> Row:
        """Raises NotFound, Conflict."""

    async def split_start(
        self,
        name: str,
        mode: str = "copy",
        rate_min_bytes: int | None = None,
        rate_max_bytes: int | None = None,
    ) -> Row:
        """Raises NotFound, Conflict (no clone, or split already)."""

    def split_show(self, name: str) -> Row:
        """Raises NotFound."""

    def split_list(self) -> list[Row]:
        """All splits that run or are paused."""

    async def split_pause(self, name: str) -> Any:
        """Raises NotFound, Conflict."""

    async def split_resume(self, name: str) -> Any:
        """Raises NotFound, Conflict."""

    async def split_cancel(self, name: str) -> Any:
        """Raises NotFound, Conflict."""

    async def split_estimate(self, name: str) -> Row:
        """Raises NotFound, Conflict."""

    def show(self) -> Row:
        """Size, use and state of the pool."""

    async def check(self, verify_data: bool = False) -> Row:
        """``ok`` and ``errors``, while the pool serves."""

    async def scrub_start(self, rate_max_bytes: int | None = None) -> Row:
        """Raises Conflict, PoolReadOnly."""

    def scrub_show(self) -> Row:
        """State, progress and findings. Raises NotFound."""

    async def scrub_cancel(self) -> Row:
        """Raises NotFound."""
