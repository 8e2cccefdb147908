"""Runs libiscsi's iscsi-test-cu against the daemon, one test at a time with a timeout, and reports
the counts and the reasons for each test that did not pass.

    python -m tests.conformance.libiscsi_suite [--only REGEX] [--runs N]
        [--url iscsi://HOST:PORT/TARGET/LUN [--url SECOND]]

Without ``--url`` it starts its own daemons with two portals, each on a pool in a temporary
directory. "Part" is a test that passed but reports that it left something out. The exit status is 1
if a test failed or timed out and is not listed, with its reason, in CONTRADICTORY, or if two runs
differ.
"""

import argparse
import asyncio
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from daemon.iscsi.initiator import LUN, Initiator
from tests.daemon.programs import Daemon

PROGRAM = "iscsi-test-cu"
# Only Sanitize.Reset takes half a minute: it checks once a minute until the disk is overwritten,
# however slow the machine is.
TEST_SECONDS_MAX, WIDE_TEST_SECONDS_MAX = 180, 900
VDISK, WIDE_VDISK = "conformance", "wide"
VDISK_BYTES, POOL_SIZE = 256 << 20, "2GiB"
# This test needs a disk that takes seconds to overwrite: it checks after three, resets, and checks
# again. Zeros take no space in the pool.
ON_WIDE_VDISK = "ALL.Sanitize.Reset"
OVERWRITE_SECONDS = 20.0
OVERWRITE_WITH_ZEROS = bytes((0x48, 0x01, 0, 0, 0, 0, 0, 0, 5, 0))
ZERO_PATTERN = bytes((1, 0, 0, 1, 0))
# This test asks for LBA n+1 and expects a descriptor that begins one physical block after n, which
# is right only for physical blocks of 512 bytes.
ON_SMALL_BLOCKS = "ALL.GetLBAStatus.UnmapSingle"
SMALL_BLOCKS = "iscsi.physical_block_bytes = 512\n"
# These tests need a write-protected disk: another session sets software write protect (SWP)
# meanwhile.
WRITE_PROTECTED = re.compile(r"^ALL\.ReadOnly\.")
SWP_ON = bytes((0, 0, 0, 0, 0x0A, 0x0A, 0, 0x10, 0x08, 0, 0, 0, 0, 0, 0, 0))
SWP_OFF = bytes((0, 0, 0, 0, 0x0A, 0x0A, 0, 0x10, 0x00, 0, 0, 0, 0, 0, 0, 0))
MODE_SELECT_6 = bytes((0x15, 0x10, 0, 0, len(SWP_ON), 0))
# Tests that no target can pass; docs/conformance.md has the evidence.
CONTRADICTORY = {
    "ALL.iSCSITMF.LUNResetSimpleAsync": (
        "asserts what its callback will set before anything could be received (fixed in libiscsi"
        " 5553d6b)"
    ),
}
_SKIP = re.compile(r"\[SKIPPED\]\s*(.*)")
_FAIL = re.compile(r"\d\. (test_\w+\.c:.*)|(?:FAILED\] (.*))")
_PASSED = re.compile(r"^\s*tests\s+1\s+1\s+1\s+0\s", re.MULTILINE)
_ASSERTS = re.compile(r"^\s*asserts\s+(\d+)", re.MULTILINE)
# The program's output before and after the test is about its own setup and cleanup.
_TEST = re.compile(r"^  Test: \S+ \.\.\.(.*?)(?:passed|FAILED)", re.MULTILINE | re.DOTALL)


class _Client(Initiator):
    """An initiator that can send any command."""

    async def command(self, cdb: bytes, data: bytes) -> None:
        await self._command(lambda done: self._connection.submit(LUN, cdb, done, data=data))


@dataclass(frozen=True)
class Outcome:
    """The outcome of one test: ``pass``, ``part``, ``skip``, ``fail``, ``timeout`` or
    ``contradictory``, and the program's output if it did not pass.
    """

    name: str
    verdict: str
    reason: str = ""


