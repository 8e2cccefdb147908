"""What all benches share: statistics, tables, and a word about the machine they ran on."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

# Written in pieces, so that the page cache gets pages of its own and not a huge buffer's.
WARM_PIECE_BYTES = 1 << 20
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of all lie (nearest rank). 0 for no values."""
    if not values:
        return 0.0
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, aligned for people too."""
    cells = [list(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def machine() -> str:
    """One line: what the figures were taken on, and how busy it was."""
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
    """Processor time that all threads of a process have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def memory_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def warm_memory(directory: Path, size_bytes: int) -> None:
    """Have the machine touch that much of its memory, by a file that is written and removed.

    A virtual machine gets its memory from the host page by page at first touch, which costs 10 us
    each (measured here), ten times what a write to the page cache costs. Whoever came first would
    pay for all who come later.
    """
    path = directory / "warm"
    piece = os.urandom(WARM_PIECE_BYTES)
    with path.open("wb") as file:
        for _ in range(size_bytes // WARM_PIECE_BYTES):
            file.write(piece)
    path.unlink()
