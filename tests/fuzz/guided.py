"""The fuzzer's surfaces under a coverage-guided driver (libFuzzer, through atheris): inputs that
reach new code are kept and mutated.

    python -m tests.fuzz.guided [--seed N] [--seconds S | --count N] [--surface NAME]
    python -m tests.fuzz.guided --surface NAME --replay FILE

Each surface runs in its own process. The corpus is kept in build/fuzz/SURFACE, and the next run
starts from it. A failing input is written to build/fuzz, and the command that replays it is
printed. Without atheris (an optional dependency) only --replay works.
"""

import argparse
import importlib.util
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "build" / "fuzz"
NAMES = ("cdbs", "parameters", "login_text", "login_chap", "framing")
# About the size of the decisions of the longest execution.
INPUT_BYTES_MAX = 4096
MISSING = (
    "atheris is missing, no coverage-guided fuzzing; install it: pip install -c constraints.txt"
    " '.[fuzz]'"
)
_EXECUTIONS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_REACHED = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
_FINDING = re.compile(r"Test unit written to (\S+)")


def drive(name: str, arguments: list[str]) -> None:
    """Fuzz one surface in this process, which libFuzzer ends."""
    import atheris  # noqa: PLC0415 -- optional

    with atheris.instrument_imports(include=["protocol"]):
        from tests.fuzz.surfaces import SURFACES  # noqa: PLC0415 -- instrumented at import
    from tests.fuzz.chance import GivenChance  # noqa: PLC0415

    surface = SURFACES[name]
    atheris.Setup([sys.argv[0], *arguments], lambda data: surface(GivenChance(data)))
    atheris.Fuzz()


def replay(name: str, path: Path) -> int:
    """Run one input again; its exception is not caught."""
    from tests.fuzz.chance import GivenChance  # noqa: PLC0415
    from tests.fuzz.surfaces import SURFACES  # noqa: PLC0415

    SURFACES[name](GivenChance(path.read_bytes()))
    print(f"{name}: {path} no longer fails")
    return 0


def fuzz(name: str, seed: int, limit: str) -> bool:
    """Fuzz one surface up to its limit, and print the results. Return False on a finding."""
    corpus = DIRECTORY / name
    corpus.mkdir(parents=True, exist_ok=True)
    options = [
        f"-seed={seed}",
        limit,
        f"-max_len={INPUT_BYTES_MAX}",
        f"-artifact_prefix={DIRECTORY}/{name}-",
        "-print_final_stats=1",
    ]
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.guided",
        "--drive",
        name,
        "--",
        *options,
        str(corpus),
    ]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    elapsed, output = time.monotonic() - began, done.stdout + done.stderr
    executions, reached, finding = (
        _EXECUTIONS.search(output),
        _REACHED.findall(output),
        _FINDING.search(output),
    )
    if done.returncode or executions is None:
        print(output)
        if finding is not None:
            print(
                f"{name}: a finding; replay: python -m tests.fuzz.guided --surface {name} --replay"
                f" {finding[1]}",
                flush=True,
            )
        return False
    edges, features, inputs = reached[-1] if reached else ("?", "?", "?")
    print(
        f"{name:12}{executions[1]:>10} executions in {elapsed:.0f} s, {edges} edges and {features}"
        f" features reached by {inputs} inputs, nothing found",
        flush=True,
    )
    return True


def main() -> int:
    """Parse the command line and fuzz; return 1 if something was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    parser.add_argument("--seconds", type=int, default=60, help="for each surface")
    parser.add_argument("--count", type=int, help="executions per surface, instead of a time")
    parser.add_argument("--surface", choices=NAMES, action="append")
    parser.add_argument("--replay", type=Path, metavar="FILE")
    parser.add_argument("--drive", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.surface or list(NAMES)
    if options.drive is not None:
        drive(options.drive, options.arguments)
    if options.replay is not None:
        return replay(names[0], options.replay)
    if importlib.util.find_spec("atheris") is None:
        print(MISSING)
        return 0
    print(f"seed {options.seed}", flush=True)
    limit = (
        f"-max_total_time={options.seconds}" if options.count is None else f"-runs={options.count}"
    )
    good = [fuzz(name, options.seed, limit) for name in names]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
