"""The cost of hostile peers: the daemon's memory, and the latency of an honest session meanwhile.

    python -m tests.load.bench_hostile [--seconds 4] [--rounds 3] [--workers 64]
        [--addresses 32] [--only REGEX]

Daemon, flooder (tests/load/flooder.py) and the honest reader (this process) are three processes.
The reader reads random 4 KiB blocks one at a time with a short rest in between, before and during
each kind of flood. Memory is the daemon's resident set: before the first flood, the maximum during
a flood, and after it.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from daemon.iscsi.initiator import Initiator
from tests.daemon.programs import ROOT, Daemon
from tests.load.flooder import CHAP_INITIATOR, CHAP_USER, KINDS
from tests.load.measuring import machine, median, percentile, table

VDISK, VDISK_BYTES = "victim", 64 << 20
BLOCK_BYTES = 4096
SECRET = "a-secret-of-16-b"
# An honest client is not always busy, and one that never rests would mostly measure itself.
REST_SECONDS = 0.0005
# Lets the flooder start and its first burst pass, so that the steady state is measured.
SETTLE_SECONDS = 2.0
AFTER_SECONDS = 3.0


@dataclass
class Figures:
    """Figures for one kind of flood, over all rounds. Latencies in milliseconds, memory in MiB."""

    before: list[tuple[float, float]] = field(default_factory=list)
    during: list[tuple[float, float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    let_in: int = 0
    memory_before: float = 0.0
    memory_peak: float = 0.0
    memory_after: float = 0.0

    def row(self, kind: str) -> list[str]:
        """Return one line of the table."""
        quiet50, quiet99 = (median(pair[index] for pair in self.before) for index in (0, 1))
        loud50, loud99 = (median(pair[index] for pair in self.during) for index in (0, 1))
        return [
            kind,
            f"{median(self.rates):,.0f}",
            f"{self.let_in:,}",
            f"{quiet50:.2f} / {quiet99:.2f}",
            f"{loud50:.2f} / {loud99:.2f}",
            f"{loud50 / quiet50:.1f} / {loud99 / quiet99:.1f}",
            f"{self.memory_before:.0f} / {self.memory_peak:.0f} / {self.memory_after:.0f}",
        ]


HEADS = [
    "flood",
    "attempts/s",
    "let in",
    "p50 / p99 before, ms",
    "during, ms",
    "ratio",
    "MiB before / peak / after",
]


async def read_for(
    reader: Initiator, daemon: Daemon, seconds: float
) -> tuple[tuple[float, float], float]:
    """p50 and p99 of random reads in milliseconds, and the daemon's highest memory in MiB."""
    took, peak, ends = [], 0.0, time.perf_counter() + seconds
    while (begun := time.perf_counter()) < ends:
        await reader.read(random.randrange(VDISK_BYTES // BLOCK_BYTES) * BLOCK_BYTES, BLOCK_BYTES)
        took.append((time.perf_counter() - begun) * 1e3)
        if len(took) % 64 == 0:
            peak = max(peak, daemon.memory_bytes() / (1 << 20))
        await asyncio.sleep(REST_SECONDS)
    return (percentile(took, 50), percentile(took, 99)), peak


async def one_round(
    reader: Initiator, daemon: Daemon, kind: str, options: argparse.Namespace, figures: Figures
) -> None:
    """Measure, flood and measure, wait."""
    figures.before.append((await read_for(reader, daemon, options.seconds))[0])
    figures.memory_before = figures.memory_before or daemon.memory_bytes() / (1 << 20)
    arguments = ["--workers", str(options.workers), "--addresses", str(options.addresses)]
    command = [
        sys.executable,
        "-m",
        "tests.load.flooder",
        kind,
        daemon.portal,
        daemon.url(VDISK).split("/")[3],
        *arguments,
    ]
    flooder = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    await asyncio.sleep(SETTLE_SECONDS)
    begun = time.perf_counter()
    latencies, peak = await read_for(reader, daemon, options.seconds)
    flooder.send_signal(signal.SIGTERM)
    output, _ = await flooder.communicate()
    told = json.loads(output)
    figures.during.append(latencies)
    figures.rates.append(told["attempts"] / (time.perf_counter() - begun + SETTLE_SECONDS))
    figures.let_in += told["let_in"]
    figures.memory_peak = max(figures.memory_peak, peak)
    await asyncio.sleep(AFTER_SECONDS)
    figures.memory_after = daemon.memory_bytes() / (1 << 20)


async def prepared(directory: Path) -> Daemon:
    """Start a daemon with one full vdisk and one initiator that must authenticate."""
    daemon = Daemon(directory, pool_size="1GiB")
    await daemon.start()
    await daemon.ctl("vdisk", "create", VDISK, "--size", str(VDISK_BYTES))
    (directory / "secret").write_text(SECRET)
    await daemon.ctl(
        "chap",
        "set",
        CHAP_INITIATOR,
        "--user",
        CHAP_USER,
        "--secret-file",
        str(directory / "secret"),
    )
    return daemon


async def run(options: argparse.Namespace) -> None:
    """Run every kind of flood, for as many rounds as requested."""
    kinds = [kind for kind in KINDS if re.search(options.only, kind)]
    figures = {kind: Figures() for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="cleaved-hostile-") as directory:
        daemon = await prepared(Path(directory))
        host, _, port = daemon.portal.rpartition(":")
        async with await Initiator.connect(
            host, int(port), daemon.url(VDISK).split("/")[3]
        ) as reader:
            for at in range(0, VDISK_BYTES, 1 << 20):
                await reader.write(at, random.randbytes(1 << 20))
            for _ in range(options.rounds):
                for kind in kinds:
                    await one_round(reader, daemon, kind, options, figures[kind])
        await daemon.stop()
    print(f"{machine()}; {options.workers} at a time from {options.addresses} addresses")
    print(table(HEADS, [figures[kind].row(kind) for kind in kinds]))


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--addresses", type=int, default=32)
    parser.add_argument("--only", default="")
    uvloop.run(run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
