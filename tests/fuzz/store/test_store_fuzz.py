"""A minute of the fuzzer with fresh seeds, and the planted bugs, which must be found
(docs/reliability.md).
"""

import secrets
import time

import pytest

from tests.fuzz.store.canaries import CANARIES, Canary, seeds_until_found
from tests.fuzz.store.oracle import (
    FOREVER,
    ZEROS,
    History,
    Image,
    Judge,
    Moment,
    Write,
    Wrong,
    content,
)
from tests.fuzz.store.plan import kept_of, plan_of, replayed
from tests.fuzz.store.run import command
from tests.fuzz.store.session import carry_out
from tests.fuzz.store.shrink import shrunk

# Of processor time; a plan that was begun is carried out to its end.
SECONDS = 60.0


def test_a_minute_of_fresh_seeds_finds_nothing() -> None:
    seed, began = secrets.randbits(32), time.process_time()
    print(f"seed {seed}")
    while time.process_time() - began < SECONDS:
        _, wrong = carry_out(plan_of(seed))
        assert wrong is None, f"{wrong}; replay: {command(plan_of(seed))}"
        seed += 1


@pytest.mark.disorder
@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.name)
def test_a_planted_bug_is_found(canary: Canary) -> None:
    assert seeds_until_found(canary) is not None


def test_a_plan_is_replayed_to_the_letter() -> None:
    told: list[list[str]] = []
    for _ in range(2):
        steps: list[str] = []
        carry_out(plan_of(12), steps.append)
        told.append(steps)
    assert told[0] == told[1] and len(told[0]) > 100


def test_the_text_of_a_part_of_a_plan_names_it() -> None:
    plan = kept_of(plan_of(5), [0, 1, 2, 7, 9, 10], 2)
    assert plan.text == "5:keep=0-2,7,9-10:device=2" and replayed(plan.text) == plan


@pytest.mark.disorder
def test_what_fails_is_made_short() -> None:
    canary = next(canary for canary in CANARIES if "without a sync" in canary.name)
    found = seeds_until_found(canary)
    assert found is not None
    with canary.planted():
        plan = plan_of(found.seed)
        _, wrong = carry_out(plan)
        assert wrong is not None
        short = shrunk(plan, wrong, lambda _: None, runs_max=60)
        assert len(short.kept) < len(plan.kept) and carry_out(replayed(short.text))[1] is not None


# --- The oracle's own rules -----------------------------------------------------------------------


def written(
    image: Image, version: int, start: int, end: int = FOREVER, durable: bool = False
) -> bytes:
    block = content(version, 0, 8)
    write = Write(version, start, f"write {version}")
    image.begin_write(write, [(0, 0xFF, block)])
    if end != FOREVER:
        image.end_write(write, end, "done", durable)
    return block


def possible(image: Image, crashed: bool = False) -> set[bytes]:
    cell = image.cells.get(0, ZEROS)
    return {value[2] for value in cell.allowed(crashed)} if isinstance(cell, History) else {cell}  # type: ignore[arg-type]


def test_an_acknowledged_write_is_read_and_may_be_lost_with_the_power() -> None:
    image = Image("a", 1)
    block = written(image, 1, 1, 2)
    assert possible(image) == {block} and possible(image, crashed=True) == {block, ZEROS}
    image.flushed(3)
    assert image.cells[0] == block


def test_writes_under_way_together_have_no_order() -> None:
    image = Image("a", 1)
    one = written(image, 1, 1, 4)
    other = written(image, 2, 3, 5)
    assert possible(image) == {one, ZEROS} - {ZEROS} | {other}
    last = written(image, 3, 6, 7, durable=True)
    assert image.cells[0] == last


def test_a_snapshot_is_of_one_moment() -> None:
    image = Image("a", 2)
    taking = image.begin_taking(Moment(0))
    early = Write(1, 1, "early")
    image.begin_write(early, [(0, 0xFF, content(1, 0, 8))])
    image.end_write(early, 2, "done")
    late = Write(2, 3, "late")
    image.begin_write(late, [(1, 0xFF, content(2, 8, 8))])
    image.end_write(late, 4, "done")
    snapshot = Image("s", 2)
    snapshot.take_over(image, taking)
    judge = Judge(snapshot, "test")
    judge.block(0, snapshot.cells[0], ZEROS)  # type: ignore[arg-type]
    with pytest.raises(Wrong, match="but not early"):
        judge.block(1, snapshot.cells[1], content(2, 8, 8))  # type: ignore[arg-type]


def test_an_atomic_write_is_seen_whole() -> None:
    image = Image("a", 2)
    write = Write(1, 1, "atomic", atomic=True)
    image.begin_write(write, [(0, 0xFF, content(1, 0, 8)), (1, 0xFF, content(1, 8, 8))])
    reading = image.begin_read(0, 2, 2)
    judge = Judge(image, "test")
    judge.block(0, reading.allowed(0), content(1, 0, 8))
    judge.block(1, reading.allowed(1), ZEROS)
    with pytest.raises(Wrong, match="there at LBA 7 and not at LBA 15"):
        judge.end()
