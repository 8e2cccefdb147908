"""What is shown while a command waits for a split or watches counters, on a virtual clock."""

from typing import Any

import msgspec
import pytest

from daemon.admin.output import format_value
from daemon.admin.progress import LINE_SECONDS, RATE_SECONDS, BarView, PlainView, RateMeter
from daemon.admin.stats_watch import rates_between
from protocol.control.rows import Split, Stats
from tests.daemon.fakes import example, split_row

MIB = 1 << 20


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def row(percent: float, state: str = "running", counted: bool = True) -> Split:
    total = 25600  # 100 MiB
    return split_row(
        name="a",
        state=state,
        percent=percent,
        counted=counted,
        holes_total=total,
        holes_remaining=round(total * (100 - percent) / 100),
        eta_seconds=61.0,
    )


def test_the_rate_is_that_of_the_last_seconds() -> None:
    clock = Clock()
    meter = RateMeter(clock)
    assert meter.rate_bytes(0) == 0.0
    for second in range(1, 11):
        clock.now = float(second)
        assert meter.rate_bytes(second * MIB) == MIB
    for second in range(11, 11 + int(RATE_SECONDS) + 1):
        clock.now = float(second)
        rate = meter.rate_bytes(10 * MIB)
    assert rate == 0.0


def test_lines_come_by_time_and_by_percent(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with PlainView(clock) as view:
        view.update(row(100, counted=False))
        view.update(row(1))
        view.update(row(2))
        view.update(row(12))
        clock.now = LINE_SECONDS
        view.update(row(13))
        view.update(row(100, "done"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[:3] for line in lines] == [
        ["split a: running", "1.0 %", "99 MiB remaining"],
        ["split a: running", "12.0 %", "88 MiB remaining"],
        ["split a: running", "13.0 %", "87 MiB remaining"],
        ["split a: done", "100.0 %", "0 B remaining"],
    ]
    assert "ETA 1:01" in lines[0]


def test_the_bar_shows_rate_remaining_and_eta(capsys: pytest.CaptureFixture[str]) -> None:
    with BarView("a") as view:
        view.update(row(100, counted=False))
        view.update(row(40))
    shown = capsys.readouterr().err
    assert "split a" in shown
    assert "40.0 %" in shown
    assert "60 MiB remaining" in shown
    assert "ETA 1:01" in shown


def test_counters_become_rates() -> None:
    before = example(Stats, reads=100, flushes=5, sessions=1)
    now = msgspec.structs.replace(before, reads=300, read_bytes=8192)
    assert rates_between(before, now, 2.0) == {
        "reads": 100,
        "writes": 0,
        "read_bytes": 4096,
        "written_bytes": 0,
        "trims": 0,
        "flushes": 0,
    }


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("size_bytes", 1024, "1 KiB"),
        ("rate_bytes_per_second", 1024, "1 KiB/s"),
        ("eta_seconds", 61.2, "1:01"),
        ("percent", 12.345, "12.3 %"),
        ("created_ns", 0, "1970-01-01 00:00:00Z"),
        ("backing", None, "-"),
        ("read_only", False, "no"),
        ("clones", ["a", "b"], "a, b"),
        ("clones", [], "-"),
        ("name", "x", "x"),
    ],
)
def test_values_are_written_by_the_unit_in_their_key(key: str, value: Any, text: str) -> None:
    assert format_value(key, value) == text
