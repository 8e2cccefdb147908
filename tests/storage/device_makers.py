"""Every kind of device that the conformance suite runs on, by name."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from storage.device import Device, open_device
from tests.storage.devices import (
    DelayDevice,
    FaultyDevice,
    FullHostDevice,
    MemoryDevice,
    WrappedDevice,
)

SIZE_BYTES = 16 * 1024 * 1024
LARGER_BYTES = 2 * SIZE_BYTES

Maker = Callable[[Path], AbstractContextManager[Device]]


@contextlib.contextmanager
def opened(path: str) -> Iterator[Device]:
    device = open_device(path)
    try:
        yield device
    finally:
        device.close()


@contextlib.contextmanager
def file_on_disk(folder: Path) -> Iterator[Device]:
    with tempfile.TemporaryDirectory(dir=folder) as own, opened(new_file(Path(own))) as device:
        yield device


@contextlib.contextmanager
def file_in_memory(_: Path) -> Iterator[Device]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as own, opened(new_file(Path(own))) as device:
        yield device


def new_file(folder: Path) -> str:
    return sparse_file(str(folder / "pool"), SIZE_BYTES)


def sparse_file(path: str, size_bytes: int) -> str:
    """A new file of zeros."""
    with open(path, "xb") as made:
        made.truncate(size_bytes)
    return path


@contextlib.contextmanager
def loop_device(folder: Path) -> Iterator[str]:
    """Path of a block device over a new file."""
    with tempfile.TemporaryDirectory(dir=folder) as own, looped(new_file(Path(own))) as path:
        yield path


@contextlib.contextmanager
def looped(backing: str) -> Iterator[str]:
    """Path of a block device over this file."""
    path = subprocess.run(
        ["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        yield path
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)


def enlarge_loop_device(path: str) -> None:
    """Make it LARGER_BYTES large, as an administrator does with a volume that is in use."""
    backing = Path(f"/sys/block/{Path(path).name}/loop/backing_file").read_text().strip()
    os.truncate(backing, LARGER_BYTES)
    subprocess.run(["losetup", "--set-capacity", path], check=True)


@contextlib.contextmanager
def block_device(folder: Path) -> Iterator[Device]:
    with loop_device(folder) as path, opened(path) as device:
        yield device


@contextlib.contextmanager
def in_memory(**options: object) -> Iterator[Device]:
    device = MemoryDevice(SIZE_BYTES, **options)  # type: ignore[arg-type]
    yield device
    device.close()


@contextlib.contextmanager
def wrapped(wrapper: Callable[[Device], Device], maker: Maker, folder: Path) -> Iterator[Device]:
    with maker(folder) as device:
        yield wrapper(device)


MAKERS: dict[str, Maker] = {
    "file": file_on_disk,
    "tmpfs": file_in_memory,
    "block": block_device,
    "memory": lambda _: in_memory(),
    "deferred": lambda _: in_memory(deferred=True, seed=1),
    "missing": lambda _: in_memory(deferred=True, miss_rate=0.5, seed=2),
    "wrapped": lambda folder: wrapped(WrappedDevice, file_on_disk, folder),
    "faulty": lambda folder: wrapped(FaultyDevice, file_on_disk, folder),
    "thin": lambda folder: wrapped(FullHostDevice, file_on_disk, folder),
    "delayed": lambda _: wrapped(
        lambda inner: DelayDevice(inner, {"read": 1e-6, "sync": 1e-6}),
        lambda _: in_memory(),
        Path(),
    ),
}
KINDS = [
    pytest.param(kind, marks=pytest.mark.needs("loop device") if kind == "block" else ())
    for kind in MAKERS
]
