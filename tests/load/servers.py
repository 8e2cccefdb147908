"""The servers under comparison, each in its own process on the loopback interface, serving one disk
with the same bytes.
"""

import asyncio
import os
import signal
import socket
from pathlib import Path

from tests.daemon.programs import ROOT, Daemon, run, succeed

START_SECONDS_MAX = 10.0
CONTROL_PORT_MAX = 1 << 15
VDISK = "bench"


class CleavedServer:
    """cleaved on a pool file, with one vdisk. Use as an asynchronous context."""

    name = "cleaved"

    def __init__(self, directory: Path, disk_bytes: int) -> None:
        self.daemon = Daemon(directory, pool_size=f"{max(disk_bytes * 8 >> 30, 8)}GiB")
        self._disk_bytes = disk_bytes

    async def __aenter__(self) -> "CleavedServer":  # noqa: PYI034 -- never subclassed
        await self.daemon.start()
        await self.daemon.ctl("vdisk", "create", VDISK, "--size", str(self._disk_bytes))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.daemon.stop()

    @property
    def pid(self) -> int:
        return self.daemon.pid

    @property
    def url(self) -> str:
        return self.daemon.url(VDISK)


class TgtServer:
    """Linux SCSI target framework (tgtd) on an ordinary file; needs root. Use as an asynchronous
    context.
    """

    name = "tgt"
    target = "iqn.2026-01.io.cleaved.bench:tgt"

    def __init__(self, directory: Path, disk_bytes: int) -> None:
        self._path = directory / "tgt.raw"
        self._log = directory / "tgt.log"
        self._disk_bytes = disk_bytes
        self._port = free_port()
        # tgtd's control port is a number within a socket's name. We use our own number, so that no
        # other tgtd is touched.
        self._control_port = str(os.getpid() % CONTROL_PORT_MAX)
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> "TgtServer":  # noqa: PYI034 -- never subclassed
        with self._path.open("wb") as file:
            file.truncate(self._disk_bytes)
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                "tgtd",
                "-f",
                "-C",
                self._control_port,
                "--iscsi",
                f"portal=127.0.0.1:{self._port}",
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )
        await self._wait_ready()
        await self._admin("new", "target", "-T", self.target)
        await self._admin("new", "logicalunit", "--lun", "1", "-b", str(self._path))
        await self._admin("bind", "target", "-I", "ALL")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGKILL)  # no clean shutdown while a target is bound
        await self._process.wait()

    async def _wait_ready(self) -> None:
        until = asyncio.get_running_loop().time() + START_SECONDS_MAX
        while (
            await run("tgtadm", "-C", self._control_port, "--mode", "system", "--op", "show")
        ).status != 0:
            if asyncio.get_running_loop().time() > until:
                raise RuntimeError(f"tgtd does not start: {self._log.read_text()}")
            await asyncio.sleep(0.1)

    async def _admin(self, operation: str, mode: str, *options: str) -> None:
        await succeed(
            "tgtadm",
            "-C",
            self._control_port,
            "--lld",
            "iscsi",
            "--op",
            operation,
            "--mode",
            mode,
            "--tid",
            "1",
            *options,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        return f"iscsi://127.0.0.1:{self._port}/{self.target}/1"


def free_port() -> int:
    """Return an unused TCP port on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
