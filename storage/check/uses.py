"""What the walk knows about each VBN: how many references it found, as what, and with which CRC32C.

Eight bytes a VBN, in pages that exist only where something was found, so a sparse pool of many TiB
costs what it holds. They lie side by side, so that a VBN met first touches one page of fresh
memory, not three: that is what a slice's time goes to in a scattered pool.

- References are counted modulo 65536; what overflows goes to a dict, as such VBNs are rare.
- A kind, once claimed, never changes: the first claim wins, and a later one that differs is a
  conflict to report.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from mmap import MADV_NOHUGEPAGE, mmap
from typing import Final

import numpy as np
import numpy.typing as npt

from storage import layout

Mask = npt.NDArray[np.bool_]
Vbns = npt.NDArray[np.int64]
Crcs = npt.NDArray[np.uint32]

# Kinds of use. A pointer block of level n has its base plus n, a block of level 0 the base itself.
KIND_UNUSED: Final = 0
KIND_IMAGE: Final = 1
KIND_METAFILE: Final = 17

# 64 GiB of pool a page: claims are worked off page by page, so most pools should have one.
# Untouched memory costs nothing.
PAGE_SHIFT: Final = 24
PAGE_BLOCKS: Final = 1 << PAGE_SHIFT
assert PAGE_BLOCKS % layout.REGION_BLOCKS == 0


USE_DTYPE = np.dtype([("crc", "<u4"), ("references", "<u2"), ("kind", "u1"), ("unused", "u1")])
REFERENCES_MASK: Final = 0xFFFF


class _Page:
    __slots__ = ("carry", "crc", "kind", "references")

    def __init__(self) -> None:
        # Not np.zeros: it fills a table of structures, and asks for huge memory pages, whose first
        # touch takes many times as long.
        memory = mmap(-1, PAGE_BLOCKS * USE_DTYPE.itemsize)
        memory.madvise(MADV_NOHUGEPAGE)
        table = np.frombuffer(memory, USE_DTYPE)
        self.references: npt.NDArray[np.uint16] = table["references"]
        self.kind: npt.NDArray[np.uint8] = table["kind"]
        self.crc: Crcs = table["crc"]
        self.carry: dict[int, int] = {}

    def count(self, local: Vbns, counts: Vbns) -> None:
        total = self.references[local] + counts
        self.references[local] = (total & REFERENCES_MASK).astype(np.uint16)
        for position in np.flatnonzero(total > REFERENCES_MASK).tolist():
            vbn = int(local[position])
            self.carry[vbn] = self.carry.get(vbn, 0) + (int(total[position]) & ~REFERENCES_MASK)


@dataclass(frozen=True)
class Claim:
    """Outcome of a claim, one element for each reference given: the first of its VBN; kind differs;
    CRC32C differs.
    """

    fresh: Mask
    kind_differs: Mask
    crc_differs: Mask


class Uses:
    """References found so far, by VBN. All VBNs given lie within the pool: the walk has checked
    them.
    """

    def __init__(self) -> None:
        self._pages: dict[int, _Page] = {}

    def claim(self, vbns: Vbns, crcs: Crcs, kind: int) -> Claim:
        """Count one reference to each of ``vbns`` (repeats allowed), made by a field with the
        CRC32C beside it.
        """
        claim = Claim(*(np.zeros(len(vbns), np.bool_) for _ in range(3)))
        if not len(vbns):
            return claim
        order = np.argsort(vbns, kind="stable")
        ordered, ordered_crcs = vbns[order], crcs[order]
        for number, first, end in _page_runs(ordered):
            page = self._pages.get(number) or self._pages.setdefault(number, _Page())
            local = ordered[first:end] & (PAGE_BLOCKS - 1)
            _claim_in_page(page, local, ordered_crcs[first:end], kind, claim, order[first:end])
        return claim

    def kind(self, vbn: int) -> int:
        """As what ``vbn`` was first claimed; KIND_UNUSED when nothing reached it."""
        page = self._pages.get(vbn >> PAGE_SHIFT)
        return KIND_UNUSED if page is None else int(page.kind[vbn & (PAGE_BLOCKS - 1)])

    def region(self, region: int) -> npt.NDArray[np.int64] | None:
        """References found to each VBN of a region of the active map; None when there is none at
        all.
        """
        base = region * layout.REGION_BLOCKS
        page = self._pages.get(base >> PAGE_SHIFT)
        if page is None:
            return None
        first = base & (PAGE_BLOCKS - 1)
        references = page.references[first : first + layout.REGION_BLOCKS].astype(np.int64)
        for local, carry in page.carry.items():
            if first <= local < first + layout.REGION_BLOCKS:
                references[local - first] += carry
        return references


def _page_runs(ordered: Vbns) -> Iterator[tuple[int, int, int]]:
    """(page number, first, end) for each run of sorted VBNs that lies in one page."""
    pages = ordered >> PAGE_SHIFT
    starts = _run_starts(pages).tolist()
    for first, end in zip(starts, [*starts[1:], len(ordered)], strict=True):
        yield int(pages[first]), first, end


def _run_starts(ordered: Vbns) -> Vbns:
    """Positions at which another value begins than the one before."""
    return np.concatenate(((0,), np.flatnonzero(ordered[1:] != ordered[:-1]) + 1))


def _claim_in_page(
    page: _Page, local: Vbns, crcs: Crcs, kind: int, claim: Claim, places: Vbns
) -> None:
    starts = _run_starts(local)
    distinct = local[starts]
    fresh = page.kind[distinct] == KIND_UNUSED
    page.kind[distinct[fresh]] = kind
    page.crc[distinct[fresh]] = crcs[starts[fresh]]
    page.count(distinct, np.diff(np.concatenate((starts, (len(local),)))))
    claim.fresh[places[starts[fresh]]] = True
    claim.kind_differs[places] = page.kind[local] != kind
    claim.crc_differs[places] = page.crc[local] != crcs
