"""Writes small pools by hand, from ``storage.layout`` alone, so that the check is judged by
something that is not the store.

The writer counts references and used blocks in the plainest way: it remembers each pointer block's
fields and walks them recursively. Every derived number can be overridden before ``build``, which is
how damage is planted that carries valid checksums.
"""

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from uuid import UUID, uuid5

from crc32c import crc32c

from storage import layout

POOL_UUID = UUID("6f1d1f3c-2a52-4a44-9c55-0d8f8f3b7c11")
CP = 7
POOL_BLOCKS = layout.POOL_BLOCKS_MIN
LOG_BLOCKS = layout.LOG_BLOCKS_MIN
BLOCK = layout.BLOCK_BYTES


@dataclass
class Entry:
    """One table entry. ``root`` is a VBN; derived values stay None to be computed."""

    kind: int
    name: str
    root: int = layout.HOLE
    levels: int = 1
    size_bytes: int = 256 * BLOCK
    origin: int = 0
    backing: int = 0
    backing_blocks: int = 0
    created_cp: int = 1
    used_blocks: int | None = None
    split: tuple[int, int, int, int] = (0, 0, 0, 0)  # state, mode, flags, holes_remaining
    uuid: UUID | None = None
    magic: bytes = layout.IMAGE_MAGIC
    root_crc: int | None = None


