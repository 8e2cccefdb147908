"""The one codec for fields of pointer blocks, and the places that inline it for speed."""

import re
from pathlib import Path
from random import Random

import numpy as np
import pytest

from protocol import volume
from storage.checksum import crc32c
from storage.data import read_path
from storage.data.long_write import LONG_BYTES_MIN
from storage.fields import FIELD_DTYPE, Field, field_at, set_crc, set_field, vbn_at
from storage.layout import (
    ATOMIC_WRITE_BYTES_MAX,
    BLOCK_BYTES,
    FIELD,
    FIELD_BYTES,
    FIELDS_PER_BLOCK,
    FIELDS_SHIFT,
    ZERO_POINTER,
)
from storage.tree.node import Node
from tests.storage.pools import LEAF_BYTES, OpenPool, data, new_pool

STORAGE = Path(__file__).resolve().parents[2] / "storage"
WIDEST = (2**64 - 1, 2**32 - 1, 2**32 - 1)


def random_fields(seed: int) -> list[Field]:
    chance = Random(seed)
    return [
        (chance.getrandbits(64), chance.getrandbits(32), chance.getrandbits(32))
        for _ in range(FIELDS_PER_BLOCK - 2)
    ] + [WIDEST, (0, 0, 0)]


def test_the_codec_is_the_format() -> None:
    fields = random_fields(1)
    buf = bytearray(BLOCK_BYTES)
    q = memoryview(buf).cast("Q")
    for index, field in enumerate(fields):
        set_field(q, 5 * FIELDS_PER_BLOCK + index, field)
    rows = np.frombuffer(buf, dtype=FIELD_DTYPE)
    for index, field in enumerate(fields):
        assert FIELD.unpack_from(buf, index * FIELD_BYTES) == field
        assert tuple(rows[index].tolist()) == field
        assert field_at(q, FIELDS_PER_BLOCK + index) == field
        assert vbn_at(q, index) == field[0]


def test_a_crc_is_entered_only_where_the_field_names_that_block() -> None:
    q = memoryview(bytearray(BLOCK_BYTES)).cast("Q")
    for index, (vbn, crc, birth) in enumerate(random_fields(2)):
        set_field(q, index, (vbn, crc, birth))
        set_crc(q, index, vbn ^ 1, 7)
        assert field_at(q, index) == (vbn, crc, birth)
        set_crc(q, index, vbn, 0xFFFFFFFF - crc)
        assert field_at(q, index) == (vbn, 0xFFFFFFFF - crc, birth)


# --- What inlines it ------------------------------------------------------------------------------


def leaf(running: OpenPool, name: str, fbn: int) -> Node:
    return running.image(name).tree.leaves[fbn >> FIELDS_SHIFT]


def field_of(running: OpenPool, name: str, fbn: int) -> Field:
    return field_at(leaf(running, name, fbn).q, fbn)


