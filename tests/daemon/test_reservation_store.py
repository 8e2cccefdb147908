"""Persistent reservations in the pool: what is kept, when it is answered, and what a
failure does.
"""

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio

from daemon.targets.reservation_store import ReservationStore
from storage.errors import PoolReadOnly
from tests.daemon.fakes import MemoryPool

A, B = UUID(int=1), UUID(int=2)


def state(key: int = 0xFFFFFFFFFFFFFFFF) -> dict[str, Any]:
    return {
        "registrations": {"iqn.test,i,0x1": key},
        "holder": "iqn.test,i,0x1",
        "kind": 5,
        "generation": 3,
    }


@pytest.fixture
def pool() -> MemoryPool:
    return MemoryPool()


@pytest_asyncio.fixture
async def store(pool: MemoryPool) -> AsyncIterator[ReservationStore]:
    found = ReservationStore(pool)
    yield found
    await found.drain()


async def test_what_was_kept_is_there_at_the_next_start(
    pool: MemoryPool, store: ReservationStore
) -> None:
    done: list[Exception | None] = []
    store.keep(A, state(), done.append)
    assert done == []
    await store.drain()
    assert done == [None]
    assert ReservationStore(pool).kept(A) == state()
    assert ReservationStore(pool).kept(B) is None


async def test_a_saved_write_cache_is_there_at_the_next_start(
    pool: MemoryPool, store: ReservationStore
) -> None:
    for write_cache in (False, True):
        store.keep(A, {**state(), "write_cache": write_cache}, lambda _: None)
        await store.drain()
        kept = ReservationStore(pool).kept(A)
        assert kept is not None and kept.get("write_cache", True) is write_cache


@pytest.mark.parametrize("unrestricted", [True, False])
async def test_an_unfinished_sanitize_operation_is_there_at_the_next_start(
    pool: MemoryPool, store: ReservationStore, unrestricted: bool
) -> None:
    store.keep(A, {**state(), "sanitize_unrestricted_exit": unrestricted}, lambda _: None)
    await store.drain()
    assert ReservationStore(pool).kept(A) == {**state(), "sanitize_unrestricted_exit": unrestricted}
    store.keep(A, state(), lambda _: None)
    await store.drain()
    assert ReservationStore(pool).kept(A) == state()


async def test_what_is_stored_already_is_answered_at_once(
    pool: MemoryPool, store: ReservationStore
) -> None:
    done: list[Exception | None] = []
    store.keep(A, None, done.append)
    assert done == [None]
    store.keep(A, state(), done.append)
    await store.drain()
    store.keep(A, state(), done.append)
    assert done == [None, None, None]
    assert pool.stores == 1


async def test_changes_that_come_together_are_written_together_and_in_order(
    pool: MemoryPool, store: ReservationStore
) -> None:
    done: list[int] = []
    for key in range(1, 101):
        store.keep(A, state(key), lambda _, key=key: done.append(key))  # type: ignore[misc]
        store.keep(B, state(key) if key % 2 else None, lambda _, key=key: done.append(-key))  # type: ignore[misc]
    await store.drain()
    assert done == [sign * key for key in range(1, 101) for sign in (1, -1)]
    assert pool.stores <= 2
    found = ReservationStore(pool)
    assert (found.kept(A), found.kept(B)) == (state(100), None)


async def test_a_change_back_while_another_is_written_waits_for_its_turn(
    pool: MemoryPool, store: ReservationStore
) -> None:
    done: list[Exception | None] = []
    store.keep(A, state(), done.append)
    store.keep(A, None, done.append)  # what is stored now, but not what is being written
    assert done == []
    await store.drain()
    assert done == [None, None]
    assert ReservationStore(pool).kept(A) is None


async def test_a_failure_is_told_and_the_next_change_writes_both(
    pool: MemoryPool, store: ReservationStore
) -> None:
    done: list[Exception | None] = []
    pool.error = PoolReadOnly("a failed sync")
    store.keep(A, state(), done.append)
    await store.drain()
    assert done == [pool.error]
    pool.error = None
    store.keep(B, state(), done.append)
    await store.drain()
    assert done[1:] == [None]
    assert ReservationStore(pool).kept(A) == state()


async def test_a_deleted_vdisk_is_forgotten(pool: MemoryPool, store: ReservationStore) -> None:
    done: list[Exception | None] = []
    store.keep(A, state(), done.append)
    await store.drain()
    await store.forget(B)
    assert pool.stores == 1
    await store.forget(A)
    assert ReservationStore(pool).kept(A) is None
