"""What commands print: aligned text for people, JSON for programs.

JSON is what the daemon answered, key for key (docs/operations.md). Text follows from the kind of
row (`protocol.control.rows`): its columns, and the unit that stands last in a key's name.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from daemon.process.units import format_duration, format_size
from protocol.control.definition import AnyMethod, row_type
from protocol.control.rows import Row, metas_of


def print_answer(method: type[AnyMethod], answer: Any, output: str) -> None:
    """What a method answered, as a table or as JSON."""
    if output == "json":
        print_json(answer)
    elif isinstance(answer, list):
        print_table(row_type(method), answer)
    else:
        print_record(answer)


def print_json(value: Any) -> None:
    """One JSON document."""
    import json  # noqa: PLC0415 -- only where it is wanted

    sys.stdout.write(json.dumps(msgspec.to_builtins(value), indent=2) + "\n")


def print_table(kind: type[Row], rows: Sequence[Row]) -> None:
    """One line a row, under a line of column names. Nothing but the names when there
    are no rows.
    """
    names = [
        re.sub("(_bytes_per_second|_bytes|_seconds|_ns)$", "", key).upper() for key in kind.COLUMNS
    ]
    lines = [names, *([_cell(row, key) for key in kind.COLUMNS] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(names))]
    for line in lines:
        sys.stdout.write(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            + "\n"
        )


def print_record(row: Row, without: Sequence[str] = ("warnings",)) -> None:
    """One line a key. Warnings are not among them: those go to stderr."""
    keys = [key for key in row.__struct_fields__ if key not in without]
    width = max(map(len, keys))
    for key in keys:
        sys.stdout.write(f"{key.ljust(width)}  {_cell(row, key)}\n")


def _cell(row: Row, key: str) -> str:
    value = getattr(row, key)
    if value is None or value == []:
        words = metas_of(type(row))[key].extra or {}
        found = words.get("null" if value is None else "empty")
        if found is not None:
            return str(found)
    return format_value(key, value)


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
