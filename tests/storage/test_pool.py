"""The pool as the daemon calls it: what bad input gets, and that every message says cause and next
step.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from storage.errors import (
    BlockDamaged,
    Conflict,
    NotFound,
    PoolLocked,
    PoolRefused,
    RequestError,
    StorageError,
)
from storage.layout import BLOCK_BYTES, VDISK_BYTES_MAX
from storage.pool import Pool
from tests.storage.devices import Fault, FaultyDevice, MemoryDevice
from tests.storage.pools import (
    LEAF_BYTES,
    OpenPool,
    backed_clone,
    checked_offline,
    data,
    new_pool,
    open_on,
)

Call = Callable[[OpenPool], Awaitable[Any]]

# What is asked of a pool with "base", "base@snap", its clone "clone" and "used", on which a session
# is; the error; what it says.
BAD: list[tuple[str, Call, type[StorageError], str]] = [
    (
        "no name",
        lambda r: r.pool.vdisk_create("", 1 << 20),
        RequestError,
        r"'' cannot be the name of a vdisk: use 1-200 letters",
    ),
    (
        "a bad name",
        lambda r: r.pool.vdisk_create("a@b", 1 << 20),
        RequestError,
        r"'a@b' cannot be the name .* begin with a letter or",
    ),
    (
        "a long name",
        lambda r: r.pool.vdisk_create("a" * 201, 1 << 20),
        RequestError,
        r"cannot be the name of a vdisk",
    ),
    (
        "a name in other letters",
        lambda r: r.pool.vdisk_create("ä", 1 << 20),
        RequestError,
        r"cannot be the name of a vdisk",
    ),
    (
        "a name with a line end",
        lambda r: r.pool.vdisk_create("a\n", 1 << 20),
        RequestError,
        r"cannot be the name of a vdisk",
    ),
    (
        "no whole blocks",
        lambda r: r.pool.vdisk_create("a", 5000),
        RequestError,
        r"5000 bytes are not whole blocks of 4096: use 8192",
    ),
    (
        "no size",
        lambda r: r.pool.vdisk_create("a", 0),
        RequestError,
        r"cannot have 0 bytes: use 4096 \(4KiB\) to",
    ),
    (
        "a negative size",
        lambda r: r.pool.vdisk_create("a", -4096),
        RequestError,
        r"cannot have -4096 bytes: use",
    ),
    (
        "too large",
        lambda r: r.pool.vdisk_create("a", VDISK_BYTES_MAX + BLOCK_BYTES),
        RequestError,
        r"use 4096 \(4KiB\) to .* \(1PiB\)",
    ),
    (
        "a taken name",
        lambda r: r.pool.vdisk_create("base", 1 << 20),
        Conflict,
        r"a vdisk base exists already: choose another name",
    ),
    (
        "clone under a taken name",
        lambda r: r.pool.clone_create("base", "snap", "used"),
        Conflict,
        r"a vdisk used exists already",
    ),
    (
        "rename to a taken name",
        lambda r: r.pool.vdisk_rename("base", "used"),
        Conflict,
        r"a vdisk used exists already: choose another",
    ),
    (
        "rename of nothing",
        lambda r: r.pool.vdisk_rename("none", "a"),
        NotFound,
        r"there is no vdisk none: `cleavectl vdisk ls` shows",
    ),
    (
        "rename to a bad name",
        lambda r: r.pool.vdisk_rename("base", "-"),
        RequestError,
        r"cannot be the name of a vdisk",
    ),
    ("show of nothing", lambda r: r.pool.vdisk_show("none"), NotFound, r"there is no vdisk none"),
    (
        "delete of nothing",
        lambda r: r.pool.vdisk_delete("none"),
        NotFound,
        r"there is no vdisk none",
    ),
    (
        "delete of a used one",
        lambda r: r.pool.vdisk_delete("used"),
        Conflict,
        r"vdisk used is in use by session 1: end those",
    ),
    (
        "delete with snapshots",
        lambda r: r.pool.vdisk_delete("base"),
        Conflict,
        r"vdisk base has snapshots: delete base@snap first",
    ),
    (
        "resize of nothing",
        lambda r: r.pool.vdisk_resize("none", 1 << 20),
        NotFound,
        r"there is no vdisk none",
    ),
    (
        "resize to no blocks",
        lambda r: r.pool.vdisk_resize("base", 1),
        RequestError,
        r"1 bytes are not whole blocks of 4096: use 4096",
    ),
    (
        "a taken snapshot",
        lambda r: r.pool.snapshot_create([("base", "snap")]),
        Conflict,
        r"a snapshot base@snap exists already: choose",
    ),
    (
        "snapshot of nothing",
        lambda r: r.pool.snapshot_create([("none", "s")]),
        NotFound,
        r"there is no vdisk none",
    ),
    (
        "no snapshots",
        lambda r: r.pool.snapshot_create([]),
        RequestError,
        r"name at least one snapshot, and each only once",
    ),
    (
        "one twice",
        lambda r: r.pool.snapshot_create([("base", "s")] * 2),
        RequestError,
        r"name at least one snapshot, and each only once",
    ),
    (
        "a bad snapshot",
        lambda r: r.pool.snapshot_create([("base", "a b")]),
        RequestError,
        r"'a b' cannot be the name of a snapshot",
    ),
    (
        "snapshots of nothing",
        lambda r: r.pool.snapshot_list("none"),
        NotFound,
        r"there is no vdisk none",
    ),
    (
        "delete of no snapshot",
        lambda r: r.pool.snapshot_delete("base", "x"),
        NotFound,
        r"no snapshot base@x: `cleavectl snapshot ls",
    ),
    (
        "delete of a backing store",
        lambda r: r.pool.snapshot_delete("base", "snap"),
        Conflict,
        r"backing store of clone: split or",
    ),
    (
        "clone of nothing",
        lambda r: r.pool.clone_create("base", "none", "c"),
        NotFound,
        r"there is no snapshot base@none",
    ),
    ("split of nothing", lambda r: r.pool.split_start("none"), NotFound, r"there is no vdisk none"),
    (
        "split of no clone",
        lambda r: r.pool.split_start("base"),
        Conflict,
        r"base has no backing store: it is not a clone, or was split",
    ),
    (
        "split in no mode",
        lambda r: r.pool.split_start("clone", "x"),
        RequestError,
        r"a split has no mode 'x': use copy or share",
    ),
    (
        "pause of no split",
        lambda r: r.pool.split_pause("clone"),
        Conflict,
        r"clone is none and cannot pause: possible now: start",
    ),
    (
        "resume of no split",
        lambda r: r.pool.split_resume("clone"),
        Conflict,
        r"is none and cannot resume: possible now: start",
    ),
    (
        "cancel of no split",
        lambda r: r.pool.split_cancel("clone"),
        Conflict,
        r"is none and cannot cancel: possible now: start",
    ),
    (
        "estimate of no clone",
        lambda r: r.pool.split_estimate("base"),
        Conflict,
        r"base has no backing store: it is not a clone",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
async def test_bad_input_gets_the_cause_and_the_next_step_and_changes_nothing(
    call: Call, error: type[StorageError], message: str
) -> None:
    async with new_pool(8 << 20) as running:
        await backed_clone(running, 10)
        await running.pool.vdisk_create("used", 1 << 20)
        session = running.volume("used")
        session.attach("session 1")
        before = (await running.pool.vdisk_list(), await running.pool.snapshot_list())
        with pytest.raises(error, match=message) as caught:
            await call(running)
        assert type(caught.value) is error
        assert (await running.pool.vdisk_list(), await running.pool.snapshot_list()) == before


async def test_a_volume_of_no_image_is_not_found() -> None:
    async with new_pool(8 << 20) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        for name in ("b", "a@s", "b@s", "", "@", "a@s@t"):
            with pytest.raises(NotFound, match="there is no"):
                running.pool.volume(name)
        with pytest.raises(
            NotFound, match="a has no split: start one with `cleavectl split start a`"
        ):
            running.pool.split_show("a")


def test_a_pool_file_that_is_too_small_or_exists_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "pool")
    with pytest.raises(
        RequestError, match=r"a pool of 4096 bytes is too small: use at least 8388608 \(8MiB\)"
    ):
        Pool.create(path, BLOCK_BYTES)
    Pool.create(path, 8 << 20)
    with pytest.raises(Conflict, match="exists"):
        Pool.create(path, 8 << 20)


async def test_a_pool_is_opened_once_and_what_is_no_pool_is_refused_untouched(
    tmp_path: Path,
) -> None:
    path = tmp_path / "pool"
    path.write_bytes(b"precious" * 4096)
    with pytest.raises(
        PoolRefused, match="is not a cleaved pool, it holds data of an unknown kind: check the path"
    ):
        await Pool.open(str(path))
    assert path.read_bytes() == b"precious" * 4096
    with pytest.raises(StorageError, match="missing"):
        await Pool.open(str(tmp_path / "missing"))
    path.unlink()
    with path.open("wb") as made:
        made.truncate(8 << 20)
    await Pool.format(device := MemoryDevice(8 << 20))
    content = bytearray(8 << 20)
    device._read([content], 0)
    path.write_bytes(content)
    pool = await Pool.open(str(path))
    with pytest.raises(PoolLocked):
        await Pool.open(str(path))
    await pool.close()
    path.write_bytes(content[: 4 << 20])
    with pytest.raises(PoolRefused, match=r"is truncated: .* restore its full size"):
        await Pool.open(str(path))


@pytest.mark.parametrize("size_bytes", [8 << 20, 12345678, 1 << 40], ids=str)
async def test_pools_of_every_size_hold_data(size_bytes: int) -> None:
    memory = MemoryDevice(size_bytes // 512 * 512)
    await Pool.format(memory)
    running = await open_on(memory)
    shown = running.pool.show()
    assert shown["size_bytes"] == size_bytes // BLOCK_BYTES * BLOCK_BYTES
    assert shown["available_bytes"] > shown["size_bytes"] * 0.7
    await running.pool.vdisk_create("a", 1 << 30)
    await running.write("a", 0, data(1, 300))
    assert await running.read("a", 0, 300 * BLOCK_BYTES) == data(1, 300)
    await running.close()
    if size_bytes < 1 << 30:
        checked_offline(memory)


@pytest.mark.parametrize("nth", range(1, 12))
async def test_an_open_that_fails_leaves_nothing_running(nth: int) -> None:
    async with new_pool(8 << 20) as running:
        await running.pool.vdisk_create("a", 1 << 20)
        await running.write("a", 0, data(1), fua=True)
        memory = running.memory.copy()
    for operation in ("read", "write", "sync"):
        twin = memory.copy()
        device = FaultyDevice(twin, Fault(operation, nth))
        opening = asyncio.create_task(open_on(twin, device))
        await asyncio.wait([opening])
        if opening.exception() is not None:
            assert isinstance(opening.exception(), StorageError) and "planted fault" in str(
                opening.exception()
            )
            continue
        device.faults.clear()
        reopened = opening.result()
        if (
            "image.damaged" in reopened.event_names()
        ):  # the fault hit the vdisk's entry: what the log has of it stays there
            assert "cannot be read" in reopened.pool.show()["read_only_reason"]
        else:
            assert await reopened.read("a", 0, BLOCK_BYTES) == data(1)
        await reopened.close()
        again = await open_on(twin.copy())
        assert await again.read("a", 0, BLOCK_BYTES) == data(1)
        await again.close()


async def test_a_damaged_table_entry_costs_its_image_and_what_stands_on_it_alone() -> None:
    async with new_pool() as running:
        await backed_clone(running, 300)
        await running.pool.vdisk_create("other", LEAF_BYTES)
        await running.write("other", 0, data(2))
        await running.pool.snapshot_create([("other", "s")])
        await running.pool.split_start("clone", "copy", rate_max_bytes=4096)
        await running.pool.split_pause("clone")
        await running.checkpoint()
        number = running.image("base@snap").number
        entry = running.pool.rooms.table.nodes[1][0].q[number * 2]
        memory = running.memory
    memory = memory.copy()
    memory.try_writev([b"\xff" * BLOCK_BYTES], entry * BLOCK_BYTES, BLOCK_BYTES)
    running = await open_on(memory)
    assert "image.damaged" in running.event_names() and "split.lost" in running.event_names()
    assert [row["name"] for row in await running.pool.vdisk_list()] == ["base", "clone", "other"]
    for name in ("base", "other", "other@s"):
        assert len(await running.read(name, 0, BLOCK_BYTES)) == BLOCK_BYTES
    with pytest.raises(BlockDamaged, match=f"the table entry of image {number} is damaged"):
        running.volume("clone")
    await running.write("other", 0, data(3), fua=True)
    await running.pool.vdisk_create("new", 1 << 20)
    assert running.image("new").number != number
    await running.close()


async def test_a_pool_that_went_read_only_can_still_be_checked() -> None:
    async with new_pool(decorate=FaultyDevice) as running:
        await running.pool.vdisk_create("a", LEAF_BYTES)
        await running.write("a", 0, data(1, 100))
        await running.checkpoint()
        running.pool._state.fail("planted")
        report = await running.check()
        assert report["ok"]


async def test_vdisks_are_found_by_their_uuids() -> None:
    async with new_pool(8 << 20) as running:
        made = {
            name: uuid.UUID((await running.pool.vdisk_create(name, 1 << 20))["uuid"]).bytes
            for name in ("a", "b", "c")
        }
        await running.pool.snapshot_create([("a", "s")])
        assert running.pool.names_of_uuids({made["a"], made["c"], bytes(16)}) == {
            made["a"]: "a",
            made["c"]: "c",
        }
        await running.pool.vdisk_rename("a", "renamed")
        await running.pool.vdisk_delete("c")
        assert running.pool.names_of_uuids(set(made.values())) == {
            made["a"]: "renamed",
            made["b"]: "b",
        }
        memory = running.memory.copy()
    again = await open_on(memory)
    assert again.pool.names_of_uuids(set(made.values())) == {made["a"]: "renamed", made["b"]: "b"}
    await again.close()


async def test_a_damaged_table_pointer_block_costs_only_its_images() -> None:
    """Of the kind of one bad block at open that stops everything: it did."""
    async with new_pool() as running:
        await asyncio.gather(
            *(running.pool.vdisk_create(f"v{number}", 1 << 20) for number in range(300))
        )
        for number in (0, 299):
            await running.write(f"v{number}", 0, data(number + 1))
        await running.checkpoint()
        by_number = {running.image(name).number: name for name in running.pool.names()}
        hidden = {name for number, name in by_number.items() if number < 256}
        node = await running.pool.rooms.table.load(0)
    memory = running.memory.copy()
    memory._pages[node.vbn][99] ^= 1
    running = await open_on(memory)
    assert set(running.pool.names()) == set(by_number.values()) - hidden
    assert "images 0 to 255 cannot be read" in running.pool.show()["read_only_reason"]
    assert ("image.damaged", 0, 255) in [
        (name, fields.get("number"), fields.get("last_number")) for name, fields in running.events
    ]
    served = max(by_number)
    name = by_number[served]
    assert await running.read(name, 0, BLOCK_BYTES) == (
        data(300) if name == "v299" else bytes(BLOCK_BYTES)
    )
    assert len(await running.pool.vdisk_list()) == 300 - len(hidden)
    await running.close()
