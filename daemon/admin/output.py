"""What commands print: aligned text for people, JSON for programs.

JSON is what the daemon answered, key for key (docs/operations.md); text picks columns, and writes
values by the unit that stands last in the key's name.
"""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from daemon.process.units import format_duration, format_size

Row = dict[str, Any]


def print_json(value: Any) -> None:
    """One JSON document."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """One line a row, under a line of column names. Nothing but the names when there
    are no rows.
    """
    names = [
        re.sub("(_bytes_per_second|_bytes|_seconds|_ns)$", "", column).upper() for column in columns
    ]
    lines = [
        names,
        *([format_value(column, row.get(column)) for column in columns] for row in rows),
    ]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    for line in lines:
        sys.stdout.write(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            + "\n"
        )


def print_record(record: Row) -> None:
    """One line a key."""
    width = max(map(len, record), default=0)
    for key, value in record.items():
        sys.stdout.write(f"{key.ljust(width)}  {format_value(key, value)}\n")


def format_value(key: str, value: Any) -> str:
    """A value as people read it, by the unit in its key: bytes, seconds, percent, nanoseconds since
    1970.
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "-"
    if key.endswith("_bytes"):
        return format_size(value)
    if key.endswith("_bytes_per_second"):
        return f"{format_size(value)}/s"
    if key.endswith("_seconds"):
        return format_duration(value)
    if key == "percent":
        return f"{value:.1f} %"
    if key.endswith("_ns"):
        return _moment(value)
    return str(value)


def _moment(nanoseconds: int) -> str:
    from datetime import UTC, datetime  # noqa: PLC0415 -- only where a time is shown

    return (
        datetime.fromtimestamp(nanoseconds // 1_000_000_000, UTC)
        .isoformat(sep=" ")
        .removesuffix("+00:00")
        + "Z"
    )
