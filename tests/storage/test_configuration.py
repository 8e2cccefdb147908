"""The configuration metafile: sections survive restarts, grow and shrink, and are refused when they
cannot be kept.
"""

from collections.abc import Iterator

import pytest

from storage.errors import PoolFull, RequestError
from storage.layout import CONFIGURATION_BYTES_MAX
from tests.storage.running_pool import RunningPool

MIB = 1 << 20


@pytest.fixture
def pool() -> Iterator[RunningPool]:
    running = RunningPool(64 * MIB, MIB)
    yield running
    running.close()
    running.stop()


def test_what_was_never_set_is_empty(pool: RunningPool) -> None:
    assert pool.pool.configuration("targets") == b""


@pytest.mark.parametrize("size", [0, 1, 4000, 4096, 5 * MIB])
def test_sections_survive_a_restart_and_do_not_disturb_each_other(
    pool: RunningPool, size: int
) -> None:
    pool.run(pool.pool.configure("access", b"kept"))
    pool.run(
        pool.pool.configure("targets", bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    )
    pool.reopen()
    assert pool.pool.configuration("access") == b"kept"
    assert pool.pool.configuration("targets") == bytes(range(256)) * (size // 256) + b"x" * (
        size % 256
    )


def test_a_section_that_shrinks_leaves_nothing_behind(pool: RunningPool) -> None:
    pool.run(pool.pool.configure("targets", b"t" * 3 * MIB))
    pool.run(pool.pool.configure("targets", b"small"))
    pool.reopen()
    assert pool.pool.configuration("targets") == b"small"
    assert pool.run(pool.pool.check(verify_data=True))["ok"]


def test_too_large_a_configuration_is_refused_and_the_old_one_stays(pool: RunningPool) -> None:
    pool.run(pool.pool.configure("targets", b"old"))
    with pytest.raises(RequestError, match="remove entries"):
        pool.run(pool.pool.configure("targets", bytes(CONFIGURATION_BYTES_MAX + 1)))
    assert pool.pool.configuration("targets") == b"old"


def test_a_configuration_that_the_pool_has_no_room_for_is_refused_and_the_pool_goes_on(
    pool: RunningPool,
) -> None:
    with pytest.raises(PoolFull, match="full"):
        pool.run(pool.pool.configure("targets", bytes(63 * MIB)))
    pool.run(pool.pool.configure("targets", b"fits"))
    pool.reopen()
    assert pool.pool.configuration("targets") == b"fits"
