"""The fuzzer.

    python -m tests.fuzz.run [--seed N] [--seconds S | --count N] [--surface NAME] [--first I]

The seed is printed first. Each execution has its own random source, made of seed, surface and
number. A failure is printed with the command that replays it.
"""

import argparse
import secrets
import sys
import time
import traceback
from dataclasses import dataclass
from random import Random

from tests.fuzz.surfaces import SURFACES, Surface

# Executions between two checks of the time.
BATCH = 200


@dataclass(frozen=True)
class Finding:
    """An execution that raised an exception."""

    number: int
    error: Exception


def chance_of(seed: int, name: str, number: int) -> Random:
    """Return the random source of one execution. `random` hashes a string itself, in the same way
    in every process.
    """
    return Random(f"{seed}/{name}/{number}")


def search(seed: int, name: str, surface: Surface, first: int, count: int) -> Finding | None:
    """Run up to ``count`` executions; stop at the first finding."""
    for number in range(first, first + count):
        try:
            surface(chance_of(seed, name, number))
        except Exception as error:
            return Finding(number, error)
    return None


def replay_command(seed: int, name: str, number: int) -> str:
    """Return the command that repeats one execution."""
    return f"python -m tests.fuzz.run --seed {seed} --surface {name} --first {number} --count 1"


def fuzz(seed: int, name: str, first: int, count: int | None, seconds: float) -> bool:
    """Fuzz one surface until its count or time is used up, and print the results. Return False if
    there is a finding.
    """
    began, done = time.monotonic(), 0
    while (done < count) if count is not None else (time.monotonic() - began < seconds):
        batch = BATCH if count is None else min(BATCH, count - done)
        finding = search(seed, name, SURFACES[name], first + done, batch)
        if finding is not None:
            traceback.print_exception(finding.error)
            print(
                f"{name}: execution {finding.number} failed; replay:"
                f" {replay_command(seed, name, finding.number)}",
                flush=True,
            )
            return False
        done += batch
    elapsed = time.monotonic() - began
    print(f"{name:12}{done:10} executions in {elapsed:.0f} s, nothing found", flush=True)
    return True


def main() -> int:
    """Parse the command line and fuzz; return 1 if something was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each surface")
    parser.add_argument("--count", type=int, help="executions per surface, instead of a time")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--surface", choices=sorted(SURFACES), action="append")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    names = options.surface or list(SURFACES)
    good = [
        fuzz(options.seed, name, options.first, options.count, options.seconds) for name in names
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
