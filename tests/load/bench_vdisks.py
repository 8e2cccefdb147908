"""A hundred thousand vdisks in one pool: create, list, memory, restart.

python -m tests.load.bench_vdisks [--vdisks 100000] [--in-flight 64]
"""

import argparse
import asyncio
import socket
import sys
import tempfile
import time
from pathlib import Path

from daemon.admin.client import ControlClient
from protocol.control.client import ClientConnection
from protocol.control.frames import Response
from tests.daemon.programs import CLEAVECTL, Daemon, succeed
from tests.load.measuring import machine, memory_bytes, table

MIB = 1 << 20
SIZE_BYTES = 64 << 30
RECEIVE_BYTES = 1 << 18


def create_pipelined(control_path: Path, count: int, in_flight: int) -> float:
    """Return the seconds to create ``count`` vdisks over one connection with ``in_flight``
    unanswered requests.
    """
    connection = ClientConnection()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.connect(str(control_path))
        control.sendall(connection.hello("bench")[1])
        sent, answered = 0, -1  # hello's answer is the first
        started = time.perf_counter()
        while answered < count:
            wanted = min(count, answered + in_flight) - sent
            if wanted > 0:
                names = range(sent, sent + wanted)
                requests = (
                    connection.request(
                        "vdisk.create", {"name": f"vdisk-{n:06}", "size_bytes": SIZE_BYTES}
                    )[1]
                    for n in names
                )
                control.sendall(b"".join(requests))
                sent += wanted
            for message in connection.receive(control.recv(RECEIVE_BYTES)):
                if isinstance(message, Response):
                    if message.error is not None:
                        sys.exit(f"a create failed: {message.error}")
                    answered += 1
        return time.perf_counter() - started


def timed(control: ControlClient, method: str, **params: object) -> float:
    started = time.perf_counter()
    control.call(method, **params)
    return time.perf_counter() - started


async def measure(directory: Path, count: int, in_flight: int) -> None:
    daemon = Daemon(directory, pool_size="16GiB")
    await daemon.start()
    rows: list[tuple[str, str]] = [
        ("memory of the daemon, no vdisk", f"{memory_bytes(daemon.pid) / MIB:.0f} MiB")
    ]
    try:
        seconds = await asyncio.to_thread(create_pipelined, daemon.control_path, count, in_flight)
        rows.append(
            (
                f"create, {in_flight} requests in flight",
                f"{count / seconds:,.0f} per second ({seconds:.1f} s)",
            )
        )
        with ControlClient(str(daemon.control_path)) as control:
            alone = timed(control, "vdisk.create", name="one-more", size_bytes=SIZE_BYTES)
            rows.append(("create of one more, alone", f"{alone * 1e3:.1f} ms"))
            rows.append(("vdisk.ls over the control socket", f"{timed(control, 'vdisk.ls'):.2f} s"))
            rows.append(
                (
                    "vdisk.show of one",
                    f"{timed(control, 'vdisk.show', name='vdisk-000777') * 1e3:.1f} ms",
                )
            )
        rows.append(
            (
                "memory of the daemon after creating and listing",
                f"{memory_bytes(daemon.pid) / MIB:.0f} MiB",
            )
        )
        started = time.perf_counter()
        await succeed(
            sys.executable,
            "-c",
            CLEAVECTL,
            "--control",
            str(daemon.control_path),
            "-o",
            "json",
            "vdisk",
            "ls",
        )
        rows.append(
            (
                "`cleavectl -o json vdisk ls`, the whole program",
                f"{time.perf_counter() - started:.2f} s",
            )
        )
    finally:
        await daemon.stop()
    started = time.perf_counter()
    await daemon.start()
    rows.append(("restart: from exec to the ready line", f"{time.perf_counter() - started:.2f} s"))
    rows.append(
        ("memory of the daemon after the restart", f"{memory_bytes(daemon.pid) / MIB:.0f} MiB")
    )
    await daemon.stop()
    print(f"{machine()}\n\n### {count:,} vdisks in one pool\n")
    print(table(("what", "figure"), rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--vdisks", type=int, default=100_000)
    parser.add_argument(
        "--in-flight",
        type=int,
        default=64,
        help="unanswered requests; the daemon allows 64 per connection",
    )
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        asyncio.run(measure(Path(directory), options.vdisks, options.in_flight))


if __name__ == "__main__":
    main()
