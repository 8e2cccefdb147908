"""Entries of the vdisk table as the check reads them, and what can be wrong with one
entry alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from storage import layout

KIND_NAMES: Final = {
    layout.KIND_VDISK: "vdisk",
    layout.KIND_SNAPSHOT: "snapshot",
    layout.KIND_DELETED: "deleted image",
}


@dataclass(frozen=True, slots=True)
class Image:
    """One table entry: a vdisk, a snapshot, or a deleted image whose tree is being reclaimed."""

    number: int
    kind: int
    flags: int
    uuid: UUID
    size_bytes: int
    root_vbn: int
    root_crc: int
    root_birth: int
    levels: int
    shared_cp: int
    used_blocks: int
    created_cp: int
    origin: int
    backing: int
    backing_blocks: int
    name: str
    split_state: int
    split_mode: int
    split_flags: int
    holes_total: int
    holes_remaining: int

    @property
    def size_blocks(self) -> int:
        """Blocks of the image; a last one that is not whole counts."""
        return -(-self.size_bytes // layout.BLOCK_BYTES)

    @property
    def splits(self) -> bool:
        """True while a split of this clone is running or paused."""
        return self.split_state in (layout.SPLIT_RUNNING, layout.SPLIT_PAUSED)


def parse_image(number: int, block: memoryview) -> Image | str:
    """The entry in ``block``, or, in words, why it is none."""
    head = layout.IMAGE_HEAD.unpack_from(block, 0)
    magic, kind, name_length, _, flags, uuid, size_bytes, vbn, crc, birth, levels, shared_cp = head[
        :12
    ]
    used_blocks, _, created_cp, origin, backing, backing_blocks = head[12:]
    if magic != layout.IMAGE_MAGIC or kind not in KIND_NAMES:
        return f"magic {magic!r} and kind {kind} are not those of a vdisk or snapshot"
    name = _parse_name(block, name_length)
    if name is None:
        return "its name is longer than the format allows, or not UTF-8"
    split = layout.IMAGE_SPLIT.unpack_from(block, layout.IMAGE_SPLIT_OFFSET)
    state, mode, split_flags, _, _, _, holes_total, holes_remaining = split[:8]
    identity = (
        number,
        kind,
        flags,
        UUID(bytes=uuid),
        size_bytes,
        vbn,
        crc,
        birth,
        levels,
        shared_cp,
    )
    relations = (used_blocks, created_cp, origin, backing, backing_blocks, name)
    return Image(*identity, *relations, state, mode, split_flags, holes_total, holes_remaining)


def _parse_name(block: memoryview, length: int) -> str | None:
    if length > layout.NAME_BYTES_MAX:
        return None
    try:
        return bytes(block[layout.IMAGE_NAME_OFFSET : layout.IMAGE_NAME_OFFSET + length]).decode()
    except UnicodeDecodeError:
        return None


def entry_faults(image: Image, cp: int) -> Iterator[str]:
    """What is wrong with one entry, looked at alone."""
    if not 1 <= image.levels <= layout.TREE_LEVELS_MAX:
        yield (
            f"has {image.levels} levels of pointer blocks, the format allows 1 to"
            f" {layout.TREE_LEVELS_MAX}"
        )
    if image.created_cp > cp or image.shared_cp > cp:
        yield (
            f"was created in consistency point {image.created_cp} and shared in {image.shared_cp},"
            f" the pool is only at {cp}"
        )
    if image.split_state >= len(layout.SPLIT_STATES) or image.split_mode >= len(layout.SPLIT_MODES):
        yield (
            f"has split state {image.split_state} and mode {image.split_mode}, which the format"
            " does not know"
        )
    if image.kind == layout.KIND_DELETED:
        return
    if not image.name:
        yield "has no name"
    if (
        not layout.VDISK_BYTES_MIN <= image.size_bytes <= layout.VDISK_BYTES_MAX
        or image.size_bytes % layout.SECTOR_BYTES
    ):
        yield f"has a size of {image.size_bytes} bytes, which no vdisk can have"
    if image.split_state != layout.SPLIT_NONE and image.kind != layout.KIND_VDISK:
        yield "is a snapshot and has a split"
    if image.splits and not image.backing:
        yield f"has a {layout.SPLIT_STATES[image.split_state]} split, but no backing store"
