"""The limit of dirty bytes, from a /proc of our own."""

from pathlib import Path

import pytest

from storage.device.dirty_limit import DIRTY_BYTES_MAX, DIRTY_BYTES_MIN, dirty_inline_bytes_max


def proc(
    directory: Path,
    background_bytes: str = "0",
    ratio: str = "10",
    available: str = "MemAvailable:    4194304 kB",
) -> Path:
    (directory / "sys/vm").mkdir(parents=True)
    (directory / "sys/vm/dirty_background_bytes").write_text(background_bytes + "\n")
    (directory / "sys/vm/dirty_background_ratio").write_text(ratio + "\n")
    (directory / "meminfo").write_text(
        f"MemTotal:        8388608 kB\n{available}\nHugePages_Total:       0\n"
    )
    return directory


def test_a_quarter_of_the_background_ratio_of_what_is_available(tmp_path: Path) -> None:
    assert dirty_inline_bytes_max(proc(tmp_path)) == (4 << 30) * 10 // 100 // 4


def test_the_fixed_setting_wins_over_the_ratio(tmp_path: Path) -> None:
    assert dirty_inline_bytes_max(proc(tmp_path, background_bytes=str(256 << 20))) == 64 << 20


@pytest.mark.parametrize(
    ("available", "limit"), [("10 kB", DIRTY_BYTES_MIN), ("999999999 kB", DIRTY_BYTES_MAX)]
)
def test_it_stays_within_its_bounds(tmp_path: Path, available: str, limit: int) -> None:
    assert dirty_inline_bytes_max(proc(tmp_path, available=f"MemAvailable: {available}")) == limit


@pytest.mark.parametrize("available", ["MemFree: 4194304 kB", "MemAvailable: much"])
def test_a_proc_that_does_not_tell_gives_the_least(tmp_path: Path, available: str) -> None:
    assert dirty_inline_bytes_max(proc(tmp_path, available=available)) == DIRTY_BYTES_MIN
    assert dirty_inline_bytes_max(tmp_path / "missing") == DIRTY_BYTES_MIN


def test_this_machine_tells(tmp_path: Path) -> None:
    assert DIRTY_BYTES_MIN <= dirty_inline_bytes_max() <= DIRTY_BYTES_MAX
