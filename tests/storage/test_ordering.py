"""The ordering checker finds each disorder that it is there for, in a pool with that very bug
planted.
"""

from typing import Any
from unittest import mock

import pytest

from storage.consistency.consistency_point import ConsistencyPoints
from storage.log.intent_log import IntentLog
from storage.pool import Pool
from tests.crash.canaries import CANARIES, planted
from tests.crash.oracle import Model
from tests.crash.recording import PageDevice
from tests.crash.session import Session, abandon
from tests.storage.devices import MemoryDevice
from tests.storage.ordering import OrderingChecker

POOL_BYTES = 8 << 20


async def use_a_pool() -> None:
    """Overwrite, flush, take consistency points; whatever the planted bug makes of it."""
    device = PageDevice(POOL_BYTES)
    await Pool.format(device)
    pool = await Pool.open_on(device)
    try:
        session = Session(pool, Model())
        await session.create("a", 64)
        for turn in range(6):
            await session.write("a", 8 * (turn % 2), 8)
            await session.flush("a")
            await session.consistency_point()
            await session.write("a", 8 * (turn % 2), 8)
            await session.write("a", 16, 8)
    finally:
        await abandon(pool)


async def found() -> list[str]:
    try:
        await use_a_pool()
    except Exception:
        # The pool may give up, or not: what counts is what the checker noted.
        assert OrderingChecker.violations
    taken = list(OrderingChecker.violations)
    OrderingChecker.violations.clear()
    return taken


async def test_order_of_a_sound_pool() -> None:
    assert await found() == []


async def test_a_write_that_is_done_when_it_returns_is_covered_by_a_sync_right_after_it() -> None:
    """Found by the model test: the checker noted such a write a turn later, and took the sync after
    it for one that did not cover it.
    """
    device = OrderingChecker(MemoryDevice(POOL_BYTES))
    await device.writev([bytes(4096)], 1 << 20)
    await device.sync()
    assert not device.unsynced


async def test_superblock_before_sync_is_found() -> None:
    with planted(
        next(canary for canary in CANARIES if canary.__name__ == "superblock_before_data_sync")
    ):
        assert any("is written before" in text for text in await found())


async def test_early_reuse_is_found() -> None:
    with planted(
        next(canary for canary in CANARIES if canary.__name__ == "early_reuse_of_freed_block")
    ):
        assert any("is written over" in text for text in await found())


async def test_flush_without_sync_is_found() -> None:
    async def nothing(self: IntentLog, durable: bool) -> None:
        """Acknowledge without doing anything."""

    with mock.patch.object(IntentLog, "_commit", nothing):
        assert any("a flush is acknowledged" in text for text in await found())


async def test_superblock_over_the_durable_one_is_no_excuse() -> None:
    """A superblock that is written as the other copy first, with the same number, passes; one of
    garbage does not.
    """
    original = ConsistencyPoints._write_block

    async def planted_write(self: Any, block: bytearray, vbn: int) -> None:
        block[100] ^= 1
        await original(self, block, vbn)

    with (
        mock.patch.object(ConsistencyPoints, "_write_block", planted_write),
        pytest.raises(AssertionError, match="over a superblock"),
    ):
        await use_a_pool()
    OrderingChecker.violations.clear()
