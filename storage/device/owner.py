"""Who has a pool open: a record in its superblock, written at the open and cleared at an orderly
close.

It is no lock between machines, for nobody can tell from here whether a process elsewhere still
runs. On this machine it can be told, by boot ID, PID namespace, and process ID with start time,
which no later process shares (docs/operations.md, "One daemon for each pool").
"""

import os
import time
from dataclasses import dataclass

from storage.layout import OWNER, OWNER_HOST_BYTES_MAX

NO_BOOT = bytes(16)


@dataclass(frozen=True)
class Owner:
    """One process on one boot of one machine. ``start_ticks`` is its start in clock ticks since
    that boot (proc(5), stat).
    """

    opened_ns: int
    boot_id: bytes
    pid: int
    start_ticks: int
    pid_namespace: int
    host: str

    @classmethod
    def of_this_process(cls) -> "Owner":
        """This process."""
        pid = os.getpid()
        return cls(
            time.time_ns(),
            _boot_id(),
            pid,
            _start_ticks(pid),
            _pid_namespace(),
            os.uname().nodename,
        )

    def encode(self) -> bytes:
        """The record's bytes."""
        host = self.host.encode()[:OWNER_HOST_BYTES_MAX]
        return OWNER.pack(
            self.opened_ns, self.boot_id, self.pid, 0, self.start_ticks, self.pid_namespace, host
        )

    @property
    def is_alive(self) -> bool:
        """Another process of this machine, which is known to run. False where that
        cannot be told.
        """
        here = Owner.of_this_process()
        return (
            self.shares_boot_with(here)
            and self.pid != here.pid
            and self.start_ticks != 0
            and self.start_ticks == _start_ticks(self.pid)
        )

    def shares_boot_with(self, other: "Owner") -> bool:
        """Both are of one boot of one machine, and of one PID namespace: whether one of them is
        alive, the other one can tell.
        """
        return self.boot_id != NO_BOOT and (self.boot_id, self.pid_namespace) == (
            other.boot_id,
            other.pid_namespace,
        )


def decode_owner(block: bytes | bytearray, offset_bytes: int) -> Owner | None:
    """The record at that offset, or None: nobody."""
    opened_ns, boot_id, pid, _, start_ticks, pid_namespace, host = OWNER.unpack_from(
        block, offset_bytes
    )
    if not opened_ns:
        return None
    return Owner(
        opened_ns,
        boot_id,
        pid,
        start_ticks,
        pid_namespace,
        host.rstrip(b"\0").decode(errors="replace"),
    )


def _boot_id() -> bytes:
    text = _proc("sys/kernel/random/boot_id").strip().replace("-", "")
    return bytes.fromhex(text) if len(text) == 2 * len(NO_BOOT) else NO_BOOT


def _start_ticks(pid: int) -> int:
    """Field 22 of proc(5), stat; 0: no such process, it cannot be seen, or it is dead and only not
    waited for yet (a zombie).

    The name before it may hold blanks and parentheses.
    """
    fields = _proc(f"{pid}/stat").rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 and fields[0] not in "ZXx" else 0


def _pid_namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0  # no /proc: nothing can be told of anybody


def _proc(name: str) -> str:
    try:
        with open(f"/proc/{name}", encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
