"""The fuzzer of the whole store (docs/reliability.md).

    python -m tests.fuzz.store.run [--seconds S] [--seed N] [--jobs J]
        for so long, all with seeds of their own
    python -m tests.fuzz.store.run --replay SEED[:OPTIONS]
        one of them, every step told
    python -m tests.fuzz.store.run --canaries                               the planted bugs

The seed is printed first. What fails is made short, and printed with the command that repeats it.
"""

import argparse
import multiprocessing
import secrets
import sys
import time
import traceback
from collections.abc import Callable

from tests.fuzz.store.canaries import CANARIES, seeds_until_found
from tests.fuzz.store.plan import Plan, plan_of, replayed
from tests.fuzz.store.session import Tally, carry_out
from tests.fuzz.store.shrink import shrunk

SEED_BITS = 32
# How much processor time may pass before a process says how far it is.
TOLD_SECONDS = 300.0

Finding = tuple[str, str]


def command(plan: Plan) -> str:
    """What repeats a plan."""
    return f'make fuzz-store ARGS="--replay {plan.text}"'


def search(
    seed: int, step: int, seconds: float, shrink: bool, say: Callable[[str], None]
) -> tuple[Tally, int, list[Finding]]:
    """Seeds one after the other; how many, and what they found. ``seconds`` are of
    processor time.
    """
    total, seeds = Tally(), 0
    findings: list[Finding] = []
    began = time.process_time()
    told_at = TOLD_SECONDS
    while (used := time.process_time() - began) < seconds:
        if used > told_at:
            told_at += TOLD_SECONDS
            total.seconds = used
            say(f"so far: {summary(total, seeds, len(findings))}")
        plan = plan_of(seed % (1 << SEED_BITS))
        tally, wrong = carry_out(plan)
        total.add(tally)
        seeds += 1
        if wrong is not None:
            say(
                f"seed {plan.seed}, after {tally.operations} operations: {type(wrong).__name__}:"
                f" {wrong}\n  {command(plan)}"
            )
            findings.append((plan.text, str(wrong)))
            if shrink:
                say_shrunk(shrunk(plan, wrong, say), say)
        seed += step
    total.seconds = time.process_time() - began
    return total, seeds, findings


def say_shrunk(plan: Plan, say: Callable[[str], None]) -> None:
    lines = [
        f"  {number:4} {one.kind:12} {one.a:10} {one.b:10} {one.c:10}"
        for number, one in zip(plan.kept, plan.operations, strict=True)
    ]
    steps: list[str] = []
    _, wrong = carry_out(plan, steps.append)
    told = "\n".join(["  what happens:", *(f"    {step}" for step in steps[-60:])])
    say(
        "\n".join(
            [f"shrunk to {len(plan.kept)} operations: {wrong}", *lines, told, f"  {command(plan)}"]
        )
    )


def worker(arguments: tuple[int, int, float, bool]) -> tuple[Tally, int, list[Finding]]:
    return search(*arguments, lambda text: print(text, flush=True))


def fuzz(seed: int, jobs: int, seconds: float, shrink: bool) -> int:
    """Some processes side by side; prints the sum. Returns how many seeds failed."""
    work = [(seed + number, jobs, seconds, shrink) for number in range(jobs)]
    if jobs == 1:
        results = [worker(work[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            results = pool.map(worker, work, chunksize=1)
    total, seeds, failed = Tally(), 0, 0
    for tally, count, findings in results:
        total.add(tally)
        seeds += count
        failed += len(findings)
    print(summary(total, seeds, failed), flush=True)
    return failed


def summary(total: Tally, seeds: int, failed: int) -> str:
    rate = total.operations / total.seconds if total.seconds else 0.0
    return (
        f"{seeds} seeds, {total.operations} operations ({total.refused} of them refused),"
        f" {total.kills} kills, {total.power_losses} losses of power, {total.openings} openings,"
        f" {total.checks} checks with data, {total.seconds:.0f} s of processor time, {rate:.0f} a"
        f" second; {failed} failures"
    )


def replay(text: str, quiet: bool) -> int:
    plan = replayed(text)
    tally, wrong = carry_out(plan, None if quiet else lambda line: print(line, flush=True))
    if wrong is not None:
        traceback.print_exception(wrong)
    print(f"{tally.operations} operations: {'fails' if wrong is not None else 'fails no more'}")
    return 1 if wrong is not None else 0


def canaries() -> int:
    """Each planted bug until it is found."""
    missed = 0
    for canary in CANARIES:
        found = seeds_until_found(canary)
        missed += found is None
        how = (
            "NOT FOUND"
            if found is None
            else f"found by seed {found.seed}, after {found.operations} operations: {found.wrong}"
        )
        print(f"{canary.name:40} {how}", flush=True)
    return missed


def main() -> int:
    """Parse the command line and fuzz; 1 where something was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=secrets.randbits(SEED_BITS))
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of processor time, for each process"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--replay", metavar="SEED[:OPTIONS]")
    parser.add_argument("--quiet", action="store_true", help="with --replay: only what it found")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--canaries", action="store_true")
    options = parser.parse_args()
    if options.replay:
        return replay(options.replay, options.quiet)
    if options.canaries:
        return 1 if canaries() else 0
    print(f"seed {options.seed}", flush=True)
    return 1 if fuzz(options.seed, options.jobs, options.seconds, not options.no_shrink) else 0


if __name__ == "__main__":
    sys.exit(main())
