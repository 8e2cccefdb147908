"""Sizes, durations and rates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.process.units import (
    SIZE_BYTES_MAX,
    SIZE_UNITS,
    UnitError,
    format_duration,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("10GiB", 10 << 30),
        ("10 GiB", 10 << 30),
        ("1.5TiB", 3 << 39),
        ("1PiB", 1 << 50),
        ("0.5KiB", 512),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "-1GiB",
        "10GB",
        "10G",
        "10gib",
        "1e9",
        "0x10",
        "1 2",
        "1.GiB",
        "١GiB",
        " 1",
        "1\n",
        "9" * 21,
    ],
)
def test_what_is_no_size_is_told_what_would_be(text: str) -> None:
    with pytest.raises(UnitError, match="10GiB"):
        parse_size(text)


def test_a_part_of_a_byte_is_refused() -> None:
    with pytest.raises(UnitError, match="whole number"):
        parse_size("0.3KiB")


@given(st.integers(0, 2**60), st.sampled_from(sorted(SIZE_UNITS)))
def test_any_whole_number_of_any_unit(count: int, unit: str) -> None:
    size_bytes = count * SIZE_UNITS[unit]
    if size_bytes <= SIZE_BYTES_MAX:
        assert parse_size(f"{count}{unit}") == size_bytes
    else:
        with pytest.raises(UnitError, match="8192PiB"):
            parse_size(f"{count}{unit}")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("500ms", 0.5), ("5m", 300), ("2h", 7200), ("1d", 86400), ("1.5s", 1.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "30sec", "-1s", "1min", "s"])
def test_what_is_no_duration_is_told_what_would_be(text: str) -> None:
    with pytest.raises(UnitError, match="30s"):
        parse_duration(text)


def test_rates() -> None:
    assert parse_rate("100MiB/s") == 100 << 20


@pytest.mark.parametrize("text", ["100MiB", "0/s", "0MiB/s", "/s", "100MiB/h", "fast/s"])
def test_what_is_no_rate_is_told_what_would_be(text: str) -> None:
    with pytest.raises(UnitError, match="100MiB/s"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10 << 30, "10 GiB"),
        (1 << 50, "1 PiB"),
    ],
)
def test_sizes_as_people_read_them(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (754, "12:34"), (12345, "3:25:45")]
)
def test_durations_as_people_read_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
