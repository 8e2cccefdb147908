"""The check against plain models: references by a dict, holes by walking block by block."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import layout
from storage.check.uses import Uses
from tests.storage.checking import COUNTED, SNAPSHOT, VDISK, assert_finds, check
from tests.storage.pool_writer import BLOCK, Entry, PoolWriter


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), min_size=1, max_size=60),
        max_size=12,
    )
)
def test_uses_against_a_dict(batches: list[list[tuple[int, int]]]) -> None:
    # Places at both sides of page borders, so that one claim covers several pages.
    spread = [n * 7 + (n % 3) * ((1 << 24) - 100) for n in range(41)]
    uses, references, kinds, crcs = Uses(), dict[int, int](), dict[int, int](), dict[int, int]()
    for batch in batches:
        kind = batch[0][1]
        vbns = [spread[place] for place, _ in batch]
        claim = uses.claim(np.array(vbns), np.array([crc for _, crc in batch], np.uint32), kind)
        for position, (vbn, (_, crc)) in enumerate(zip(vbns, batch, strict=True)):
            assert claim.fresh[position] == (vbn not in kinds)
            references[vbn] = references.get(vbn, 0) + 1
            assert claim.kind_differs[position] == (kinds.setdefault(vbn, kind) != kind)
            assert claim.crc_differs[position] == (crcs.setdefault(vbn, crc) != crc)
    for vbn, count in references.items():
        region = uses.region(vbn // layout.REGION_BLOCKS)
        assert (
            region is not None
            and region[vbn % layout.REGION_BLOCKS] == count
            and uses.kind(vbn) == kinds[vbn]
        )


FBNS = st.one_of(
    st.integers(0, 3),
    st.integers(250, 260),
    st.integers(510, 516),
    st.integers(65530, 65540),
    st.integers(131071, 131080),
)
CONTENTS = st.dictionaries(FBNS, st.sampled_from(["data", "zeros"]), max_size=25)
UPPER_ZEROS = st.sets(
    st.sampled_from([(1, 0), (1, 1), (1, 2), (1, 256), (2, 0), (2, 1), (2, 2)]), max_size=2
)
LAYER = st.tuples(CONTENTS, UPPER_ZEROS, st.integers(0, 140000), st.integers(0, 1))


class Layer:
    """One tree of a chain, with zero pointers above level 1 where nothing else stands
    below them.
    """

    def __init__(
        self,
        contents: dict[int, str],
        upper: set[tuple[int, int]],
        limit_blocks: int,
        extra_levels: int,
    ) -> None:
        self.contents = {
            fbn: what
            for fbn, what in contents.items()
            if not any(self._covers(zero, fbn) for zero in upper)
        }
        self.upper = {
            zero
            for zero in upper
            if not any(other[0] > zero[0] and self._covers(other, zero[1] << 8) for other in upper)
        }
        self.limit_blocks = limit_blocks
        self.levels = min(layout.TREE_LEVELS_MAX, 3 + extra_levels)

    @staticmethod
    def _covers(zero: tuple[int, int], fbn: int) -> bool:
        return fbn >> (8 * zero[0]) == zero[1]

    def at(self, fbn: int) -> str | None:
        return (
            "zeros"
            if any(self._covers(zero, fbn) for zero in self.upper)
            else self.contents.get(fbn)
        )

    def build(self, pool: PoolWriter) -> int:
        row = {
            fbn: pool.data(f"block {fbn}") if what == "data" else layout.ZERO_POINTER
            for fbn, what in self.contents.items()
        }
        for level in range(1, self.levels + 1):
            parents: dict[int, dict[int, int]] = {}
            for index, vbn in row.items():
                parents.setdefault(index >> 8, {})[index & 255] = vbn
            row = {index: pool.pointer(fields) for index, fields in parents.items()}
            row |= {
                index: layout.ZERO_POINTER
                for zero_level, index in self.upper
                if zero_level == level
            }
        return row.get(0, layout.HOLE)


@settings(max_examples=60, deadline=None)
@given(LAYER, st.lists(LAYER, min_size=1, max_size=3))
def test_holes_against_a_plain_model(own: tuple, behind: list[tuple]) -> None:
    """A clone of chains of any shape: the count of holes is what resolving each FBN by the terms of
    the design gives.
    """
    clone, chain = Layer(*own), [Layer(*layer) for layer in behind]
    pool = PoolWriter()
    size = 150_000 * BLOCK

    def counts(fbn: int) -> bool:
        if clone.at(fbn) is not None:
            return False
        for front, layer in zip([clone, *chain], chain, strict=False):
            if fbn >= front.limit_blocks:
                return False
            if layer.at(fbn) is not None:
                return layer.at(fbn) == "data"
        return False

    holes = sum(counts(fbn) for fbn in {fbn for layer in chain for fbn in layer.contents})
    pool.entries[1] = Entry(VDISK, "base", size_bytes=size)
    for position, layer in enumerate(chain):
        last = position == len(chain) - 1
        backing, limit = (0, 0) if last else (11 + position, layer.limit_blocks)
        pool.entries[10 + position] = Entry(
            SNAPSHOT, f"s{position}", layer.build(pool), layer.levels, size, 1, backing, limit
        )
    split = (layout.SPLIT_RUNNING, 0, COUNTED, holes)
    pool.entries[2] = Entry(
        VDISK,
        "clone",
        clone.build(pool),
        clone.levels,
        size,
        0,
        10,
        clone.limit_blocks,
        split=split,
    )
    assert check(pool.build()).errors == []
    pool.entries[2].split = (layout.SPLIT_RUNNING, 0, COUNTED, holes + 1)
    assert_finds(
        check(pool.build()).errors,
        rf"vdisk 'clone': its split counts {holes + 1} remaining holes, its trees have {holes}",
    )


def test_holes_below_a_backing_store_of_other_height_are_counted_whole() -> None:
    """An empty clone of a lower tree, and one that is lower itself: whole subtrees count without
    being read field by field.
    """
    pool = PoolWriter(size_blocks=8192)
    contents = {fbn: pool.data("x") for fbn in range(600)}
    pool.entries = {
        1: Entry(VDISK, "base", size_bytes=1024 * BLOCK),
        2: Entry(SNAPSHOT, "s", pool.tree(contents, 2), 2, 1024 * BLOCK, origin=1),
        3: Entry(
            VDISK,
            "high",
            layout.HOLE,
            4,
            1 << 34,
            backing=2,
            backing_blocks=1024,
            split=(1, 0, COUNTED, 600),
        ),
        4: Entry(
            VDISK,
            "low",
            pool.tree({3: pool.data("own")}, 1),
            1,
            1024 * BLOCK,
            0,
            2,
            590,
            split=(1, 0, COUNTED, 589),
        ),
        5: Entry(
            VDISK,
            "zeros",
            layout.ZERO_POINTER,
            1,
            1024 * BLOCK,
            0,
            2,
            600,
            split=(1, 0, COUNTED, 600 - 256),
        ),
    }
    assert check(pool.build()).errors == []


def test_more_references_than_sixteen_bits_count() -> None:
    uses = Uses()
    for _ in range(3):
        uses.claim(np.full(40_000, 5), np.zeros(40_000, np.uint32), 1)
    region = uses.region(0)
    assert region is not None and region[5] == 120_000 and region.sum() == 120_000
