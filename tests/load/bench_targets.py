"""cleaved against tgt: the same bytes in files on the same disk, real clients, alternating within
one run.

    python -m tests.load.bench_targets [--rounds 5] [--disk-mib 1024] [--seconds 3]

Needs root (for tgtd), and libiscsi-bin, qemu-utils, qemu-block-extra, tgt. Figures of different
rounds on a shared machine are not comparable, but the two servers within one round are. So the
ratio is taken per round, and the result is the median of the ratios.
"""

import argparse
import asyncio
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

from tests.daemon.programs import succeed
from tests.load.measuring import cpu_seconds, machine, median, table, warm_memory
from tests.load.servers import CleavedServer, TgtServer

PROGRAMS = {"iscsi-perf": "libiscsi-bin", "qemu-img": "qemu-utils qemu-block-extra", "tgtd": "tgt"}
Server = CleavedServer | TgtServer
Run = Coroutine[Any, Any, tuple[float, float]]
# The pattern that qemu-img bench writes. Not zeros, which cleaved would store as zero pointers,
# without data.
PATTERN = "165"
# A step that does not divide the disk size and skips four level-1 pointer blocks, so neighbouring
# writes share nothing.
SCATTER_BYTES = (4 << 20) + 4096
WARM_FACTOR = 6


class Measured(NamedTuple):
    operations_per_second: float
    processor_microseconds: float  # of the server, per operation


class Workload(NamedTuple):
    name: str
    unit: str
    bytes_each: int
    run: Callable[[str, float], Run]  # (url, seconds wanted) -> (operations, seconds)


async def iscsi_perf(url: str, seconds: float, depth: int, sectors: int) -> tuple[float, float]:
    """Run random reads with libiscsi's own tool."""
    whole = max(1, round(seconds))
    output = await succeed(
        "iscsi-perf", "-r", "-m", str(depth), "-b", str(sectors), "-t", str(whole), url
    )
    average = re.findall(r"iops average (\d+)", output)[-1]
    return float(average) * whole, float(whole)


async def qemu_bench(url: str, count: int, *options: str) -> tuple[float, float]:
    """Run ``count`` requests with qemu-img bench."""
    output = await succeed(
        "qemu-img", "bench", "-f", "raw", "-t", "none", "-c", str(count), *options, url
    )
    found = re.search(r"Run completed in ([\d.]+) seconds", output)
    assert found is not None, output
    return float(count), float(found[1])


def by_time(rate_guess: int, *options: str) -> Callable[[str, float], Run]:
    """Run qemu-img bench for about a given time. It takes a number of requests, so this is computed
    from ``rate_guess`` per second.
    """
    return lambda url, seconds: qemu_bench(url, round(rate_guess * seconds), *options)


WRITE = ("-w", f"--pattern={PATTERN}")
WORKLOADS = (
    # In this order: sequential reads follow sequential writes, so they read what was written in
    # sequence.
    Workload(
        "sequential writes, 256 KiB, depth 8",
        "MiB/s",
        1 << 18,
        by_time(3000, *WRITE, "-s", str(1 << 18), "-d", "8"),
    ),
    Workload(
        "sequential reads, 256 KiB, depth 8",
        "MiB/s",
        1 << 18,
        by_time(4000, "-s", str(1 << 18), "-d", "8"),
    ),
    Workload(
        "random reads, 4 KiB, depth 32 (iscsi-perf -r -m 32 -b 8)",
        "IOPS",
        4096,
        lambda u, s: iscsi_perf(u, s, 32, 8),
    ),
    Workload(
        "random reads, 4 KiB, depth 1 (iscsi-perf -r -m 1 -b 8)",
        "IOPS",
        4096,
        lambda u, s: iscsi_perf(u, s, 1, 8),
    ),
    Workload(
        "writes, 4 KiB, depth 1", "IOPS", 4096, by_time(10000, *WRITE, "-s", "4096", "-d", "1")
    ),
    Workload(
        "writes, 4 KiB, depth 32 (qemu-img bench -w -s 4096 -d 32)",
        "IOPS",
        4096,
        by_time(40000, *WRITE, "-s", "4096", "-d", "32"),
    ),
    Workload(
        "writes of zeros, 4 KiB, depth 32",
        "IOPS",
        4096,
        by_time(40000, "-w", "-s", "4096", "-d", "32"),
    ),
    Workload(
        "scattered writes, 4 KiB, depth 32",
        "IOPS",
        4096,
        by_time(40000, *WRITE, "-s", "4096", "-d", "32", "-S", str(SCATTER_BYTES)),
    ),
    Workload(
        "sequential reads of a disk written in scattered order",
        "MiB/s",
        1 << 18,
        by_time(2000, "-s", str(1 << 18), "-d", "8"),
    ),
)


