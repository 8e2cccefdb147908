"""Pools written by hand and the check on them: what all tests of the check share."""

import re
from collections.abc import Callable, Sequence

from storage import layout
from storage.check import CheckReport, check_device
from tests.storage.pool_writer import BLOCK, Entry, PoolWriter

VDISK, SNAPSHOT, DELETED = layout.KIND_VDISK, layout.KIND_SNAPSHOT, layout.KIND_DELETED
COUNTED = layout.SPLIT_FLAG_COUNTED


class BytesReader:
    """A pool in memory; reads of ``unreadable`` VBNs fail."""

    def __init__(self, pool: bytes | bytearray, unreadable: frozenset[int] = frozenset()) -> None:
        self._pool = memoryview(pool)
        self._unreadable = unreadable
        self.size_bytes = len(pool)

    def read(self, vbns: Sequence[int]) -> list[memoryview | None]:
        return [
            None if vbn in self._unreadable else self._pool[vbn * BLOCK : (vbn + 1) * BLOCK]
            for vbn in vbns
        ]


def check(
    pool: bytes | bytearray, verify_data: bool = False, unreadable: frozenset[int] = frozenset()
) -> CheckReport:
    return check_device(BytesReader(pool, unreadable), verify_data)


def rich_pool() -> tuple[PoolWriter, dict[str, int]]:
    """One vdisk with a snapshot that shares most, a clone of it in mid-split, a deleted image, zero
    pointers at two levels.
    """
    pool = PoolWriter()
    data = {name: pool.data(name) for name in ("a0", "a1", "a2", "a3", "b0", "c0", "d0")}
    shared = pool.pointer({0: data["a0"], 1: data["a1"], 5: layout.ZERO_POINTER})
    snapshot_only = pool.pointer({0: data["a2"], 7: data["a3"]})
    vdisk_only = pool.pointer({0: data["b0"], 7: data["a3"]})
    snapshot_root = pool.pointer({0: shared, 1: snapshot_only})
    vdisk_root = pool.pointer({0: shared, 1: vdisk_only, 2: layout.ZERO_POINTER})
    clone_leaf = pool.pointer({0: data["c0"], 1: layout.ZERO_POINTER})
    clone_root = pool.pointer({0: clone_leaf})
    size = 1024 * BLOCK
    pool.entries = {
        1: Entry(VDISK, "alpha", vdisk_root, 2, size),
        2: Entry(SNAPSHOT, "monday", snapshot_root, 2, size, origin=1),
        # Behind the clone's holes: FBN 256 and 263.
        3: Entry(
            VDISK,
            "beta",
            clone_root,
            2,
            size,
            backing=2,
            backing_blocks=1024,
            split=(layout.SPLIT_RUNNING, 0, COUNTED, 2),
        ),
        4: Entry(DELETED, "", pool.tree({3: data["d0"]}, 1), 1, 0),
        5: Entry(VDISK, "empty", layout.HOLE, 1, size),
        6: Entry(VDISK, "trimmed", layout.ZERO_POINTER, 1, 256 * BLOCK),
    }
    return pool, {
        **data,
        "shared": shared,
        "vdisk_only": vdisk_only,
        "vdisk_root": vdisk_root,
        "snapshot_root": snapshot_root,
    }


def errors_of(
    change: Callable[[PoolWriter, dict[str, int]], None], verify_data: bool = False
) -> list[str]:
    pool, vbns = rich_pool()
    change(pool, vbns)
    report = check(pool.build(), verify_data)
    assert report.errors_total >= len(report.errors)
    return report.errors


def assert_finds(errors: list[str], *patterns: str) -> None:
    """Each pattern is found in an error, and there are no others."""
    for pattern in patterns:
        assert any(re.search(pattern, error) for error in errors), f"{pattern!r} not in {errors}"
    others = [
        error for error in errors if not any(re.search(pattern, error) for pattern in patterns)
    ]
    assert not others


def flip(pool: bytearray, vbn: int) -> bytearray:
    pool[vbn * BLOCK + 100] ^= 0x10
    return pool
