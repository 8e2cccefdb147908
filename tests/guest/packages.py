"""The guest's packages: downloaded with apt-get and unpacked in a folder of ours, never installed.

The kernel and the initiator must not be installed on the test machine: a kernel package changes how
it boots, and open-iscsi starts a service. Programs that are installed anyway (fio, e2fsprogs, libc)
are taken from the machine itself.
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
# In the build folder, which git ignores.
CACHE = ROOT / "build" / "guest"
KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
PROGRAM_PACKAGES = ("open-iscsi", "busybox-static", "xfsprogs")
# A limit for mirrors that do not answer; a slow mirror stays below it.
APT_SECONDS_MAX = 300


class PackagesMissing(Exception):
    """apt-get cannot provide a package; the message has its output and the next step."""


def run(*command: str, directory: Path | None = None) -> str:
    """Run a program that must succeed; return its standard output. Raises PackagesMissing."""
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
            f"{' '.join(command)}: not done within {APT_SECONDS_MAX} s; is the mirror reachable?"
        ) from None
    if done.returncode:
        raise PackagesMissing(
            f"{' '.join(command)}: {done.stderr.strip()}; try again after apt-get update"
        )
    return done.stdout


def kernel_package() -> str:
    """Return the package of the newest cloud kernel, on which its metapackage depends. Raises
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
    """Return the libraries that installing the programs would add. A line with an installed version
    in brackets would be an upgrade.
    """
    simulated = run(
        "apt-get", "--simulate", "--no-install-recommends", "install", *PROGRAM_PACKAGES
    )
    return re.findall(r"^Inst (lib\S+) \(", simulated, re.MULTILINE)


def state() -> str:
    """Return a value that changes when packages are installed on the machine, and when new package
    lists arrive. Raises PackagesMissing.
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
    """Return a folder with all packages unpacked as they would be in the guest. It is kept across
    runs. Raises PackagesMissing.
    """
    if platform.machine() != "x86_64":
        raise PackagesMissing(
            f"the guest's packages are chosen for x86-64, not for {platform.machine()}"
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        # Concurrent test runs need the same packages; the second run waits for those of the first.
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = CACHE / "packages.state"
        if not stamp.exists() or stamp.read_text() != state():
            stamp.unlink(missing_ok=True)
            unpack(CACHE / "packages")
            stamp.write_text(state())
    return CACHE / "packages"


def unpack(root: Path) -> None:
    """Download and unpack everything again. Raises PackagesMissing."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    packages = [kernel_package(), *PROGRAM_PACKAGES, *missing_libraries()]
    with tempfile.TemporaryDirectory(dir=CACHE) as downloads:
        run("apt-get", "download", *packages, directory=Path(downloads))
        for file in Path(downloads).iterdir():
            run("dpkg-deb", "--extract", str(file), str(root))