@pytest.mark.parametrize("blocks", [1, 3, LONG_BYTES_MIN // BLOCK_BYTES, 300])
async def test_writes_install_what_the_codec_reads(blocks: int) -> None:
    """Single blocks, batches of fields, and slices of whole pointer blocks."""
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        first, fields = 250, list[Field]()
        for seed in (1, 2):
            ledger = running.pool._state.epoch.ledger
            freed = len(ledger.freed) + len(ledger.dropped)
            before = [] if seed == 1 else [vbn for vbn, _, _ in fields]
            content = data(seed, blocks)
            await running.write("a", first * BLOCK_BYTES, content)
            taken = {vbn + at for vbn, length in ledger.allocated for at in range(length)}
            fields = [field_of(running, "a", first + at) for at in range(blocks)]
            for at, (vbn, crc, birth) in enumerate(fields):
                assert vbn in taken
                assert crc == crc32c(content[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES])
                assert birth == running.pool._state.epoch.number
            gone = [*ledger.freed, *ledger.dropped]
            assert set(before) <= set(gone) and len(gone) >= freed + len(before)


async def test_what_is_old_is_told_from_what_is_new_by_the_birth() -> None:
    """A block born before the snapshot may be shared: its reference is dropped, not the block."""
    for blocks in (2, LONG_BYTES_MIN // BLOCK_BYTES):
        async with new_pool() as running:
            await running.pool.vdisk_create("a", LEAF_BYTES)
            await running.write("a", 0, data(1, 2 * blocks))
            await running.pool.snapshot_create([("a", "s")])
            await running.write("a", 0, data(2, blocks))
            old = [field_of(running, "a", fbn)[0] for fbn in range(2 * blocks)]
            ledger = running.pool._state.epoch.ledger
            ledger.freed.clear()
            ledger.dropped.clear()
            await running.write("a", 0, data(3, 2 * blocks))
            assert ledger.freed == old[:blocks] and ledger.dropped == old[blocks:]
            running.pool._state.fail("the lists were cleared")


async def test_reads_find_what_the_codec_reads() -> None:
    async with new_pool() as running:
        await running.pool.vdisk_create("a", 4 * LEAF_BYTES)
        await running.write("a", 0, data(1, 300))
        chance = Random(3)
        for seed in range(40):
            await running.write("a", chance.randrange(300) * BLOCK_BYTES, data(seed))
        await running.zero("a", 100 * BLOCK_BYTES, 20 * BLOCK_BYTES)
        image = running.image("a")
        expected = []
        for fbn in range(300):
            vbn, crc, _ = field_of(running, "a", fbn)
            expected.append((vbn, crc) if vbn > ZERO_POINTER else read_path.NOTHING)
        assert [read_path.locate(image, fbn) for fbn in range(300)] == expected
        assert read_path.locate_range(image, 0, 300) == expected
        runs = 0
        for fbn in range(0, 256, 2):
            run = read_path.locate_run(image, fbn, 2)
            (vbn, crc), (following, following_crc) = expected[fbn : fbn + 2]
            if run is None:
                assert not vbn or following != vbn + 1
                continue
            runs += 1
            assert run[0] == vbn and following == vbn + 1
            assert [tail & 0xFFFFFFFF for tail in run[1]] == [crc, following_crc]
            read = read_path.try_read_run(image, *run)
            assert read is not None
            assert read == await running.read("a", fbn * BLOCK_BYTES, 2 * BLOCK_BYTES)
        assert runs > 20
        q = leaf(running, "a", 0).q
        vbn, crc, birth = field_at(q, 7)
        block = running.volume("a").try_read(7 * BLOCK_BYTES, BLOCK_BYTES)
        assert block is not None and crc32c(block) == crc
        set_field(q, 7, (vbn, crc ^ 1, birth))
        assert running.volume("a").try_read(7 * BLOCK_BYTES, BLOCK_BYTES) is None
        set_field(q, 7, (vbn, crc, birth))


# --- What nobody else does ------------------------------------------------------------------------


def found_outside(pattern: str, *allowed: str) -> list[str]:
    return [
        f"{path.relative_to(STORAGE)}: {line.strip()}"
        for path in sorted(STORAGE.rglob("*.py"))
        if not str(path.relative_to(STORAGE)).startswith(allowed)
        for line in path.read_text().splitlines()
        if re.search(pattern, line)
    ]


def test_the_list_of_nodes_is_private_to_its_room() -> None:
    assert found_outside(r"\btree\.nodes\b|\.nodes\[", "tree/") == []


def test_crc32c_is_imported_in_one_module() -> None:
    assert found_outside(r"^(from|import) crc32c\b", "checksum.py") == []


def test_fields_are_taken_apart_only_by_the_codec_and_where_that_is_said() -> None:
    shifts = found_outside(r"0xFFFFFFFF|(>>|<<) 32\b", "fields.py", "check/", "layout.py")
    assert shifts == []
    inline = found_outside(r"& FIELDS_MASK\) \* 2", "fields.py")
    places = {place.split(":", 1)[0] for place in inline}
    for place in places:
        assert "inlines" in (STORAGE / place).read_text(), place
    assert places == {
        "data/long_write.py",
        "data/read_path.py",
        "data/write_path.py",
        "vdisks/volume.py",
    }


def test_no_bare_shift_stands_for_the_size_of_a_block() -> None:
    assert found_outside(r"(>>|<<) 12\b") == []


def test_the_atomic_write_is_what_the_protocols_promise() -> None:
    """Neither layer imports the other, so the number stands twice."""
    assert volume.ATOMIC_WRITE_BYTES_MAX == ATOMIC_WRITE_BYTES_MAX
