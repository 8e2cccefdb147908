"""The guest's packages: downloaded with apt-get and unpacked in a folder of ours, never installed.

The kernel and the initiator are not wanted on the machine that tests: a kernel package changes how
it boots, open-iscsi starts a service. What is installed anyway (fio, e2fsprogs, libc) is taken from
the machine itself.
"""

import fcntl
import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Beside what else a build leaves, and ignored by git.
CACHE = ROOT / "build" / "guest"
KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
PROGRAM_PACKAGES = ("open-iscsi", "busybox-static", "xfsprogs")
# A mirror that does not answer fails the test by this, and no slow one does.
APT_SECONDS_MAX = 300


class PackagesMissing(Exception):
    """apt-get cannot give a package; the message holds its words and the next step."""


def run(*command: str, directory: Path | None = None) -> str:
    """Run a program that must succeed; its standard output. Raises PackagesMissing."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=APT_SECONDS_MAX,
            check=False,
            cwd=directory,
        )
    except FileNotFoundError:
        raise PackagesMissing(
            f"{command[0]} is missing: the guest is made from Debian packages"
        ) from None
    except subprocess.TimeoutExpired:
        raise PackagesMissing(
            f"{' '.join(command)}: no end within {APT_SECONDS_MAX} s; is the mirror in reach?"
        ) from None
    if done.returncode:
        raise PackagesMissing(
            f"{' '.join(command)}: {done.stderr.strip()}; try again after apt-get update"
        )
    return done.stdout


def kernel_package() -> str:
    """The package that holds the newest cloud kernel: its metapackage depends on it. Raises
    PackagesMissing.
    """
    found = re.search(
        r"Depends: (linux-image-\d\S*)", run("apt-cache", "depends", KERNEL_METAPACKAGE)
    )
    if found is None:
        raise PackagesMissing(
            f"{KERNEL_METAPACKAGE} depends on no kernel; try again after apt-get update"
        )
    return found.group(1)


def missing_libraries() -> list[str]:
    """The libraries that installing the programs would bring. A line with an installed version in
    brackets would be an upgrade.
    """
    simulated = run(
        "apt-get", "--simulate", "--no-install-recommends", "install", *PROGRAM_PACKAGES
    )
    return re.findall(r"^Inst (lib\S+) \(", simulated, re.MULTILINE)


def state() -> str:
    """Changes when packages are installed on the machine, and when new lists of packages arrive.
    Raises PackagesMissing.
    """
    try:
        return " ".join(
            str(os.stat(path).st_mtime_ns)
            for path in ("/var/lib/dpkg/status", "/var/lib/apt/lists")
        )
    except FileNotFoundError as error:
        raise PackagesMissing(
            f"{error.filename} is missing: the guest is made from Debian packages"
        ) from None


@functools.cache
def unpacked() -> Path:
    """A folder with all packages unpacked, as they would stand in the guest. Kept from run to run.
    Raises PackagesMissing.
    """
    if platform.machine() != "x86_64":
        raise PackagesMissing(
            f"the guest's packages are chosen for x86-64, not for {platform.machine()}"
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        # Two test runs side by side need the same packages; the second waits for the first one's.
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = CACHE / "packages.state"
        if not stamp.exists() or stamp.read_text() != state():
            stamp.unlink(missing_ok=True)
            unpack(CACHE / "packages")
            stamp.write_text(state())
    return CACHE / "packages"


def unpack(root: Path) -> None:
    """Download and unpack everything anew. Raises PackagesMissing."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    packages = [kernel_package(), *PROGRAM_PACKAGES, *missing_libraries()]
    with tempfile.TemporaryDirectory(dir=CACHE) as downloads:
        run("apt-get", "download", *packages, directory=Path(downloads))
        for file in Path(downloads).iterdir():
            run("dpkg-deb", "--extract", str(file), str(root))
