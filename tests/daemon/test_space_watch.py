"""The soft threshold of a thin pool: told once, and again only after it was well below; and what an
initiator sees of it.
"""

from pathlib import Path

import pytest

from daemon.iscsi.initiator import Initiator
from daemon.pool.space_watch import REARM_PERCENT, SpaceWatch
from daemon.targets.names import TARGET_PREFIX
from protocol.iscsi.initiator.task import CommandFailed
from tests.daemon.programs import Daemon

TEST_UNIT_READY = bytes(6)


def test_it_is_told_once_and_again_after_it_was_well_below(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[None] = []
    watch = SpaceWatch(80, lambda: told.append(None))
    for percent, times in (
        (79, 0),
        (80, 1),
        (89, 1),
        (80 - REARM_PERCENT, 1),
        (81, 1),
        (79 - REARM_PERCENT, 1),
        (80, 2),
    ):
        watch.look(percent << 20, (100 - percent) << 20)
        assert len(told) == times, percent
    assert capsys.readouterr().out.count("pool.filling") == 2


def test_each_threshold_is_told_once_until_the_use_is_well_below_and_shown_as_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[None] = []
    watch = SpaceWatch(80, lambda: told.append(None))
    steps = (
        (89, 1, False, None), (90, 2, False, 90), (89, 2, False, None), (95, 3, False, 95),
        (91, 3, False, 90), (100, 4, True, 95), (99, 4, False, 95), (100, 4, True, 95),
        (94, 4, False, 90), (100, 5, True, 95), (89, 5, False, None), (84, 5, False, None),
        (100, 6, True, 95),
    )  # fmt: skip
    for percent, times, full, warning in steps:
        watch.look(percent << 20, (100 - percent) << 20)
        assert (len(told), watch.shown()) == (
            times,
            {"full": full, "space_warning_percent": warning},
        ), percent
    output = capsys.readouterr().out
    assert [
        output.count(event) for event in ("pool.filling", "pool.space_warning", "pool.full")
    ] == [1, 4, 3]


def test_a_pool_of_nothing_is_not_full() -> None:
    SpaceWatch(80, lambda: pytest.fail("told")).look(0, 0)


async def sense(disk: Initiator) -> tuple[int, int, int] | None:
    try:
        await disk._once(lambda done: disk._connection.submit(0, TEST_UNIT_READY, done))
    except CommandFailed as error:
        return error.key, error.asc, error.ascq
    return None


async def test_initiators_are_told_when_the_pool_fills(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(
        "pool.soft_threshold_percent = 40\n" + f'pool.path = "{tmp_path / "pool"}"\n'
    )
    async with Daemon(
        tmp_path, pool_size="64MiB", options=("--config", str(tmp_path / "config"))
    ) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1GiB")
        host, _, port = daemon.portal.rpartition(":")
        async with await Initiator.connect(host, int(port), f"{TARGET_PREFIX}a") as disk:
            assert await sense(disk) == (6, 0x29, 0)
            assert await sense(disk) is None
            for number in range(30):
                await disk.write(number << 20, b"\x11" * (1 << 20))
            await daemon.ctl(
                "snapshot", "create", "a@s"
            )  # a consistency point enters what was allocated
            while not any(event["event"] == "pool.filling" for event in daemon.events()):
                await disk.flush()
            assert await sense(disk) == (6, 0x38, 0x07)
            assert await sense(disk) is None
