"""Which states a power loss can leave of one epoch: overlays over its durable base (issue "Proof
that nothing is lost", point 1).

Each request is applied, dropped, torn at sectors (prefix, suffix, random mask), or applied with one
sector turned to garbage (the one that was under the head). Up to SUBSETS_ALL requests: every
subset. More: all prefixes, all but one, only one, and seeded subsets.
"""

from collections.abc import Iterator, Sequence
from random import Random

from tests.crash.recording import PAGE_BYTES, ZERO_PAGE, Pages, Request

SECTOR_BYTES = 512
SECTORS_PER_PAGE = PAGE_BYTES // SECTOR_BYTES
SUBSETS_ALL = 8
SUBSETS_SEEDED = 64
# Torn forms of a write of client data: each sector is checked by the same CRC32C, so samples say as
# much as all.
TEARS_OF_DATA = 2
# What every sector of client data in these tests begins with; whatever does not is metadata.
DATA_TAG = b"cleaved-test-data"
# A torn request among long ones: at most so many of its pages are torn one by one.
PAGES_TORN_MAX = 8

Overlay = dict[int, bytes]


def is_metadata(page: bytes) -> bool:
    return not page.startswith(DATA_TAG)


def crash_states(
    base: Pages, requests: Sequence[Request], seed: int
) -> Iterator[tuple[str, Overlay]]:
    """(name, overlay) of every state to try. The same arguments give the same states in the same
    order.
    """
    random = Random(seed)
    for name, chosen in subsets(len(requests), random):
        yield name, overlay_of([requests[at] for at in chosen])
    for at, request in enumerate(requests):
        before = overlay_of(requests[:at])
        for name, torn in torn_forms(base, before, request, random):
            yield f"torn {at} {name}, later ones lost", before | torn
            if at + 1 < len(requests):
                # The later ones over the torn one; a page that a later one writes too is that
                # one's.
                yield (
                    f"torn {at} {name}, later ones there",
                    before | torn | overlay_of(requests[at + 1 :]),
                )


def subsets(count: int, random: Random) -> Iterator[tuple[str, list[int]]]:
    """Names and members of the subsets of ``count`` requests that are tried."""
    everything = list(range(count))
    if count <= SUBSETS_ALL:
        for mask in range(1 << count):
            yield f"subset {mask:0{max(count, 1)}b}", [at for at in everything if mask >> at & 1]
        return
    for length in range(count + 1):
        yield f"first {length}", everything[:length]
    for at in everything:
        yield f"all but {at}", everything[:at] + everything[at + 1 :]
        yield f"only {at}", [at]
    for number in range(SUBSETS_SEEDED):
        yield f"seeded subset {number}", [at for at in everything if random.random() < 0.5]


def overlay_of(requests: Sequence[Request]) -> Overlay:
    overlay: Overlay = {}
    for first, pages in requests:
        if len(pages) == 1:
            overlay[first] = pages[0]
        else:
            overlay.update(enumerate(pages, first))
    return overlay


def torn_forms(
    base: Pages, before: Overlay, request: Request, random: Random
) -> Iterator[tuple[str, Overlay]]:
    """What may be on the medium of a request that was under way."""
    whole = overlay_of([request])
    pages = list(whole)
    if len(pages) > PAGES_TORN_MAX:
        pages = sorted(random.sample(pages, PAGES_TORN_MAX))
    for page in pages:
        old, new = before.get(page, base.get(page, ZERO_PAGE)), whole[page]
        # Sectors are written from the first on: pages before the torn one are there, those behind
        # are not.
        head = {at: content for at, content in whole.items() if at < page}
        if is_metadata(new):
            for sectors in range(1, SECTORS_PER_PAGE):
                yield (
                    f"page {page} first {sectors}",
                    head | {page: first_sectors(old, new, sectors)},
                )
            yield f"page {page} last", head | {page: first_sectors(new, old, random.randint(1, 7))}
            yield f"page {page} mask", {page: masked(old, new, random)}
            yield f"page {page} garbage", whole | {page: with_garbage(new, random)}
            continue
        for _ in range(TEARS_OF_DATA):
            yield f"page {page} mask", head | {page: masked(old, new, random)}
        yield f"page {page} garbage", whole | {page: with_garbage(new, random)}


def first_sectors(old: bytes, new: bytes, sectors: int) -> bytes:
    return new[: sectors * SECTOR_BYTES] + old[sectors * SECTOR_BYTES :]


def masked(old: bytes, new: bytes, random: Random) -> bytes:
    mask = random.randrange(1, 255)
    starts = range(0, PAGE_BYTES, SECTOR_BYTES)
    return b"".join(
        (new if mask >> at & 1 else old)[start : start + SECTOR_BYTES]
        for at, start in enumerate(starts)
    )


def with_garbage(content: bytes, random: Random) -> bytes:
    start = random.randrange(SECTORS_PER_PAGE) * SECTOR_BYTES
    return content[:start] + random.randbytes(SECTOR_BYTES) + content[start + SECTOR_BYTES :]