async def measure(server: Server, workload: Workload, seconds: float) -> Measured:
    cpu = cpu_seconds(server.pid)
    operations, passed = await workload.run(server.url, seconds)
    used = cpu_seconds(server.pid) - cpu
    return Measured(operations / passed, used / operations * 1e6)


async def fill(server: Server, source: Path) -> None:
    """Copy the source to the server's disk, and compare."""
    await succeed("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), server.url)
    await succeed("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), server.url)


def make_source(directory: Path, disk_bytes: int) -> Path:
    """Create a file of random bytes to fill disks from."""
    source = directory / "source.raw"
    with source.open("wb") as file:
        for _ in range(disk_bytes >> 20):
            file.write(os.urandom(1 << 20))
    return source


async def compare(
    directory: Path, rounds: int, disk_bytes: int, seconds: float, names: str
) -> None:
    source = make_source(directory, disk_bytes)
    warm_memory(directory, disk_bytes * WARM_FACTOR)
    chosen = [workload for workload in WORKLOADS if re.search(names, workload.name)]
    results: dict[tuple[str, str], list[Measured]] = {}
    async with (
        CleavedServer(directory, disk_bytes) as cleaved,
        TgtServer(directory, disk_bytes) as tgt,
    ):
        for server in (cleaved, tgt):
            await fill(server, source)
        for number in range(rounds):
            for workload in chosen:
                for server in (cleaved, tgt) if number % 2 else (tgt, cleaved):
                    result = await measure(server, workload, seconds)
                    results.setdefault((workload.name, server.name), []).append(result)
            print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    report(chosen, results)


def report(chosen: list[Workload], results: dict[tuple[str, str], list[Measured]]) -> None:
    rows = []
    for workload in chosen:
        ours, theirs = results[workload.name, "cleaved"], results[workload.name, "tgt"]
        ratios = [
            mine.operations_per_second / other.operations_per_second
            for mine, other in zip(ours, theirs, strict=True)
        ]
        scale = 1 if workload.unit == "IOPS" else workload.bytes_each / (1 << 20)
        rows.append(
            (
                workload.name,
                f"{median(one.operations_per_second for one in ours) * scale:,.0f} {workload.unit}",
                (
                    f"{median(one.operations_per_second for one in theirs) * scale:,.0f}"
                    f" {workload.unit}"
                ),
                f"{median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{median(one.processor_microseconds for one in ours):.1f} us",
                f"{median(one.processor_microseconds for one in theirs):.1f} us",
            )
        )
    print(f"{machine()}\n")
    print(
        table(
            (
                "workload",
                "cleaved",
                "tgt",
                "median ratio",
                "range",
                "processor time per I/O",
                "tgt's",
            ),
            rows,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk-mib", type=int, default=1024)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="approximate time of each measurement"
    )
    parser.add_argument("--only", default="", help="a pattern that the workload's name must match")
    parser.add_argument(
        "--directory",
        type=Path,
        default=None,
        help="where the files go (default: a temporary directory)",
    )
    options = parser.parse_args()
    missing = sorted(
        {package for program, package in PROGRAMS.items() if shutil.which(program) is None}
    )
    if missing or os.geteuid() != 0:
        # `make bench` continues.
        print(
            "skipped: this bench needs root, real clients and tgt (apt-get install"
            f" {' '.join(missing)})"
        )
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        asyncio.run(
            compare(
                Path(directory),
                options.rounds,
                options.disk_mib << 20,
                options.seconds,
                options.only,
            )
        )


if __name__ == "__main__":
    main()