async def _output_of(*command: str, seconds_max: int = TEST_SECONDS_MAX) -> tuple[int, str] | None:
    """Run a command; return its exit status and all output, or None if it took too long."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), seconds_max)
    except TimeoutError:
        process.kill()
        await process.wait()
        return None
    assert process.returncode is not None
    return process.returncode, output.decode(errors="replace")


async def list_tests() -> list[str]:
    """Return the names of all tests of the installed program, in its order."""
    listed = await _output_of(PROGRAM, "--list")
    assert listed is not None, f"{PROGRAM} --list does not end"
    return [name for name in listed[1].split() if name.startswith("ALL.") and name.count(".") == 2]


def judge(name: str, status: int, output: str) -> Outcome:
    """Judge the one test that was run by its output."""
    told = _TEST.search(output)
    if status or told is None or not _PASSED.search(output):
        failed = _FAIL.search(output)
        return Outcome(name, "fail", failed.group(0) if failed else output.strip()[-200:])
    skipped = _SKIP.search(told.group(1))
    if skipped is None:
        return Outcome(name, "pass")
    asserts = _ASSERTS.search(output)
    # A test that is skipped as a whole shows it by one assertion that always holds.
    whole = asserts is not None and int(asserts.group(1)) <= 1
    return Outcome(name, "skip" if whole else "part", skipped.group(1))


async def run_test(name: str, urls: list[str]) -> Outcome:
    """Run one test; the second URL is the second path."""
    seconds_max = WIDE_TEST_SECONDS_MAX if name == ON_WIDE_VDISK else TEST_SECONDS_MAX
    done = await _output_of(
        PROGRAM,
        "--dataloss",
        "--allow-sanitize",
        "--fail",
        "--test",
        name,
        *urls,
        seconds_max=seconds_max,
    )
    outcome = Outcome(name, "timeout") if done is None else judge(name, *done)
    if outcome.verdict in {"fail", "timeout"} and name in CONTRADICTORY:
        return Outcome(name, "contradictory", CONTRADICTORY[name])
    return outcome


async def _client(url: str) -> _Client:
    parts = re.fullmatch(r"iscsi://(.+):(\d+)/(.+)/\d+", url)
    assert parts is not None, f"{url} is no iscsi://HOST:PORT/TARGET/LUN"
    return await _Client.connect(parts[1], int(parts[2]), parts[3])


async def run_write_protected(name: str, urls: list[str]) -> Outcome:
    """Run one test on a disk that another session has write-protected."""
    async with await _client(urls[0]) as client:
        await client.command(MODE_SELECT_6, SWP_ON)
        try:
            return await run_test(name, urls)
        finally:
            await client.command(MODE_SELECT_6, SWP_OFF)


class Disks:
    """The disks under test: those named on the command line, or vdisks of our own daemon and of one
    that reports small physical blocks.
    """

    def __init__(
        self, urls: list[str], daemon: Daemon | None = None, small_blocks: list[str] | None = None
    ) -> None:
        self.urls = urls
        self._daemon = daemon
        self._small_blocks = small_blocks or urls
        self._wide_made = 0

    async def urls_for(self, name: str) -> list[str]:
        """Return both paths to the disk that the test needs."""
        if name == ON_SMALL_BLOCKS:
            return self._small_blocks
        if name != ON_WIDE_VDISK or self._daemon is None:
            return self.urls
        # A new disk for each run: the size that was enough in an earlier run may not be enough now.
        if self._wide_made:
            await self._daemon.ctl("vdisk", "rm", f"{WIDE_VDISK}-{self._wide_made}")
        self._wide_made += 1
        wide = f"{WIDE_VDISK}-{self._wide_made}"
        await self._daemon.ctl("vdisk", "create", wide, "--size", f"{await self._wide_mib()}MiB")
        return [url.replace(f":{VDISK}/", f":{wide}/") for url in self.urls]

    async def _wide_mib(self) -> int:
        """Return the size that this machine overwrites in OVERWRITE_SECONDS."""
        async with await _client(self.urls[0]) as client:
            began = time.monotonic()
            await client.command(OVERWRITE_WITH_ZEROS, ZERO_PATTERN)
            return 1 + int((VDISK_BYTES >> 20) * OVERWRITE_SECONDS / (time.monotonic() - began))


async def run_all(disks: Disks, only: str) -> list[Outcome]:
    """Run all tests whose name matches ``only``, printing those that do not pass as it goes."""
    outcomes = []
    for name in await list_tests():
        if not re.search(only, name):
            continue
        run = run_write_protected if WRITE_PROTECTED.search(name) else run_test
        outcome = await run(name, await disks.urls_for(name))
        outcomes.append(outcome)
        if outcome.verdict != "pass":
            print(f"{outcome.verdict:14}{name[4:]:40}{outcome.reason}", flush=True)
    return outcomes


async def _own_daemon(stack: AsyncExitStack, configuration: str = "") -> tuple[Daemon, list[str]]:
    """Start a daemon with one vdisk; return the URLs of both paths to it."""
    directory = Path(
        stack.enter_context(tempfile.TemporaryDirectory(prefix="cleaved-conformance-"))
    )
    (directory / "config").write_text(configuration)
    daemon = Daemon(
        directory, POOL_SIZE, ("--config", str(directory / "config"), "--iscsi", "127.0.0.1:0")
    )
    await stack.enter_async_context(daemon)
    await daemon.ctl("vdisk", "create", VDISK, "--size", f"{VDISK_BYTES >> 20}MiB")
    portals = re.findall(
        r"iscsi ([^,]+)",
        str(
            next(
                event["listeners"] for event in daemon.events() if event["event"] == "daemon.ready"
            )
        ),
    )
    assert len(portals) == 2
    return daemon, [daemon.url(VDISK).replace(daemon.portal, portal) for portal in portals]


async def _own_disks(stack: AsyncExitStack) -> Disks:
    daemon, urls = await _own_daemon(stack)
    _, small_blocks = await _own_daemon(stack, SMALL_BLOCKS)
    return Disks(urls, daemon, small_blocks)


def report(outcomes: list[Outcome]) -> bool:
    """Print the counts; return whether nothing went wrong."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    print(
        ", ".join(
            f"{counts[verdict]} {verdict}"
            for verdict in ("pass", "part", "skip", "contradictory", "fail", "timeout")
        ),
        flush=True,
    )
    return not (counts["fail"] or counts["timeout"])


async def run(options: argparse.Namespace) -> int:
    """Run as often as requested; return 1 if a test failed or timed out, or if two runs differ."""
    runs = []
    async with AsyncExitStack() as stack:
        disks = Disks((options.url * 2)[:2]) if options.url else await _own_disks(stack)
        for _ in range(options.runs):
            runs.append(await run_all(disks, options.only))
            good = report(runs[-1])
            if not good:
                return 1
    verdicts = [[(outcome.name, outcome.verdict) for outcome in outcomes] for outcomes in runs]
    if any(verdict != verdicts[0] for verdict in verdicts):
        print("the runs differ")
        return 1
    return 0


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--url", action="append", default=[])
    options = parser.parse_args()
    if shutil.which(PROGRAM) is None:
        print(f"{PROGRAM} is missing; install it: apt-get install libiscsi-bin", file=sys.stderr)
        return 1
    return asyncio.run(run(options))


if __name__ == "__main__":
    sys.exit(main())
