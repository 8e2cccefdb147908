"""A QEMU machine that runs the guest image, and a shell in it.

The guest's second serial line is QEMU's standard input and output, and a shell reads it. A command
is followed by a line that prints a mark with a number and the exit status: what came before the
mark is the command's output. The first serial line, the kernel's console, goes to a file.
"""

import asyncio
import itertools
import os
import re
from pathlib import Path
from typing import NamedTuple

from tests.guest.image import image

# A whole guest with two file systems needs far less; fio and its libraries live in the initramfs,
# so in memory, too.
MEMORY = "1G"
# Without self-tests of its ciphers and without words about each device, which init turns on again,
# it boots in two thirds of the time.
BOOT_OPTIONS = "console=ttyS0 panic=-1 quiet cryptomgr.notests mitigations=off"
# No command of a test takes longer on an emulated processor beside other work; a hang fails the
# test by this.
COMMAND_SECONDS_MAX = 180
# What a kernel says when a disk or a session did what it must not. Warnings about itself are none:
# this one's own iSCSI transport warns about its work queues at some logouts.
COMPLAINTS = re.compile(
    r".*(?:I/O error|EXT4-fs error|JBD2: .*err|XFS .*(?:[Cc]orrupt|[Ee]rror|shut)|Oops|blocked for"
    r" more than|"
    r"detected conn error|Kernel panic|Sense Key|reject).*"
)


class Reply(NamedTuple):
    status: int
    output: str


def accelerators() -> list[str]:
    """KVM where the processor virtualises in hardware and we may use it, else QEMU's own emulation.

    /dev/kvm alone says too little: there are kernels that serve it without such a processor, and do
    not get Debian's to boot.
    """
    flags = set(re.findall(r"\b(?:vmx|svm)\b", Path("/proc/cpuinfo").read_text()))
    kvm = ["-accel", "kvm"] if flags and os.access("/dev/kvm", os.R_OK | os.W_OK) else []
    return [*kvm, "-accel", "tcg"]


class Machine:
    """A running guest. Use as an asynchronous context; leaving it in order powers the guest off,
    and checks what its kernel said.

    expected: complaints of the kernel that this test provokes.
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
            # The guest's init gives the first mark itself, when the shell is about to read.
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
        """Ask for it, wait for the end, and fail on complaints of the guest's kernel."""
        _, messages = await asyncio.wait_for(
            self._process.communicate(b"exit\n"), COMMAND_SECONDS_MAX
        )
        assert self._process.returncode == 0, (
            f"QEMU exited with {self._process.returncode}: {messages.decode()}"
        )
        complaints = [line for line in self.complaints() if not self._expected.search(line)]
        assert not complaints, "\n".join(complaints)

    def console(self) -> str:
        """What the guest's kernel said so far."""
        return self._console_path.read_text(errors="replace") if self._console_path.exists() else ""

    def complaints(self) -> list[str]:
        return COMPLAINTS.findall(self.console())

    async def run(self, command: str) -> Reply:
        """Run one line of shell. It runs in the one shell of the guest, so one command at a time;
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
        """Everything up to the mark, which may stand behind output without a newline."""
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
        """Run a line of shell that must exit 0; its output."""
        reply = await self.run(command)
        assert reply.status == 0, (
            f"{command}: exit {reply.status}\n{reply.output}\n{self._console_tail()}"
        )
        return reply.output.strip()
