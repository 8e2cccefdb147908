"""Real file systems of their own, as a pool's host: made, mounted, filled to the last block, and
given room again.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.guest.file_systems import Mounted

# mkfs.xfs makes none below 300 MB.
SIZE_BYTES = 320 << 20
KINDS = ("ext4", "xfs", "tmpfs")
CHUNK_BYTES = 1 << 20
PAGE_BYTES = 4096


class Host:
    """A mounted file system, and a file in it that takes what is free."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool_path = str(folder / "pool")
        self._filler = folder / "filler"

    @property
    def available_bytes(self) -> int:
        """What everybody may take."""
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    @property
    def free_bytes(self) -> int:
        """What root may take is part of it."""
        found = os.statvfs(self.folder)
        return found.f_bfree * found.f_frsize

    def fill(self) -> None:
        """Leave not a block. Delayed allocation keeps some back for a moment, so it is tried until
        nothing more comes.
        """
        descriptor = os.open(self._filler, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.sync()
            for chunk in (64 * CHUNK_BYTES, CHUNK_BYTES, PAGE_BYTES, PAGE_BYTES):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, chunk)
                os.fsync(descriptor)
            with contextlib.suppress(OSError):
                while True:
                    os.pwrite(descriptor, bytes(PAGE_BYTES), os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)

    def make_room(self) -> None:
        """As an administrator does."""
        self._filler.unlink()


@contextlib.contextmanager
def host(kind: str, folder: Path) -> Iterator[Host]:
    """A file system of that kind, mounted below ``folder``."""
    mount = folder / f"host-{kind}"
    mount.mkdir()
    if kind == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", str(mount))
        with unmounted_at_the_end(mount):
            yield Host(mount)
        return
    image = folder / f"image-{kind}"
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES)
    device = run("losetup", "--find", "--show", str(image)).strip()
    try:
        words = Mounted(kind, device, str(mount))
        run("sh", "-c", words.make)
        run("sh", "-c", words.mount)
        with unmounted_at_the_end(mount):
            yield Host(mount)
        run("sh", "-c", words.check)
    finally:
        run("losetup", "--detach", device)
        image.unlink()


@contextlib.contextmanager
def unmounted_at_the_end(mount: Path) -> Iterator[None]:
    try:
        yield
    finally:
        run("umount", str(mount))


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
