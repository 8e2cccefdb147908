"""The dirty set of an epoch: what its consistency point has to write beside the maps."""

from typing import Protocol

from storage.tree.buffer_tree import BufferTree
from storage.tree.node import Node


class ChangedImage(Protocol):
    """An image (storage.images.image), as far as its table entry goes."""

    @property
    def number(self) -> int:
        """Where the entry stands in the table."""

    @property
    def tree(self) -> BufferTree:
        """The tree whose root the entry names."""

    def encode(self) -> bytearray:
        """The current entry."""


class DirtySet:
    """What changed in memory and is not on the device as it is now."""

    __slots__ = ("configuration", "images", "nodes", "saved")

    def __init__(self) -> None:
        self.nodes: dict[Node, None] = {}
        # Frozen nodes that were changed again before they were written: their bytes, VBN and birth
        # as of the freeze.
        self.saved: dict[Node, tuple[bytearray, int, int]] = {}
        # Images whose table entry changes; the bytes are filled in if the image changes again
        # before they are written.
        self.images: dict[ChangedImage, bytearray | None] = {}
        # The configuration's new bytes, if it was replaced, and the blocks promised for them.
        self.configuration: tuple[bytes, int] | None = None

    @property
    def changed(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.nodes or self.images) or self.configuration is not None
