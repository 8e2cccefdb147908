"""A table entry: what the pool keeps of one image on disk (layout.IMAGE_HEAD and the offsets beside
it).
"""

from dataclasses import dataclass, field

from storage.layout import (
    BLOCK_BYTES,
    IMAGE_HEAD,
    IMAGE_MAGIC,
    IMAGE_NAME_OFFSET,
    IMAGE_REASON_OFFSET,
    IMAGE_SPLIT,
    IMAGE_SPLIT_OFFSET,
    REASON_BYTES_MAX,
    SPLIT_MODE_COPY,
    SPLIT_NONE,
)

# Within an entry (layout.IMAGE_HEAD): the consistency point completes an encoded entry there.
KIND_OFFSET = 4
ROOT_FIELD_OFFSET = 32


@dataclass(slots=True)
class SplitRecord:
    """State of a clone's split, as the table keeps it. ``cursor`` is a level-1 index; rates are
    bytes a second, 0 = not set.
    """

    state: int = SPLIT_NONE
    mode: int = SPLIT_MODE_COPY
    flags: int = 0
    cursor: int = 0
    holes_total: int = 0
    holes_remaining: int = 0
    blocks_copied: int = 0
    blocks_shared: int = 0
    rate_min_bytes: int = 0
    rate_max_bytes: int = 0
    started_ns: int = 0
    reason: str = ""


@dataclass(slots=True)
class ImageRecord:
    """One table entry. ``origin`` and ``backing`` are image numbers, 0 = none."""

    kind: int
    name: str
    uuid: bytes
    size_bytes: int
    root: tuple[int, int, int]
    levels: int
    shared_cp: int
    used_blocks: int
    created_ns: int
    created_cp: int
    origin: int
    backing: int
    backing_blocks: int
    flags: int = 0
    split: SplitRecord = field(default_factory=SplitRecord)


def encode(record: ImageRecord) -> bytearray:
    """The 4096 bytes of a table entry."""
    block = bytearray(BLOCK_BYTES)
    name = record.name.encode()
    split = record.split
    reason = split.reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore").encode()
    vbn, crc, birth = record.root
    IMAGE_HEAD.pack_into(
        block, 0, IMAGE_MAGIC, record.kind, len(name), len(reason), record.flags, record.uuid,
        record.size_bytes, vbn, crc, birth, record.levels, record.shared_cp, record.used_blocks,
        record.created_ns, record.created_cp, record.origin, record.backing, record.backing_blocks,
    )  # fmt: skip
    block[IMAGE_NAME_OFFSET : IMAGE_NAME_OFFSET + len(name)] = name
    block[IMAGE_REASON_OFFSET : IMAGE_REASON_OFFSET + len(reason)] = reason
    IMAGE_SPLIT.pack_into(
        block, IMAGE_SPLIT_OFFSET, split.state, split.mode, split.flags, 0, 0, split.cursor,
        split.holes_total, split.holes_remaining, split.blocks_copied, split.blocks_shared,
        split.rate_min_bytes, split.rate_max_bytes, split.started_ns,
    )  # fmt: skip
    return block


def decode(block: bytes | bytearray | memoryview) -> ImageRecord | None:
    """The entry in these bytes (trailing zeros may be cut off), or None where there is none."""
    if bytes(block[:4]) != IMAGE_MAGIC:
        return None
    whole = bytes(block).ljust(IMAGE_REASON_OFFSET + REASON_BYTES_MAX, b"\0")
    (
        _,
        kind,
        name_length,
        reason_length,
        flags,
        uuid,
        size_bytes,
        vbn,
        crc,
        birth,
        levels,
        shared_cp,
        used_blocks,
        created_ns,
        created_cp,
        origin,
        backing,
        backing_blocks,
    ) = IMAGE_HEAD.unpack_from(whole)
    state, mode, split_flags, _, _, *numbers = IMAGE_SPLIT.unpack_from(whole, IMAGE_SPLIT_OFFSET)
    reason = whole[IMAGE_REASON_OFFSET : IMAGE_REASON_OFFSET + reason_length].decode()
    split = SplitRecord(state, mode, split_flags, *numbers)
    split.reason = reason
    return ImageRecord(
        kind=kind,
        name=whole[IMAGE_NAME_OFFSET : IMAGE_NAME_OFFSET + name_length].decode(),
        uuid=uuid,
        size_bytes=size_bytes,
        root=(vbn, crc, birth),
        levels=levels,
        shared_cp=shared_cp,
        used_blocks=used_blocks,
        created_ns=created_ns,
        created_cp=created_cp,
        origin=origin,
        backing=backing,
        backing_blocks=backing_blocks,
        flags=flags,
        split=split,
    )


assert IMAGE_HEAD.size == 104
