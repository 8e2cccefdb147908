"""A slice of the crash enumeration, another one each time, and the proof that it finds what is
planted. All of it: ``make crash``.
"""

import os
import random

import pytest

from tests.crash.canaries import CANARIES, Canary, planted
from tests.crash.enumerator import Enumerator
from tests.crash.run import enumerate_all, jobs, main, part_of, replay
from tests.crash.workloads import sequences

# One workload in so many: about 6,000 states, half a minute of one core.
SLICE = 40
# Fewer would mean that the slice has lost its sense.
SLICE_STATES_MIN = 1000


def test_the_whole_has_every_sequence() -> None:
    assert len(list(sequences())) == 12 + 12**2 + 12**3


def test_slice(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("CLEAVED_SEED", random.SystemRandom().randrange(1 << 32)))
    with capsys.disabled():
        print(f"\n[CLEAVED_SEED={seed}] ", end="", flush=True)
    tally = enumerate_all(part_of(jobs(), SLICE, seed), seed, 1, use_every=10)
    assert not tally.failures, (
        f'replay: make crash ARGS="--seed {seed} --replay'
        f" '{tally.failures[0].splitlines()[0]}'\"\n{tally.failures[0]}"
    )
    assert len(tally.states) > SLICE_STATES_MIN


# Which workloads must find each: short sequences where one operation after another shows it, a long
# one where it takes a race.
SHORT = {
    "superblock_before_data_sync": ("snapshot_create",),
    "trimmed_block_becomes_a_hole": ("unmap", "consistency_point"),
    "replay_ignores_a_bad_crc": ("write_fua",),
}
# For the others: long ones, until one finds it. The odd ones have small records.
LONG_SEEDS = (5, 1, 2, 3)


@pytest.mark.disorder
@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.__name__)
def test_planted_bug_is_found(canary: Canary) -> None:
    enumerator = Enumerator(1, use_every=1 << 30, failures_max=1)
    try:
        with planted(canary):
            if canary.__name__ in SHORT:
                enumerator.sequence(SHORT[canary.__name__])
            else:
                for seed in LONG_SEEDS:
                    enumerator.long_workload(seed)
                    if enumerator.tally.failures:
                        break
    finally:
        enumerator.close()
    assert enumerator.tally.failures


@pytest.mark.disorder
def test_failure_is_replayed_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    enumerator = Enumerator(5, use_every=1 << 30, failures_max=1)
    with planted(CANARIES[0]):
        enumerator.sequence(("snapshot_create",))
        name = enumerator.tally.failures[0].splitlines()[0]
        again = replay(name, 5)
        assert [failure.splitlines()[0] for failure in again.failures] == [name]
        assert main(["--seed", "5", "--replay", name]) == 1
    enumerator.close()
    assert f"--replay '{name}'" in capsys.readouterr().out


def test_same_workload_gives_the_same_states() -> None:
    """What dedup and replay rest on."""
    found = []
    for _ in range(2):
        enumerator = Enumerator(3, use_every=1 << 30)
        enumerator.sequence(("write_fua",))
        found.append(enumerator.tally.states)
        enumerator.close()
    assert found[0] == found[1] and len(found[0]) > 10
