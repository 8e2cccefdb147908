"""Runs libiscsi's iscsi-test-cu against a target, one test at a time with a timeout, and counts pass, fail, skip with reasons.

    python -m tests.conformance.libiscsi_suite [--only REGEX] [--url iscsi://HOST:PORT/TARGET/LUN]

Without ``--url`` it serves a volume in memory itself.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass

from tests.protocol.directory import TARGET

TEST_SECONDS_MAX = 60
_SKIP = re.compile(r"\[SKIPPED\]\s*(.*)")
_FAIL = re.compile(r"\d\. (test_\w+\.c:.*)|(?:FAILED\] (.*))")
_PASSED = re.compile(r"^\s*tests\s+1\s+1\s+1\s+0\s", re.MULTILINE)
# What the program says before and after the test is about its own set-up and cleaning up.
_TEST = re.compile(r"^  Test: \S+ \.\.\.(.*?)(?:passed|FAILED)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Outcome:
    """One test: ``pass``, ``fail``, ``skip`` or ``timeout``, and the client's words where it did not pass."""

    name: str
    verdict: str
    reason: str = ""


def list_tests() -> list[str]:
    """Names of all tests of the installed program, in its order."""
    listed = subprocess.run(["iscsi-test-cu", "--list"], capture_output=True, text=True, timeout=TEST_SECONDS_MAX, check=True).stdout
    return [name for name in listed.split() if name.startswith("ALL.") and name.count(".") == 2]


def run_test(name: str, url: str) -> Outcome:
    """Run one test against ``url``, which serves as the second path too."""
    command = ["iscsi-test-cu", "--dataloss", "--allow-sanitize", "--fail", "--test", name, url, url]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TEST_SECONDS_MAX, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(name, "timeout")
    output = done.stdout + done.stderr
    told = _TEST.search(output)
    if done.returncode or told is None or not _PASSED.search(output):
        failed = _FAIL.search(output)
        return Outcome(name, "fail", failed.group(0) if failed else output.strip()[-200:])
    skipped = _SKIP.search(told.group(1))
    return Outcome(name, "skip", skipped.group(1)) if skipped else Outcome(name, "pass")


def run_all(url: str, only: str) -> list[Outcome]:
    """All tests whose name matches ``only``, printing what did not pass as it goes."""
    outcomes = []
    for name in list_tests():
        if re.search(only, name):
            outcome = run_test(name, url)
            outcomes.append(outcome)
            if outcome.verdict != "pass":
                print(f"{outcome.verdict:8}{name[4:]:44}{outcome.reason}", flush=True)
    return outcomes


def main() -> int:
    """Run and count; 1 where a test failed or timed out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--url", default="")
    options = parser.parse_args()
    server = None
    url = options.url
    if not url:
        command = [sys.executable, "-m", "tests.conformance.serve_memory", "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert server.stdout is not None
        url = f"iscsi://127.0.0.1:{server.stdout.readline().split()[1]}/{TARGET}/0"
    try:
        outcomes = run_all(url, options.only)
    finally:
        if server is not None:
            server.terminate()
            server.wait()
    counts = {verdict: sum(outcome.verdict == verdict for outcome in outcomes) for verdict in ("pass", "fail", "timeout", "skip")}
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.items()))
    return 1 if counts["fail"] or counts["timeout"] else 0


if __name__ == "__main__":
    sys.exit(main())
