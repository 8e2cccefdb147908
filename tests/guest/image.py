"""The guest's kernel and initramfs: busybox, programs with the libraries that they name, and a
dozen kernel modules.

    python -m tests.guest.image

builds it, and reports what is wrong if that fails.
"""

import functools
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.guest.packages import CACHE, PackagesMissing, unpacked

# The package that provides each program, named when the program is missing.
PROGRAMS = {
    "iscsid": "open-iscsi",
    "iscsiadm": "open-iscsi",
    "mkfs.xfs": "xfsprogs",
    "xfs_repair": "xfsprogs",
    "xfs_growfs": "xfsprogs",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "fstrim": "util-linux",
    "blockdev": "util-linux",
    "fio": "fio",
}
PROGRAM_FOLDERS = ("sbin", "usr/sbin", "bin", "usr/bin")
LIBRARY_FOLDERS = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
# The programs ask for exactly this path. It also lists the libraries that a program would load.
LOADER = "/lib64/ld-linux-x86-64.so.2"
# Loaded with their dependencies. crc32c-intel makes digests, ext4 and xfs fast; every processor
# that QEMU presents supports it.
MODULES = ("virtio_pci", "virtio_net", "crc32c_intel", "sd_mod", "iscsi_tcp", "xfs")
ROOTFS = Path(__file__).resolve().parent / "rootfs"
HEADER_END = "TRAILER!!!"


class Image(NamedTuple):
    kernel: Path
    initramfs: Path


def find(name: str) -> Path:
    """Find a program in the unpacked packages or on the machine. Raises PackagesMissing."""
    for root in (unpacked(), Path("/")):
        for folder in PROGRAM_FOLDERS:
            if (root / folder / name).exists():
                return root / folder / name
    raise PackagesMissing(f"{name} is missing; apt-get install {PROGRAMS.get(name, name)}")


def libraries(program: Path) -> dict[str, Path]:
    """Return the libraries that a program loads, by requested name. Raises PackagesMissing."""
    search = ":".join(
        str(root / folder) for root in (unpacked(), Path("/")) for folder in LIBRARY_FOLDERS
    )
    listed = subprocess.run(
        [LOADER, "--library-path", search, "--list", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        raise PackagesMissing(f"{program} lacks a library: {listed.stderr.strip()}")
    return {name: Path(path) for name, path in re.findall(r"(\S+) => (/\S+)", listed.stdout)}


def module_name(path: Path) -> str:
    """Return a module's name, which has no dashes although its file may."""
    return path.stem.replace("-", "_")


def modules() -> list[Path]:
    """Return the files of MODULES and of their dependencies, in load order. Built-in modules have
    no file.
    """
    files = {module_name(path): path for path in (unpacked() / "lib" / "modules").rglob("*.ko")}
    ordered: dict[str, Path] = {}

    def add(name: str) -> None:
        if name in ordered or name not in files:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
        assert depends is not None, f"{files[name]} names no dependencies"
        for needed in filter(None, depends.group(1).decode().split(",")):
            add(needed.replace("-", "_"))
        ordered[name] = files[name]

    for name in MODULES:
        assert name in files, f"the kernel package has no module {name}"
        add(name)
    return list(ordered.values())


def contents() -> dict[str, bytes]:
    """Return the guest's files by path, without their folders."""
    files = {f"bin/{path.name}": path.read_bytes() for path in ROOTFS.iterdir()}
    files["init"] = files.pop("bin/init")
    files["bin/busybox"] = find("busybox").read_bytes()
    for name in PROGRAMS:
        program = find(name)
        files[f"sbin/{name}"] = program.read_bytes()
        files |= {
            f"lib/x86_64-linux-gnu/{library}": path.read_bytes()
            for library, path in libraries(program).items()
        }
    files[LOADER.removeprefix("/")] = Path(LOADER).read_bytes()
    files["etc/iscsi/iscsid.conf"] = (unpacked() / "etc/iscsi/iscsid.conf").read_bytes()
    order = modules()
    files |= {f"modules/{path.name}": path.read_bytes() for path in order}
    files["modules/order"] = "".join(f"/modules/{path.name}\n" for path in order).encode()
    return files


def folders_of(files: dict[str, bytes]) -> list[str]:
    """Return every folder that contains the files, outermost first, and those that the init script
    mounts on.
    """
    found = {str(folder) for path in files for folder in Path(path).parents} - {"."}
    return sorted(found | {"proc", "sys", "dev", "run", "tmp", "mnt", "var"})


def entry(number: int, path: str, mode: int, data: bytes) -> Iterator[bytes]:
    """Build one entry of a cpio archive in the format "newc" (kernel:
    driver-api/early-userspace/buffer-format): thirteen numbers of eight hexadecimal digits, the
    name, the data, each padded to four bytes.
    """
    name = path.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields) + name
    yield header + bytes(-len(header) % 4)
    yield data
    yield bytes(-len(data) % 4)


def archive() -> Iterator[bytes]:
    """Build the initramfs. It is not compressed: decompression would cost the emulated processor
    seconds, and the file is only used locally.
    """
    files = contents()
    entries = [(folder, stat.S_IFDIR | 0o755, b"") for folder in folders_of(files)]
    entries += [(path, stat.S_IFREG | 0o755, data) for path, data in files.items()]
    entries += [("bin/sh", stat.S_IFLNK | 0o777, b"busybox"), (HEADER_END, 0, b"")]
    for number, (path, mode, data) in enumerate(entries):
        yield from entry(number, path, mode, data)


@functools.cache
def image() -> Image:
    """Return the kernel, and an initramfs built now. Raises PackagesMissing."""
    kernels = sorted((unpacked() / "boot").glob("vmlinuz-*"))
    assert len(kernels) == 1, f"one kernel package was unpacked: {kernels}"
    initramfs = CACHE / f"initramfs.{os.getpid()}"
    with initramfs.open("wb") as out:
        out.writelines(archive())
    # Replaced atomically, so that two concurrent test runs each find a complete one.
    shutil.move(initramfs, CACHE / "initramfs")
    return Image(kernels[0], CACHE / "initramfs")


def main() -> int:
    """Build the image; return 1 if a package is missing."""
    try:
        kernel, initramfs = image()
    except PackagesMissing as missing:
        print(missing, file=sys.stderr)
        return 1
    print(f"{kernel}\n{initramfs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
