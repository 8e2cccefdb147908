"""Shared by all benches: statistics, tables, and a line about the machine."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

# Written in pieces, so that the page cache gets its own pages, not those of a huge buffer.
WARM_PIECE_BYTES = 1 << 20
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which ``percent`` of all lie (nearest rank). 0 for no values."""
    if not values:
        return 0.0
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, aligned so that its source is readable too."""
    cells = [list(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def machine() -> str:
    """Return one line: the machine the figures were taken on, and its load."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = next(
        (
            int(line.split()[1]) >> 20
            for line in _lines("/proc/meminfo")
            if line.startswith("MemTotal")
        ),
        0,
    )
    return (
        f"{os.cpu_count()} x {model}, {memory} GiB, Linux {platform.release()}, Python"
        f" {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def cpu_seconds(pid: int) -> float:
    """Return the processor time that all threads of a process have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def memory_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def warm_memory(directory: Path, size_bytes: int) -> None:
    """Touch that much of the machine's memory, by writing and removing a file.

    The host gives a virtual machine its memory page by page at first touch. A first touch costs 10
    us (measured here), ten times a write to the page cache. Without this, whatever runs first would
    pay for everything after it.
    """
    path = directory / "warm"
    piece = os.urandom(WARM_PIECE_BYTES)
    with path.open("wb") as file:
        for _ in range(size_bytes // WARM_PIECE_BYTES):
            file.write(piece)
    path.unlink()
