"""Running programs in tests: the daemon, its admin client, and real iSCSI clients."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
# No program of a test takes longer on any machine; a hang fails the test by this, never a slow
# machine.
PROGRAM_SECONDS_MAX = 180
CLEAVED = "from daemon.cli import main; main()"
CLEAVECTL = "from daemon.admin.cli import main; main()"


class Result(NamedTuple):
    status: int
    output: str
    messages: str


async def run(*command: str) -> Result:
    """Run a program to its end."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        output, messages = await asyncio.wait_for(process.communicate(), PROGRAM_SECONDS_MAX)
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    assert process.returncode is not None
    return Result(process.returncode, output.decode(), messages.decode())


async def succeed(*command: str) -> str:
    """Run a program that must exit 0; its standard output."""
    result = await run(*command)
    assert result.status == 0, f"{' '.join(command)}: {result}"
    return result.output


def limited(open_files_max: int | None) -> tuple[str, ...]:
    """What to put before a command that may open so many files only."""
    return (
        ()
        if open_files_max is None
        else ("sh", "-c", 'ulimit -n "$0" && exec "$@"', str(open_files_max))
    )


async def cleaved(*arguments: str, open_files_max: int | None = None) -> Result:
    """Run `cleaved` to its end."""
    return await run(*limited(open_files_max), sys.executable, "-c", CLEAVED, *arguments)


class Daemon:
    """A daemon of its own process on a pool in a directory. Use as an asynchronous context; leaving
    it stops the process in order.
    """

    def __init__(
        self,
        directory: Path,
        pool_size: str = "256MiB",
        options: tuple[str, ...] = (),
        open_files_max: int | None = None,
        *,
        under: tuple[str, ...] = (),
        log_to_nobody: bool = False,
    ) -> None:
        self.directory = directory
        self.pool_path = directory / "pool"
        self.control_path = directory / "control.sock"
        self._under = under
        self._log_to_nobody = log_to_nobody
        self._options = ("--pool", str(self.pool_path), "--pool-size", pool_size, *options)
        self._limited = limited(open_files_max)
        self._process: asyncio.subprocess.Process
        self.portal = ""

    async def __aenter__(self) -> "Daemon":  # noqa: PYI034 -- never subclassed
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._process.returncode is None:
            status = await self.stop()
            assert status == 0 or kind is not None, (
                f"the daemon exited with {status}:\n{self.log()}"
            )

    async def start(self, portal: str = "127.0.0.1:0") -> None:
        """Start, and wait for the ready line. Initiators that shall find it again after a restart
        need the same portal.
        """
        listeners = ("--iscsi", portal, "--control", str(self.control_path))
        command = (
            *self._under,
            *self._limited,
            sys.executable,
            "-c",
            CLEAVED,
            "serve",
            *self._options,
            *listeners,
            "--log-format",
            "json",
        )
        with self._log_file() as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=log, cwd=ROOT
            )
        assert self._process.stdout is not None
        ready = (await self._process.stdout.readline()).decode()
        assert ready.startswith("cleaved ready: "), f"{ready!r}\n{self.log()}"
        self.portal = ready.removeprefix("cleaved ready: iscsi ").partition(",")[0]

    def _log_file(self) -> BinaryIO:
        if not self._log_to_nobody:
            return (self.directory / "log").open("ab")
        reading, writing = os.pipe()
        os.close(reading)
        return os.fdopen(writing, "wb")

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end. The exit status."""
        self._process.send_signal(number)
        status = await asyncio.wait_for(self._process.wait(), PROGRAM_SECONDS_MAX)
        assert self._process.stdout is not None
        await (
            self._process.stdout.read()
        )  # to its end, so that the pipe's transport closes with the process
        return status

    async def ended(self) -> int:
        """Wait for the end that something else brings. The exit status."""
        return await asyncio.wait_for(self._process.wait(), PROGRAM_SECONDS_MAX)

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        """Everything logged so far, by all starts."""
        path = self.directory / "log"
        return path.read_text() if path.exists() else ""

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log().splitlines()]

    def url(self, vdisk: str) -> str:
        return f"iscsi://{self.portal}/iqn.2026-01.io.cleaved:{vdisk}/0"

    async def try_ctl(self, *arguments: str) -> Result:
        """Run `cleavectl`."""
        return await run(
            sys.executable, "-c", CLEAVECTL, "--control", str(self.control_path), *arguments
        )

    async def ctl(self, *arguments: str) -> Any:
        """Run a `cleavectl` command that must succeed; its JSON."""
        result = await self.try_ctl("-o", "json", *arguments)
        assert result.status == 0, f"cleavectl {' '.join(arguments)}: {result}\n{self.log()}"
        return json.loads(result.output)

    def memory_bytes(self) -> int:
        """Resident memory of the process."""
        pages = int((Path("/proc") / str(self.pid) / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
