"""The fuzzer of the whole store.

python -m tests.fuzz.store.run [--seed N] [--seconds S] [--jobs J] [--replay SEED[:OPTIONS]] [--trace] [--no-shrink]
"""

import argparse
import secrets
import sys
import time
import traceback

from tests.fuzz.store.plan import plan_of, replayed
from tests.fuzz.store.session import Tally, carry_out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--replay")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--keep-going", action="store_true")
    options = parser.parse_args()
    if options.replay:
        tally, wrong = carry_out(replayed(options.replay), print if options.trace else None)
        if wrong:
            traceback.print_exception(wrong)
        print(tally)
        return bool(wrong)
    print(f"seed {options.seed}", flush=True)
    total, began, seed, bad = Tally(), time.process_time(), options.seed, 0
    while time.process_time() - began < options.seconds:
        tally, wrong = carry_out(plan_of(seed))
        total.add(tally)
        if wrong:
            bad += 1
            print(f"{seed}: after {tally.operations} operations: {type(wrong).__name__}: {str(wrong)[:300]}", flush=True)
            if not options.keep_going:
                traceback.print_exception(wrong)
                break
        seed += 1
    used = time.process_time() - began
    print(f"{total} {used:.0f} s, {total.operations / used:.0f}/s, {seed - options.seed} seeds, {bad} bad")
    return 0


if __name__ == "__main__":
    sys.exit(main())