@dataclass
class PoolWriter:
    """A pool in the making. Blocks are allocated one after the other behind the intent log."""

    size_blocks: int = POOL_BLOCKS
    blocks: dict[int, bytes] = field(default_factory=dict)
    pointers: dict[int, list[int]] = field(default_factory=dict)
    entries: dict[int, Entry] = field(default_factory=dict)
    cp: int = CP
    active_flips: set[int] = field(default_factory=set)
    share_deltas: dict[int, int] = field(default_factory=dict)
    summary_deltas: dict[int, int] = field(default_factory=dict)
    used_delta: int = 0
    log_records: int = 0
    next_vbn: int = layout.LOG_FIRST_VBN + LOG_BLOCKS
    crc_overrides: dict[int, int] = field(default_factory=dict)
    births: dict[int, int] = field(default_factory=dict)
    configuration_bytes: int = 1  # an empty msgpack map

    def put(self, content: bytes) -> int:
        """Place a block, and return its VBN."""
        vbn, self.next_vbn = self.next_vbn, self.next_vbn + 1
        self.blocks[vbn] = content.ljust(BLOCK, b"\0")
        return vbn

    def data(self, text: str) -> int:
        return self.put(text.encode())

    def pointer(self, fields: Mapping[int, int]) -> int:
        """A pointer block with the given VBNs in the given slots."""
        row = [fields.get(slot, layout.HOLE) for slot in range(layout.FIELDS_PER_BLOCK)]
        vbn = self.put(b"".join(self.packed(named) for named in row))
        self.pointers[vbn] = row
        return vbn

    def packed(self, vbn: int) -> bytes:
        return layout.FIELD.pack(vbn, *self.sum_and_birth(vbn))

    def sum_and_birth(self, vbn: int) -> tuple[int, int]:
        if vbn <= layout.ZERO_POINTER or vbn not in self.blocks:
            return 0, 0
        return self.crc_overrides.get(vbn, crc32c(self.blocks[vbn])), self.births.get(vbn, 1)

    def tree(self, contents: Mapping[int, int], levels: int) -> int:
        """A tree over FBN -> VBN (or zero pointer); its root's VBN."""
        row = dict(contents)
        for _ in range(levels):
            rows: dict[int, dict[int, int]] = {}
            for index, vbn in row.items():
                rows.setdefault(index >> 8, {})[index & 255] = vbn
            row = {index: self.pointer(fields) for index, fields in rows.items()}
        return row.get(0, layout.HOLE)

    def leaves(self, vbn: int, levels: int) -> Iterator[int]:
        """VBNs of the level-0 fields below, with repeats."""
        if vbn <= layout.ZERO_POINTER:
            return
        if levels == 0:
            yield vbn
            return
        for child in self.pointers.get(vbn, ()):
            yield from self.leaves(child, levels - 1)

    def build(self) -> bytearray:
        """The pool's bytes. The writer itself stays as it is, and can be built again with other
        overrides.
        """
        return deepcopy(self)._build()

    def _build(self) -> bytearray:
        table = {
            number: self.put(self._entry_block(number, entry))
            for number, entry in self.entries.items()
        }
        configuration = {
            0: self.put(layout.CONFIGURATION_HEAD.pack(self.configuration_bytes) + b"\x80")
        }
        regions = layout.region_count(self.size_blocks)
        # The maps describe themselves, so their places come first, and their contents last.
        active = {region: self.put(b"") for region in range(regions)}
        summary = {0: self.put(b"")}
        shares = self._share_counts()
        share = {
            fbn: self.put(b"") for fbn in sorted({vbn // layout.SHARES_PER_BLOCK for vbn in shares})
        }
        sizes = (
            max(table, default=0) + 1,
            regions,
            -(-self.size_blocks // layout.SHARES_PER_BLOCK),
            1,
            1,
        )
        trees = list(zip((table, active, share, summary, configuration), sizes, strict=True))
        end_vbn = self.next_vbn + sum(
            pointer_count(contents, layout.tree_levels(size)) for contents, size in trees
        )
        used = {*range(end_vbn)} ^ self.active_flips
        self._fill_maps(active, summary, share, used, shares)
        roots = [self.tree(contents, layout.tree_levels(size)) for contents, size in trees]
        assert self.next_vbn == end_vbn <= self.size_blocks
        return self._assemble(roots, sizes, len(used) + self.used_delta)

    def _share_counts(self) -> Counter[int]:
        references: Counter[int] = Counter(entry.root for entry in self.entries.values())
        for row in self.pointers.values():
            references.update(row)
        extra = Counter(
            {
                vbn: count - 1
                for vbn, count in references.items()
                if vbn > layout.ZERO_POINTER and count > 1
            }
        )
        extra.update(self.share_deltas)
        return extra

    def _fill_maps(
        self,
        active: dict[int, int],
        summary: dict[int, int],
        share: dict[int, int],
        used: set[int],
        shares: Counter[int],
    ) -> None:
        counts = [0] * layout.SUMMARIES_PER_BLOCK
        for region, vbn in active.items():
            bits = bytearray(BLOCK)
            for bit in (bit for bit in used if bit // layout.REGION_BLOCKS == region):
                bits[bit % layout.REGION_BLOCKS >> 3] |= 1 << (bit & 7)
                counts[region] += bit < self.size_blocks
            self.blocks[vbn] = bytes(bits)
        for region, delta in self.summary_deltas.items():
            counts[region] += delta
        self.blocks[summary[0]] = struct.pack(f"<{len(counts)}H", *counts)
        for fbn, vbn in share.items():
            row = [
                shares[fbn * layout.SHARES_PER_BLOCK + slot]
                for slot in range(layout.SHARES_PER_BLOCK)
            ]
            self.blocks[vbn] = struct.pack(f"<{len(row)}I", *row)

    def _entry_block(self, number: int, entry: Entry) -> bytes:
        crc, birth = self.sum_and_birth(entry.root)
        crc = crc if entry.root_crc is None else entry.root_crc
        used = (
            sum(1 for _ in self.leaves(entry.root, entry.levels))
            if entry.used_blocks is None
            else entry.used_blocks
        )
        identity = entry.uuid or uuid5(POOL_UUID, str(number))
        name = entry.name.encode()
        head = (
            entry.magic,
            entry.kind,
            len(name),
            0,
            0,
            identity.bytes,
            entry.size_bytes,
            entry.root,
            crc,
            birth,
            entry.levels,
            0,
        )
        block = bytearray(BLOCK)
        relations = (used, 0, entry.created_cp, entry.origin, entry.backing, entry.backing_blocks)
        layout.IMAGE_HEAD.pack_into(block, 0, *head, *relations)
        block[layout.IMAGE_NAME_OFFSET : layout.IMAGE_NAME_OFFSET + len(name)] = name
        state, mode, flags, remaining = entry.split
        layout.IMAGE_SPLIT.pack_into(
            block,
            layout.IMAGE_SPLIT_OFFSET,
            state,
            mode,
            flags,
            0,
            0,
            0,
            remaining,
            remaining,
            *(0,) * 5,
        )
        return bytes(block)

    def _assemble(self, roots: list[int], sizes: tuple[int, ...], used_blocks: int) -> bytearray:
        pool = bytearray(self.size_blocks * BLOCK)
        for vbn, content in self.blocks.items():
            pool[vbn * BLOCK : (vbn + 1) * BLOCK] = content
        for cp in (self.cp - 1, self.cp):
            block = self.superblock(cp, roots, sizes, used_blocks)
            pool[(cp & 1) * BLOCK : ((cp & 1) + 1) * BLOCK] = block
        for sequence in range(self.log_records):
            # The ring's head stands one block before its end, so that the records run over it.
            vbn = layout.LOG_FIRST_VBN + (LOG_BLOCKS - 1 + sequence) % LOG_BLOCKS
            pool[vbn * BLOCK : (vbn + 1) * BLOCK] = log_record(100 + sequence)
        return pool

    def superblock(
        self,
        cp: int,
        roots: list[int],
        sizes: tuple[int, ...],
        used_blocks: int,
        version: int = 1,
        incompat: int = 0,
    ) -> bytes:
        block = bytearray(BLOCK)
        features = (version, 0, 0, 0, incompat)
        log = (layout.LOG_FIRST_VBN, LOG_BLOCKS, LOG_BLOCKS - 1, 100)
        counters = (cp, self.size_blocks, used_blocks)
        layout.SUPERBLOCK_HEAD.pack_into(
            block, 0, layout.SUPERBLOCK_MAGIC, *features, POOL_UUID.bytes, *counters, *log, 0
        )
        for metafile, (vbn, size) in enumerate(zip(roots, sizes, strict=True)):
            offset = layout.METAFILE_ROOTS_OFFSET + layout.METAFILE_ROOT.size * metafile
            layout.METAFILE_ROOT.pack_into(
                block, offset, vbn, *self.sum_and_birth(vbn), layout.tree_levels(size), 0, size
            )
        return seal_superblock(block)


def pointer_count(contents: Mapping[int, int], levels: int) -> int:
    """Pointer blocks of a tree over these FBNs."""
    return sum(len({fbn >> 8 * level for fbn in contents}) for level in range(1, levels + 1))


def seal_superblock(block: bytearray) -> bytes:
    """The superblock with its CRC32C made right again."""
    layout.SUPERBLOCK_CRC.pack_into(
        block, layout.SUPERBLOCK_CRC_OFFSET, crc32c(bytes(block[: layout.SUPERBLOCK_CRC_OFFSET]))
    )
    return bytes(block)


def log_record(sequence: int) -> bytes:
    """A valid record of one block, with no entries."""
    record = bytearray(BLOCK)
    layout.RECORD_HEAD.pack_into(
        record, 0, layout.RECORD_MAGIC, 0, sequence, CP, 0, POOL_UUID.bytes[:8], 0, 1
    )
    struct.pack_into("<I", record, layout.RECORD_CRC_OFFSET, crc32c(bytes(record)))
    return bytes(record)
