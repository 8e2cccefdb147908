"""The superblock: where everything begins, in two copies that are written in turn. Format:
storage.layout.

Invariant: consistency point n first writes only the copy n & 1, after everything it names is
durable. So whatever a crash does to that copy, the other one is whole and names a whole state. It
holds from the open on: ``storage.superblock.copies`` has made both the same then.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from storage.checksum import crc32c
from storage.device.owner import Owner, decode_owner
from storage.errors import NoPool, PoolRefused
from storage.layout import (
    BLOCK_BYTES,
    FEATURES_COMPAT,
    FEATURES_INCOMPAT,
    FEATURES_RO_COMPAT,
    FORMAT_VERSION,
    LOG_FIRST_VBN,
    METAFILE_ROOT,
    METAFILE_ROOTS_OFFSET,
    METAFILES,
    OWNER_OFFSET,
    SUPERBLOCK_CRC,
    SUPERBLOCK_CRC_OFFSET,
    SUPERBLOCK_HEAD,
    SUPERBLOCK_MAGIC,
    UNFINISHED_MAGIC,
    is_superblock,
)


@dataclass
class MetafileRoot:
    """Root field, levels and size (in blocks) of one metafile."""

    vbn: int = 0
    crc: int = 0
    birth: int = 0
    levels: int = 1
    size_blocks: int = 0


@dataclass
class Superblock:
    """The fields of a superblock, by the names in storage.layout."""

    uuid: bytes
    size_blocks: int
    log_blocks: int
    created_ns: int
    cp_number: int = 0
    used_blocks: int = 0
    log_head_block: int = 0
    log_head_sequence: int = 1
    compat: int = FEATURES_COMPAT
    ro_compat: int = FEATURES_RO_COMPAT
    incompat: int = FEATURES_INCOMPAT
    roots: list[MetafileRoot] = field(default_factory=lambda: [MetafileRoot() for _ in METAFILES])
    owner: Owner | None = None

    def encode(self) -> bytearray:
        """The 4096 bytes of this superblock."""
        block = bytearray(BLOCK_BYTES)
        SUPERBLOCK_HEAD.pack_into(
            block, 0, SUPERBLOCK_MAGIC, FORMAT_VERSION, 0, self.compat, self.ro_compat,
            self.incompat, self.uuid, self.cp_number, self.size_blocks, self.used_blocks,
            LOG_FIRST_VBN, self.log_blocks, self.log_head_block, self.log_head_sequence,
            self.created_ns,
        )  # fmt: skip
        for number, root in enumerate(self.roots):
            at = METAFILE_ROOTS_OFFSET + number * METAFILE_ROOT.size
            METAFILE_ROOT.pack_into(
                block, at, root.vbn, root.crc, root.birth, root.levels, 0, root.size_blocks
            )
        if self.owner is not None:
            record = self.owner.encode()
            block[OWNER_OFFSET : OWNER_OFFSET + len(record)] = record
        SUPERBLOCK_CRC.pack_into(
            block, SUPERBLOCK_CRC_OFFSET, crc32c(memoryview(block)[:SUPERBLOCK_CRC_OFFSET])
        )
        return block

    @property
    def unknown_ro_compat(self) -> int:
        """Feature flags that this version may read past but not write past."""
        return self.ro_compat & ~FEATURES_RO_COMPAT


def decode(block: bytes | bytearray) -> Superblock | None:
    """The superblock in these 4096 bytes, or None if they are not one that is whole. Raises
    PoolRefused for a newer format.
    """
    if not is_superblock(block):
        return None
    head = SUPERBLOCK_HEAD.unpack_from(block)
    version, compat, ro_compat, incompat = head[1], head[3], head[4], head[5]
    if version > FORMAT_VERSION or incompat & ~FEATURES_INCOMPAT:
        raise PoolRefused(
            f"the pool has format {version} with features {incompat:#x}, newer than this program"
            " knows: use a newer cleaved"
        )
    roots = []
    for number in METAFILES:
        vbn, crc, birth, levels, _, size = METAFILE_ROOT.unpack_from(
            block, METAFILE_ROOTS_OFFSET + number * METAFILE_ROOT.size
        )
        roots.append(MetafileRoot(vbn, crc, birth, levels, size))
    return Superblock(
        uuid=head[6], cp_number=head[7], size_blocks=head[8], used_blocks=head[9],
        log_blocks=head[11], log_head_block=head[12], log_head_sequence=head[13],
        created_ns=head[14], compat=compat, ro_compat=ro_compat, incompat=incompat, roots=roots,
        owner=decode_owner(block, OWNER_OFFSET),
    )  # fmt: skip


def newest(blocks: Sequence[bytes | bytearray | None], path: str, device_bytes: int) -> Superblock:
    """The newer of the superblocks that are whole; None stands for one that cannot be read.

    Raises PoolRefused when there is none, or the device is shorter than the pool; NoPool when
    nothing speaks of a pool at all.
    """
    found = [
        superblock
        for block in blocks
        if block is not None and (superblock := decode(block)) is not None
    ]
    if not found:
        magics = [block[:8] for block in blocks if block is not None]
        if SUPERBLOCK_MAGIC in magics and UNFINISHED_MAGIC not in magics:
            raise PoolRefused(f"{path}: both superblocks are damaged: restore it from a copy")
        raise NoPool(f"{path}: it is not a cleaved pool: check the path")
    best = max(found, key=lambda superblock: superblock.cp_number)
    if best.size_blocks * BLOCK_BYTES > device_bytes:
        raise PoolRefused(
            f"{path} is truncated: the pool has {best.size_blocks * BLOCK_BYTES} bytes, the device"
            f" {device_bytes}: restore its full size"
        )
    return best
