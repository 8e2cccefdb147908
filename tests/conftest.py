"""What holds for every test.

- A log record of level WARNING or above that the test did not announce (``@pytest.mark.logs``)
  fails it.
- Any Python warning is an error (pyproject), so an unclosed file or socket, or a coroutine that
  nobody awaited, fails the test in which it is collected; to collect it there and not later,
  asynchronous tests end with a garbage collection.
- A task that still runs when an asynchronous test and its fixtures are done fails the test.
- A client program that a test wants (``@pytest.mark.client``) and the machine lacks is named in the
  summary, together with the command that installs it. With CI=true that is a failure, not a skip.
  The same for abilities of the machine (``@pytest.mark.needs``).
"""

import asyncio
import functools
import gc
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import pytest_asyncio
import uvloop

from tests.guest.image import image
from tests.guest.packages import PackagesMissing

# The Debian package that brings each client program.
CLIENT_PACKAGES = {
    "iscsi-ls": "libiscsi-bin",
    "iscsi-inq": "libiscsi-bin",
    "iscsi-perf": "libiscsi-bin",
    "iscsi-test-cu": "libiscsi-bin",
    "qemu-img": "qemu-utils qemu-block-extra",
    "qemu-io": "qemu-utils qemu-block-extra",
    "fio": "fio",
    "tgtd": "tgt",
    "qemu-system-x86_64": "qemu-system-x86",
}


@functools.cache
def _works(program: str) -> bool:
    """It is installed, and for QEMU's disk programs, so is their iSCSI driver (a package of its own
    on Debian).
    """
    if shutil.which(program) is None:
        return False
    if program not in {"qemu-img", "qemu-io"}:
        return True
    # Nothing listens on port 1: what matters is which complaint comes.
    tried = subprocess.run(
        ["qemu-img", "info", "iscsi://127.0.0.1:1/none/0"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "Unknown protocol" not in tried.stderr


def _loop_device_works() -> bool:
    return (
        os.geteuid() == 0
        and os.path.exists("/dev/loop-control")
        and shutil.which("losetup") is not None
    )


def _file_systems_can_be_made() -> bool:
    known = (
        "xfs" in Path("/proc/filesystems").read_text().split()
        or shutil.which("modprobe") is not None
    )
    return (
        _loop_device_works()
        and known
        and all(map(os.path.exists, ("/sbin/mke2fs", "/sbin/mkfs.xfs")))
    )


@functools.cache
def _mount_works() -> bool:
    """A tmpfs can be mounted: for a file system that is small enough to be filled."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        mounted = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder],
                capture_output=True,
                check=False,
            ).returncode
            == 0
        )
        if mounted:
            subprocess.run(["umount", folder], check=True)
        return mounted


@functools.cache
def _guest_builds() -> bool:
    """The Linux guest is made of Debian's packages, which a mirror must give once."""
    try:
        image()
    except PackagesMissing:
        return False
    return True


# Abilities of a machine that no package brings, by the name that ``needs`` takes: how to tell, and
# what to do about it.
ABILITIES: dict[str, tuple[Callable[[], bool], str]] = {
    "loop device": (_loop_device_works, "run as root on a machine with /dev/loop-control"),
    "mount": (_mount_works, "run as root where file systems can be mounted"),
    "file systems": (
        _file_systems_can_be_made,
        "run as root on a machine with /dev/loop-control, e2fsprogs and xfsprogs",
    ),
    "Linux guest": (
        _guest_builds,
        (
            "use Debian on x86-64, after apt-get update; python -m tests.guest.image says what is"
            " wrong"
        ),
    ),
}

hypothesis.settings.register_profile("quick", deadline=None, print_blob=True)
hypothesis.settings.register_profile("long", deadline=None, print_blob=True, max_examples=2000)
hypothesis.settings.load_profile("long" if os.environ.get("CLEAVED_LONG") else "quick")

_missing: dict[str, str] = {}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The daemon runs on uvloop, and so do its tests; `storage` must work on any loop, and is
    tested on asyncio's own.
    """
    if item.path.is_relative_to(item.config.rootpath / "tests" / "daemon"):
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("client"):
        for program in marker.args:
            if not _works(program):
                _lacking(program, f"apt-get install {CLIENT_PACKAGES[program]}")
    for marker in item.iter_markers("needs"):
        for ability in marker.args:
            works, remedy = ABILITIES[ability]
            if not works():
                _lacking(ability, remedy)


def _lacking(what: str, remedy: str) -> None:
    _missing[what] = remedy
    message = f"{what} is missing; {remedy}"
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _missing:
        terminalreporter.section("not run here, for want of")
        for what, remedy in sorted(_missing.items()):
            terminalreporter.line(f"{what}: {remedy}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and asyncio.iscoroutinefunction(item.function):
            # First set up, so last torn down: what other fixtures stop in their own teardown is no
            # leftover.
            item.fixturenames.insert(0, "no_task_left")


@pytest_asyncio.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Fail when tasks outlive the test and its fixtures."""
    yield
    await asyncio.sleep(
        0
    )  # a task cancelled by the last teardown ends in the next turn of the loop
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    gc.collect()
    if left:
        pytest.fail(f"tasks left running: {left}", pytrace=False)


@pytest.fixture(autouse=True)
def no_unexpected_log(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Fail on log records of level WARNING and above that no ``logs`` marker announces."""
    yield
    expected = [
        re.compile(pattern)
        for marker in request.node.iter_markers("logs")
        for pattern in marker.args
    ]
    records = [
        record for when in ("setup", "call", "teardown") for record in caplog.get_records(when)
    ]
    for record in records:
        message = record.getMessage()
        if record.levelno >= logging.WARNING and not any(
            pattern.search(message) for pattern in expected
        ):
            pytest.fail(f"unexpected log record from {record.name}: {message}", pytrace=False)
