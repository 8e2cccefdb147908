"""Which signals stop the daemon, and that none that a person, an init or a terminal sends ends it
without a consistency point.
"""

import asyncio
import os
import pty
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from daemon.process import signals
from tests.daemon.programs import CLEAVED, ROOT, Daemon
from tests.daemon.test_end_to_end import connect

# signal(7), Linux: those whose default is to end the process, without faults of the process itself,
# and without those that Python ignores.
ENDING = {
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
    signal.SIGTERM, signal.SIGSTKFLT, signal.SIGXCPU, signal.SIGVTALRM, signal.SIGPROF,
    signal.SIGIO, signal.SIGPWR, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
}  # fmt: skip


def test_every_signal_that_would_end_the_process_is_decided_on() -> None:
    assert set(signals.STOPPING | signals.IGNORED) == ENDING
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        assert signal.getsignal(number) is signal.SIG_IGN


def test_all_of_them_are_taken_over() -> None:
    loop = Loop()
    # These tests may run under nohup, or in the background of a shell.
    ignored = [one for one in signals.STOPPING if signal.getsignal(one) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        signals.take_over(cast("asyncio.AbstractEventLoop", loop), loop.stopped_by.append)
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
    assert loop.handlers.keys() == signals.STOPPING | signals.IGNORED
    for number in signals.STOPPING:
        handler, argument = loop.handlers[number]
        handler(argument)
    assert len(set(loop.stopped_by)) == len(signals.STOPPING)


class Loop:
    """Records handlers."""

    def __init__(self) -> None:
        self.handlers: dict[int, tuple[Callable[[str], None], str]] = {}
        self.stopped_by: list[str] = []

    def add_signal_handler(self, sig: int, callback: Callable[[str], None], *args: str) -> None:
        self.handlers[sig] = (callback, args[0])


async def write(daemon: Daemon) -> None:
    """A write that is acknowledged and not flushed."""
    await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
    async with await connect(daemon, "a") as disk:
        await disk.write(0, b"\x5a" * 4096)


async def stopped_in_order(daemon: Daemon) -> bool:
    """The next start finds a clean pool: nothing was left to replay."""
    names = [event["event"] for event in daemon.events()]
    assert names[-3:] == ["daemon.stopping", "pool.closed", "daemon.stopped"], daemon.log()
    await daemon.start()
    opened = [event for event in daemon.events() if event["event"] == "pool.opened"]
    async with await connect(daemon, "a") as disk:
        assert bytes(await disk.read(0, 4096)) == b"\x5a" * 4096
    return bool(opened[-1]["records_replayed"] == 0)


@pytest.mark.parametrize(
    "number",
    [signal.SIGHUP, signal.SIGQUIT, signal.SIGPWR, signal.SIGALRM, signal.SIGRTMAX],
    ids=signals.name_of,
)
async def test_a_signal_that_would_end_the_process_stops_it_in_order(
    tmp_path: Path, number: int
) -> None:
    """SIGHUP (a terminal that is closed) and others ended the daemon at once, without a consistency
    point.
    """
    async with Daemon(tmp_path) as daemon:
        await write(daemon)
        assert await daemon.stop(number) == 0
        assert daemon.events()[-3]["signal"] == signals.name_of(number)
        assert await stopped_in_order(daemon)


async def test_ctrl_c_twice_is_no_kill(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await write(daemon)
        for _ in range(2):
            os.kill(daemon.pid, signal.SIGINT)
        assert await daemon.stop(signal.SIGINT) == 0
        assert await stopped_in_order(daemon)


async def test_signals_that_mean_something_else_to_others_do_not_stop_disks(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        for number in (*signals.IGNORED, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGWINCH):
            os.kill(daemon.pid, number)
        await write(daemon)
        ignored = {
            event["signal"] for event in daemon.events() if event["event"] == "signal.ignored"
        }
        assert ignored == {"SIGUSR1", "SIGUSR2"}


async def test_nohup_is_respected(tmp_path: Path) -> None:
    async with Daemon(tmp_path, under=("nohup",)) as daemon:
        os.kill(daemon.pid, signal.SIGHUP)
        await write(daemon)


async def test_a_closed_terminal_stops_the_daemon_in_order(tmp_path: Path) -> None:
    """The terminal takes no more of its log, either: that must not keep it from its consistency
    point.
    """
    daemon = Daemon(tmp_path)
    master, slave = pty.openpty()
    # Its own terminal, as a shell gives it.
    program = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); {CLEAVED}"
    command = (
        sys.executable,
        "-c",
        program,
        "serve",
        "--pool",
        str(daemon.pool_path),
        "--pool-size",
        "64MiB",
        "--iscsi",
        "127.0.0.1:0",
    )
    process = await asyncio.create_subprocess_exec(
        *command,
        "--control",
        str(daemon.control_path),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=ROOT,
        start_new_session=True,
    )
    os.close(slave)
    shown = b""
    while b"daemon.ready" not in shown:
        shown += await asyncio.to_thread(os.read, master, 4096)
    daemon.portal = shown.decode().partition("cleaved ready: iscsi ")[2].partition(",")[0]
    await write(daemon)
    os.close(master)
    assert await process.wait() == 0
    async with daemon:
        opened = [event for event in daemon.events() if event["event"] == "pool.opened"]
        assert opened[-1]["records_replayed"] == 0
        async with await connect(daemon, "a") as disk:
            assert bytes(await disk.read(0, 4096)) == b"\x5a" * 4096


async def test_a_log_that_nobody_takes_stops_no_disk(tmp_path: Path) -> None:
    """`cleaved serve 2>&1 | head`: the reader has gone, and each line that is logged would be an
    error somewhere.
    """
    async with Daemon(tmp_path, log_to_nobody=True) as daemon:
        await write(daemon)
        async with await connect(daemon, "a") as disk:  # session.opened is logged within the login
            assert bytes(await disk.read(0, 4096)) == b"\x5a" * 4096


async def test_standard_descriptors_that_are_closed_are_no_pool(tmp_path: Path) -> None:
    """Started with ``2>&-`` the pool would be descriptor 2, and the log go into it."""
    options = f"--pool {tmp_path}/pool --pool-size 16MiB --iscsi 127.0.0.1:0 --control {tmp_path}/c"
    shell = f'exec "{sys.executable}" -c "{CLEAVED}" serve {options} 0>&- 2>&-'
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", shell, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    assert (await process.stdout.readline()).startswith(b"cleaved ready")
    descriptors = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (0, 2)]
    assert descriptors == [os.devnull, os.devnull]
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0
