"""Reading the superblock: which of the two is valid and newer, and whether this program may
interpret the pool.

Design section 4; the byte map is in ``storage.layout``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from storage import layout
from storage.checksum import crc32c
from storage.errors import PoolRefused

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class MetafileRoot:
    """Root field of a metafile's buffer tree, its levels, and its size in blocks."""

    vbn: int
    crc: int
    birth: int
    levels: int
    size_blocks: int


@dataclass(frozen=True)
class Superblock:
    """A superblock's contents, with the metafile roots in METAFILES order."""

    uuid: UUID
    cp: int
    size_blocks: int
    used_blocks: int
    log_first_vbn: int
    log_blocks: int
    log_head_block: int
    log_head_sequence: int
    roots: tuple[MetafileRoot, ...]

    @property
    def first_free_vbn(self) -> int:
        """First VBN that a field may name: everything below belongs to the superblocks and the
        intent log.
        """
        return self.log_first_vbn + self.log_blocks


def parse_superblock(block: Buffer) -> Superblock | None:
    """The superblock in ``block``, or None when magic or CRC32C are wrong. Raises PoolRefused for a
    format newer than ours.
    """
    if (
        len(block) != layout.BLOCK_BYTES
        or bytes(block[: len(layout.SUPERBLOCK_MAGIC)]) != layout.SUPERBLOCK_MAGIC
    ):
        return None
    (stored,) = layout.SUPERBLOCK_CRC.unpack_from(block, layout.SUPERBLOCK_CRC_OFFSET)
    if crc32c(memoryview(block)[: layout.SUPERBLOCK_CRC_OFFSET]) != stored:
        return None
    head = layout.SUPERBLOCK_HEAD.unpack_from(block, 0)
    _refuse_newer(head[1], head[5])
    (
        uuid,
        cp,
        size_blocks,
        used_blocks,
        log_first_vbn,
        log_blocks,
        log_head_block,
        log_head_sequence,
    ) = head[6:14]
    log = (log_first_vbn, log_blocks, log_head_block, log_head_sequence)
    return Superblock(UUID(bytes=uuid), cp, size_blocks, used_blocks, *log, _parse_roots(block))


def _refuse_newer(version: int, incompat: int) -> None:
    if version > layout.FORMAT_VERSION:
        raise PoolRefused(
            f"the pool has format version {version}, this program knows {layout.FORMAT_VERSION}:"
            " use the release that wrote it"
        )
    if unknown := incompat & ~layout.FEATURES_INCOMPAT:
        raise PoolRefused(
            f"the pool uses incompatible features {unknown:#x} that this program does not know: use"
            " a newer release"
        )


def _parse_roots(block: Buffer) -> tuple[MetafileRoot, ...]:
    offsets = (
        layout.METAFILE_ROOTS_OFFSET + layout.METAFILE_ROOT.size * metafile
        for metafile in layout.METAFILES
    )
    rows = (layout.METAFILE_ROOT.unpack_from(block, offset) for offset in offsets)
    return tuple(
        MetafileRoot(vbn, crc, birth, levels, size) for vbn, crc, birth, levels, _, size in rows
    )


def choose_superblock(blocks: Sequence[Buffer | None], device_bytes: int) -> Superblock:
    """The newer valid one of the two superblocks. Raises PoolRefused when neither is valid, or the
    device is too short for it.
    """
    found = [
        parsed
        for block in blocks
        if block is not None and (parsed := parse_superblock(block)) is not None
    ]
    if not found:
        raise PoolRefused(_why_none(blocks))
    superblock = max(found, key=lambda one: one.cp)
    _refuse_truncated(superblock, device_bytes)
    return superblock


def _why_none(blocks: Sequence[Buffer | None]) -> str:
    magic = layout.SUPERBLOCK_MAGIC
    if any(block is not None and bytes(block[: len(magic)]) == magic for block in blocks):
        return "both superblocks are damaged (their CRC32C is wrong): restore the pool from a copy"
    return "not a pool: there is no superblock at VBN 0 or 1"


def _refuse_truncated(superblock: Superblock, device_bytes: int) -> None:
    wanted = superblock.size_blocks * layout.BLOCK_BYTES
    if device_bytes < wanted:
        raise PoolRefused(
            f"truncated: the pool has {wanted} bytes, the device only {device_bytes}: restore the"
            " missing end from a copy"
        )
    if (
        superblock.first_free_vbn > superblock.size_blocks
        or superblock.log_first_vbn < layout.LOG_FIRST_VBN
    ):
        raise PoolRefused(
            "the superblock places the intent log outside the pool: restore the pool from a copy"
        )
