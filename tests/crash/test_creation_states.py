"""Power losses while a pool is made, and while a copy of its superblock is repaired: every state is
a pool, or plainly none yet.
"""

from collections.abc import Iterator
from random import Random

import pytest

from storage.device.signatures import HEAD_BYTES, TAIL_BYTES, identify
from storage.errors import NoPool
from storage.layout import BLOCK_BYTES, SUPERBLOCK_VBNS
from storage.pool import Pool
from storage.superblock.superblock import decode
from tests.crash.determinism import VirtualLoop, repeatable, run_to_the_end
from tests.crash.oracle import Model
from tests.crash.recording import ZERO_PAGE, PageDevice, Pages, RecordingDevice, Request
from tests.crash.session import CACHE_BYTES, abandon, open_steady
from tests.crash.states import crash_states
from tests.crash.verify import Verification, checked
from tests.crash.workloads import POOL_BYTES, make_base

Epochs = list[tuple[Pages, list[Request]]]
# Identities of what is made after the base.
LATER = 1000


@pytest.fixture(scope="module")
def loop() -> Iterator[VirtualLoop]:
    made = VirtualLoop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def base(loop: VirtualLoop) -> tuple[Pages, Model]:
    with repeatable():
        return run_to_the_end(loop, make_base())


def states(epochs: Epochs) -> Iterator[tuple[str, Pages]]:
    for number, (durable, requests) in enumerate(epochs):
        for name, overlay in crash_states(durable, requests, seed=1):
            yield f"epoch {number} / {name}", durable | overlay


async def formatted(pages: Pages, *, erase: bool) -> Epochs:
    epochs: Epochs = []
    device = RecordingDevice(
        POOL_BYTES, pages, lambda durable, requests: epochs.append((dict(durable), requests))
    )
    await Pool.format(device, erase=erase)
    epochs.append((dict(device.base), device.requests()))
    return epochs


def holds(pages: Pages) -> str | None:
    """What the signatures say that is there."""

    def content(first: int, end: int) -> bytes:
        return b"".join(pages.get(page, ZERO_PAGE) for page in range(first, end))

    blocks = POOL_BYTES // BLOCK_BYTES
    return identify(
        content(0, HEAD_BYTES // BLOCK_BYTES),
        content(blocks - TAIL_BYTES // BLOCK_BYTES, blocks),
        POOL_BYTES,
    )


async def outcome(pages: Pages) -> str:
    """What a start makes of it: the UUID of the pool that opens and is whole, or "none" where a
    creation goes ahead.
    """
    device = PageDevice(POOL_BYTES, dict(pages))
    try:
        pool = await Pool.open_on(device, CACHE_BYTES)
    except NoPool:
        assert holds(pages) is None, "a later creation would refuse it"
        await Pool.format(device)
        pool = await Pool.open_on(device, CACHE_BYTES)
        found = "none"
    else:
        found = pool.show()["uuid"]
    assert pool.show()["read_only_reason"] is None
    checked(device.pages, POOL_BYTES, "after the creation")
    await abandon(pool)
    return found


def test_a_creation_that_loses_power_is_a_pool_or_made_again(loop: VirtualLoop) -> None:
    with repeatable():
        epochs = run_to_the_end(loop, formatted({}, erase=False))
        found: dict[str, int] = {}
        for name, pages in states(epochs):
            try:
                uuid = run_to_the_end(loop, outcome(pages))
            except Exception as error:
                raise AssertionError(name) from error
            found[uuid] = found.get(uuid, 0) + 1
    assert len(found) == 2 and found["none"] > 100


def test_a_creation_over_an_old_pool_leaves_the_old_one_or_none_or_the_new_one(
    loop: VirtualLoop, base: tuple[Pages, Model]
) -> None:
    """Never a new superblock beside an old one with a higher number."""
    with repeatable():
        old = run_to_the_end(loop, outcome(base[0]))
    with repeatable(LATER):
        epochs = run_to_the_end(loop, formatted(base[0], erase=True))
        found = {}
        for name, pages in states(epochs):
            try:
                found[name] = run_to_the_end(loop, outcome(pages))
            except Exception as error:
                raise AssertionError(name) from error
    uuids = set(found.values())
    assert {old, "none"} < uuids and len(uuids) == 3
    assert {name.partition(" /")[0] for name, uuid in found.items() if uuid == old} == {"epoch 0"}


@pytest.mark.parametrize("vbn", SUPERBLOCK_VBNS)
@pytest.mark.parametrize("damage", ["zeros", "garbage", "stale"])
def test_a_repair_may_be_interrupted(
    loop: VirtualLoop, base: tuple[Pages, Model], vbn: int, damage: str
) -> None:
    """And what the pool takes on at once afterwards is as safe as ever: no consistency point is at
    risk with its predecessor.
    """
    pages, model = base
    content = {
        "zeros": ZERO_PAGE,
        "garbage": Random(7).randbytes(BLOCK_BYTES),
        "stale": stale_of(loop, pages, vbn),
    }[damage]
    epochs: Epochs = []

    async def repair() -> int:
        device = RecordingDevice(
            POOL_BYTES,
            {**pages, vbn: content},
            lambda durable, requests: epochs.append((dict(durable), requests)),
        )
        pool = await open_steady(device)
        number = int(pool.show()["cp_number"])
        epochs.append((dict(device.base), device.requests()))
        await abandon(pool)
        return number

    with repeatable(LATER):
        number = run_to_the_end(loop, repair())
        assert len(epochs) >= 4
        for name, left in states(epochs):
            verification = Verification(left, POOL_BYTES, model.expectation())
            try:
                run_to_the_end(loop, verification.run(use=False))
            except Exception as error:
                raise AssertionError(name) from error
            assert verification.pool.show()["cp_number"] >= number, name


def stale_of(loop: VirtualLoop, pages: Pages, vbn: int) -> bytes:
    """The copy at this VBN as of one consistency point before: what a lost write leaves."""
    superblock = decode(pages[vbn])
    assert superblock is not None
    superblock.cp_number -= 1
    return bytes(superblock.encode())
