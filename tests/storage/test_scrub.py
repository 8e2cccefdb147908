"""Scrub: finds each damaged block in the background, names vdisk, snapshot and offset, keeps to its
rate, and shows how far it is.
"""

import asyncio
from typing import Any

import pytest

from storage.errors import Conflict, NotFound
from storage.layout import BLOCK_BYTES, KIND_SNAPSHOT
from storage.pool import Pool
from tests.crash.oracle import SECTORS_PER_BLOCK, data
from tests.crash.session import Client
from tests.storage.devices import MemoryDevice

POOL_BYTES = 32 << 20


async def made() -> tuple[Pool, MemoryDevice, list[str]]:
    device = MemoryDevice(POOL_BYTES)
    await Pool.format(device)
    events: list[str] = []
    pool = await Pool.open_on(device, on_event=lambda name, **fields: events.append(name))
    await pool.vdisk_create("a", 8 << 20)
    client = Client(pool)
    for fbn in (0, 1, 300, 301):
        await client.write(
            "a", fbn * SECTORS_PER_BLOCK, data("a", fbn * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK, 1)
        )
    await pool.snapshot_create([("a", "s")])
    await client.write("a", 0, data("a", 0, SECTORS_PER_BLOCK, 2))
    await pool.consistency_point()
    return pool, device, events


async def scrubbed(pool: Pool, rate_max_bytes: int | None = 1 << 40) -> dict[str, Any]:
    await pool.scrub_start(rate_max_bytes)
    while pool.scrub_show()["state"] == "running":
        await asyncio.sleep(0)
    return pool.scrub_show()


def flip(device: MemoryDevice, vbn: int) -> None:
    device._pages[vbn][77] ^= 4


def vbn_of(pool: Pool, name: str, fbn: int) -> int:
    node = pool.volume(name).image.tree.peek(fbn >> 8)
    assert node is not None
    return int(node.q[(fbn & 255) * 2])


async def test_a_sound_pool() -> None:
    pool, _, events = await made()
    report = await scrubbed(pool)
    assert report["state"] == "done" and report["percent"] == 100.0 and report["damages"] == []
    # Everything but the superblocks, the log, and pointer blocks of higher levels, which reading
    # the others has verified.
    assert report["bytes_verified"] > 10 * BLOCK_BYTES
    assert "scrub.started" in events and "scrub.done" in events
    await pool.close()


async def test_damaged_data_is_named_for_every_image_that_has_it() -> None:
    pool, device, events = await made()
    shared, own = vbn_of(pool, "a", 300), vbn_of(pool, "a", 0)
    flip(device, shared)
    flip(device, own)
    report = await scrubbed(pool)
    found = {
        (damage["where"], damage["offset_bytes"], damage["vbn"]) for damage in report["damages"]
    }
    assert found >= {("a", 300 * BLOCK_BYTES, shared), ("a", 0, own)}
    assert report["damages_total"] == len(report["damages"])
    assert "scrub.damaged" in events
    # The snapshot shares the level-1 block itself, or the data below its own: either way its damage
    # is named, too.
    assert ("a@s", 300 * BLOCK_BYTES, shared) in found and ("a@s", 0, own) not in found
    await pool.close()


async def test_a_damaged_pointer_block_is_found_though_memory_has_it() -> None:
    pool, device, _ = await made()
    node = pool.volume("a").image.tree.nodes[1][0]
    flip(device, node.vbn)
    report = await scrubbed(pool)
    assert [(damage["where"], damage["vbn"]) for damage in report["damages"]] == [("a", node.vbn)]
    assert "pointer block" in report["damages"][0]["what"]
    await pool.close()


async def test_a_pointer_block_that_cannot_be_loaded_is_passed_over() -> None:
    pool, device, _ = await made()
    node = pool.volume("a").image.tree.nodes[1][0]
    flip(device, node.vbn)
    flip(device, vbn_of(pool, "a", 301))
    await pool.close()
    pool = await Pool.open_on(device.copy())
    report = await scrubbed(pool)
    assert {(damage["where"], damage["offset_bytes"]) for damage in report["damages"]} >= {
        ("a", 0),
        ("a", 301 * BLOCK_BYTES),
    }
    await pool.close()


async def test_damaged_metafile() -> None:
    pool, device, _ = await made()
    node = pool.rooms.table.peek(0)
    assert node is not None
    flip(device, int(node.q[2]))  # entry 1: the vdisk
    report = await scrubbed(pool)
    assert [damage["where"] for damage in report["damages"]] == ["vdisk table"]
    await pool.close()


async def test_one_at_a_time_shown_and_cancelled() -> None:
    pool, _, _ = await made()
    with pytest.raises(NotFound):
        pool.scrub_show()
    assert (await pool.scrub_start(1))[
        "state"
    ] == "running"  # a byte a second: it will not end by itself
    with pytest.raises(Conflict):
        await pool.scrub_start()
    for _ in range(50):
        await asyncio.sleep(0)
    shown = pool.scrub_show()
    assert shown["state"] == "running" and 0 <= shown["percent"] < 100
    assert (await pool.scrub_cancel())["state"] == "cancelled"
    assert (await scrubbed(pool))["state"] == "done"
    await pool.close()


async def test_clients_and_deletions_go_on_meanwhile() -> None:
    pool, _, _ = await made()
    client = Client(pool)
    await pool.scrub_start(1 << 40)
    for turn in range(20):
        await client.write("a", 8 * turn, data("a", 8 * turn, SECTORS_PER_BLOCK, turn), fua=True)
        if turn == 5:
            await pool.snapshot_delete("a", "s")
        await pool.consistency_point()
    while pool.scrub_show()["state"] == "running":
        await asyncio.sleep(0)
    assert pool.scrub_show()["damages"] == []
    assert not list(pool._catalogue.numbers(KIND_SNAPSHOT))
    await pool.close()
