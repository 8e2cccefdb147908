"""``make crash``: the whole enumeration, or a part of it, on several processes, with its figures;
and the replay of one failure.

    python -m tests.crash.run [--seed N] [--workers N] [--use-every N] [--part N] [--replay STATE]

The seed is printed first. ``--part 10`` runs every tenth workload, beginning with one that the seed
chooses.
"""

import argparse
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence as Many
from typing import NamedTuple

from tests.crash.enumerator import Enumerator, Tally
from tests.crash.long_workloads import WORKLOADS
from tests.crash.workloads import sequences

# Of how many states one is used, split and emptied as well; the others are mounted, compared and
# checked. Measured: 22 against 1 ms.
USE_EVERY = 20
FAILURES_SHOWN = 10


class Job(NamedTuple):
    """One workload: a sequence and the mode of its splits, or the seed of a long one."""

    names: tuple[str, ...] = ()
    mode: str = "copy"
    long_seed: int = -1


def jobs() -> list[Job]:
    """The long ones first, so that no process is left alone with one at the end; share mode where
    there is a split to share.
    """
    short = [Job(names) for names in sequences()]
    shared = [Job(names, "share") for names in sequences() if "split_step" in names]
    return [*(Job(long_seed=seed) for seed in range(WORKLOADS)), *short, *shared]


def work(mine: list[Job], seed: int, use_every: int) -> Tally:
    """What one process does."""
    enumerator = Enumerator(seed, use_every)
    try:
        for job in mine:
            if job.long_seed >= 0:
                enumerator.long_workload(job.long_seed)
            else:
                enumerator.sequence(job.names, job.mode)
    finally:
        enumerator.close()
    return enumerator.tally


def enumerate_all(todo: list[Job], seed: int, workers: int, use_every: int) -> Tally:
    """Deal the jobs out, and add up."""
    shares = [(todo[worker::workers], seed, use_every) for worker in range(workers)]
    if workers == 1:
        return work(*shares[0])
    total = Tally()
    # Forked, so that all share one seed of hash(): states are told apart across processes, too.
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for tally in pool.starmap(work, shares):
            total.sequences += tally.sequences
            total.epochs += tally.epochs
            total.recoveries += tally.recoveries
            total.used += tally.used
            total.states |= tally.states
            total.failures += tally.failures
    return total


def part_of(todo: list[Job], part: int, seed: int) -> list[Job]:
    return todo[seed % part :: part]


def replay(state: str, seed: int) -> Tally:
    """Examine one state again, by the name that its failure was reported with."""
    label = state.split(" / ", maxsplit=1)[0]
    only = state.split(" / recovery", maxsplit=1)[0] if " / " in state else None
    enumerator = Enumerator(seed, 1)
    try:
        if label.startswith("long "):
            enumerator.long_workload(int(label.removeprefix("long ")), only)
        else:
            names, _, mode = label.partition(":")
            enumerator.sequence(tuple(names.split(",")), mode or "copy", only)
        return enumerator.tally
    finally:
        enumerator.close()


def report(tally: Tally, seconds: float, seed: int) -> None:
    print(
        f"{tally.sequences} workloads, {tally.epochs} epochs, {len(tally.states)} distinct states"
        f" ({tally.used} of them used and emptied, {tally.recoveries} crashed again in recovery),"
        f" {seconds:.0f} s, {len(tally.failures)} failures",
        flush=True,
    )
    for failure in tally.failures[:FAILURES_SHOWN]:
        name, _, why = failure.partition("\n")
        print(
            f"\nFAILED {name}\n{why}\nreplay: make crash ARGS=\"--seed {seed} --replay '{name}'\""
        )


def main(arguments: Many[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Enumerate what a power loss can leave, and examine it."
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--use-every", type=int, default=USE_EVERY)
    parser.add_argument("--part", type=int, default=1)
    parser.add_argument("--replay", default="")
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}", flush=True)
    started = time.monotonic()
    if options.replay:
        tally = replay(options.replay, options.seed)
    else:
        tally = enumerate_all(
            part_of(jobs(), options.part, options.seed),
            options.seed,
            options.workers,
            options.use_every,
        )
    report(tally, time.monotonic() - started, options.seed)
    return 1 if tally.failures or not tally.states else 0


if __name__ == "__main__":
    sys.exit(main())
