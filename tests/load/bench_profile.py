"""Where the daemon's time goes, per I/O: py-spy samples the event loop thread while a real client
runs one workload.

    python -m tests.load.bench_profile [--only PATTERN] [--rows 12]

Needs py-spy (pip install py-spy) and root, or permission to trace processes. A function's own time
includes its system calls: ``try_readv`` is preadv, ``try_writev`` is pwritev, ``_send`` is sendmsg.
The work of uvloop itself (epoll, recv) counts as "event loop".
"""

import argparse
import asyncio
import collections
import re
import shutil
import sys
import tempfile
from pathlib import Path

from tests.daemon.programs import run
from tests.load.bench_targets import WORKLOADS, Workload, fill, make_source
from tests.load.measuring import cpu_seconds, machine, table, warm_memory
from tests.load.servers import CleavedServer

SAMPLES_PER_SECOND = 200
# Sampling starts after the client has logged in and ends before it finishes.
SETTLE_SECONDS = 0.5
PY_SPY = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
FRAME = re.compile(r"(?P<function>.+) \((?P<file>[^:]+)(:\d+)?\)$")
SYSTEM_CALLS = {
    "DescriptorDevice.try_readv": "preadv (page cache hit)",
    "DescriptorDevice.try_writev": "pwritev (page cache)", "IscsiProtocol._send": "sendmsg",
    "Runner.run": "event loop: epoll, recv, idle",
}  # fmt: skip


def where(frame: str) -> str:
    """Return a frame's function and file, without the line; system calls by their name."""
    found = FRAME.match(frame)
    if found is None:
        return frame
    name = SYSTEM_CALLS.get(found["function"])
    return name if name is not None else f"{found['function']} ({found['file']})"


def own_times(samples: str) -> collections.Counter[str]:
    """Count samples by innermost frame, of the event loop thread only (the I/O threads' stacks
    begin in threading.py).
    """
    own: collections.Counter[str] = collections.Counter()
    for line in samples.splitlines():
        stack, _, count = line.rpartition(" ")
        if "(threading.py" not in stack:
            own[where(stack.rpartition(";")[2])] += int(count)
    return own


async def profile(
    server: CleavedServer, workload: Workload, seconds: float, directory: Path
) -> tuple[float, float, collections.Counter[str]]:
    """Return operations per second and processor time per I/O without the profiler, then the
    profile of a second run.
    """
    cpu = cpu_seconds(server.pid)
    operations, passed = await workload.run(server.url, seconds)
    used = (cpu_seconds(server.pid) - cpu) / operations * 1e6
    client = asyncio.create_task(workload.run(server.url, seconds + 2 * SETTLE_SECONDS))
    await asyncio.sleep(SETTLE_SECONDS)
    raw = directory / "samples"
    assert PY_SPY is not None
    sampled = await run(
        PY_SPY, "record", "--pid", str(server.pid), "--duration", str(max(1, int(seconds / 2))),
        "--rate", str(SAMPLES_PER_SECOND), "--format", "raw", "--output", str(raw),
    )  # fmt: skip
    await client
    if sampled.status != 0:
        sys.exit(f"py-spy failed: {sampled.messages}")
    return operations / passed, used, own_times(raw.read_text())


async def profile_all(
    directory: Path, only: str, rows: int, disk_bytes: int, seconds: float
) -> None:
    source = make_source(directory, disk_bytes)
    warm_memory(directory, 4 * disk_bytes)
    print(f"{machine()}\n")
    async with CleavedServer(directory, disk_bytes) as server:
        await fill(server, source)
        for workload in WORKLOADS:
            if re.search(only, workload.name):
                rate, used, own = await profile(server, workload, seconds, directory)
                whole, each = sum(own.values()) or 1, 1e6 / rate
                print(
                    f"### {workload.name}: {rate:,.0f} a second, {each:.1f} us each; {used:.1f} us"
                    " of processor time\n"
                )
                shares = [
                    (name, f"{100 * count / whole:.1f} %", f"{each * count / whole:.2f}")
                    for name, count in own.most_common(rows)
                ]
                print(table(("own time in", "share", "us per I/O"), shares) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="a pattern that the workload's name must match")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--disk-mib", type=int, default=1024)
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    if PY_SPY is None:
        print("skipped: this bench needs py-spy (pip install py-spy)")  # `make bench` continues
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        asyncio.run(
            profile_all(
                Path(directory), options.only, options.rows, options.disk_mib << 20, options.seconds
            )
        )


if __name__ == "__main__":
    main()
