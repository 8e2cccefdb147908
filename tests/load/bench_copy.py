"""EXTENDED COPY through iSCSI between two vdisks of one pool: the time and space taken by whole
blocks, which are copied by reference.

python -m tests.load.bench_copy [--disk-mib 1024] [--rounds 3]
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from tests.daemon.copier import two_disks, used_bytes
from tests.daemon.programs import Daemon
from tests.load.measuring import machine, median, table, warm_memory

MIB = 1 << 20


async def measure(options: argparse.Namespace) -> list[list[str]]:
    """Fill, then copy several times; rows of the table."""
    size, rows = options.disk_mib * MIB, []
    with tempfile.TemporaryDirectory(prefix="cleaved-copy-") as directory:
        warm_memory(Path(directory), size + (512 << 20))
        daemon = Daemon(Path(directory), pool_size=f"{options.disk_mib * 4}MiB")
        await daemon.start()
        async with await two_disks(daemon, size) as client:
            for at in range(0, size, MIB):
                await client.write(at, random.randbytes(MIB))
            await client.flush()
            before, took = await used_bytes(daemon), []
            for _ in range(options.rounds):
                begun = time.perf_counter()
                await client.copy(size)
                took.append((time.perf_counter() - begun) * 1e3)
            rows.append([f"EXTENDED COPY of {options.disk_mib} MiB, first", f"{took[0]:.0f} ms"])
            rows.append(["again over the first, median", f"{median(took[1:] or took):.0f} ms"])
            rows.append(
                [
                    "space that the copy takes",
                    f"{(await used_bytes(daemon) - before) / MIB:.1f} MiB",
                ]
            )
        errors = (await daemon.ctl("pool", "check", "--verify-data"))["errors"]
        assert not errors, errors
        await daemon.stop()
    return rows


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--disk-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    rows = uvloop.run(measure(parser.parse_args()))
    print(machine())
    print(table(["what", "figure"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
