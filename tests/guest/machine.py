"""A QEMU machine that runs the guest image, and a shell in it.

The guest's second serial line is QEMU's standard input and output, and a shell reads it. Each
command is followed by a line that prints a mark with a number and the exit status; the output
before the mark is that of the command. The first serial line, the kernel's console, goes to a file.
"""

import asyncio
import itertools
import os
import re
from pathlib import Path
from typing import NamedTuple

from tests.guest.image import image

# A guest with two file systems needs far less, but fio and its libraries are in the initramfs and
# so also in memory.
MEMORY = "1G"
# The guest boots in two thirds of the time without self-tests of its ciphers and without messages
# about each device; init turns the messages on again.
BOOT_OPTIONS = "console=ttyS0 panic=-1 quiet cryptomgr.notests mitigations=off"
# No test command takes longer, even on an emulated processor with other load; this limit turns a
# hang into a failure.
COMMAND_SECONDS_MAX = 180
# Kernel messages about a failing disk or session. Warnings about the kernel itself do not count:
# this kernel's iSCSI transport warns about its work queues at some logouts.
COMPLAINTS = re.compile(
    r".*(?:I/O error|EXT4-fs error|JBD2: .*err|XFS .*(?:[Cc]orrupt|[Ee]rror|shut)|Oops|blocked for"
    r" more than|"
    r"detected conn error|Kernel panic|Sense Key|reject).*"
)


class Reply(NamedTuple):
    status: int
    output: str


def accelerators() -> list[str]:
    """Return KVM if the processor supports virtualisation and we may use it, else QEMU's own
    emulation.

    The existence of /dev/kvm is not enough: some kernels provide it without such a processor, and
    then Debian's kernel does not boot.
    """
    flags = set(re.findall(r"\b(?:vmx|svm)\b", Path("/proc/cpuinfo").read_text()))
    kvm = ["-accel", "kvm"] if flags and os.access("/dev/kvm", os.R_OK | os.W_OK) else []
    return [*kvm, "-accel", "tcg"]


class Machine:
    """A running guest. Use as an asynchronous context; leaving it normally powers the guest off and
    checks its kernel's messages.

    expected: kernel complaints that this test provokes.
    """

    def __init__(self, directory: Path, expected: str = "(?!)") -> None:
        self._console_path = directory / "console"
        self._expected = re.compile(expected)
        self._numbers = itertools.count(1)
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> "Machine":  # noqa: PYI034 -- never subclassed
        self._process = await asyncio.create_subprocess_exec(
            "qemu-system-x86_64",
            *self._options(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            # The guest's init prints the first mark itself, right before the shell starts reading.
            await asyncio.wait_for(self._reply("@done 0 "), COMMAND_SECONDS_MAX)
        except BaseException:
            await self._kill()
            raise
        return self

    def _options(self) -> list[str]:
        kernel, initramfs = image()
        machine = [
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            *accelerators(),
        ]
        machine += ["-cpu", "max", "-m", MEMORY, "-kernel", str(kernel), "-initrd", str(initramfs)]
        network = [
            "-netdev",
            "user,id=network",
            "-device",
            "virtio-net-pci,netdev=network,romfile=",
        ]
        serial = [
            "-serial",
            f"file:{self._console_path}",
            "-chardev",
            "stdio,id=shell,signal=off",
            "-serial",
            "chardev:shell",
        ]
        return [*machine, *network, *serial, "-append", BOOT_OPTIONS]

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                await self._power_off()
        finally:
            await self._kill()

    async def _kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()

    async def _power_off(self) -> None:
        """Power the guest off, wait for the end, and fail on complaints of its kernel."""
        _, messages = await asyncio.wait_for(
            self._process.communicate(b"exit\n"), COMMAND_SECONDS_MAX
        )
        assert self._process.returncode == 0, (
            f"QEMU exited with {self._process.returncode}: {messages.decode()}"
        )
        complaints = [line for line in self.complaints() if not self._expected.search(line)]
        assert not complaints, "\n".join(complaints)

    def console(self) -> str:
        """Return the guest's kernel messages so far."""
        return self._console_path.read_text(errors="replace") if self._console_path.exists() else ""

    def complaints(self) -> list[str]:
        return COMPLAINTS.findall(self.console())

    async def run(self, command: str) -> Reply:
        """Run one line of shell. The guest has a single shell, so only one command runs at a time;
        "&" and "wait" work.
        """
        number = next(self._numbers)
        assert self._process.stdin is not None
        self._process.stdin.write(
            f'{{ {command}\n}} </dev/null\necho "@done {number} $?"\n'.encode()
        )
        try:
            return await asyncio.wait_for(self._reply(f"@done {number} "), COMMAND_SECONDS_MAX)
        except TimeoutError:
            raise AssertionError(f"no end of: {command}\n{self._console_tail()}") from None

    async def _reply(self, mark: str) -> Reply:
        """Return everything up to the mark, which may follow output without a newline."""
        assert self._process.stdout is not None and self._process.stderr is not None
        output = ""
        while line := (await self._process.stdout.readline()).decode(errors="replace"):
            before, found, status = line.partition(mark)
            output += before
            if found:
                return Reply(int(status), output)
        messages = (await self._process.stderr.read()).decode()
        raise AssertionError(f"the guest ended: {messages}\n{output}\n{self._console_tail()}")

    def _console_tail(self) -> str:
        return "\n".join(self.console().splitlines()[-40:])

    async def succeed(self, command: str) -> str:
        """Run a line of shell that must exit with 0; return its output."""
        reply = await self.run(command)
        assert reply.status == 0, (
            f"{command}: exit {reply.status}\n{reply.output}\n{self._console_tail()}"
        )
        return reply.output.strip()
