"""How much a device may leave dirty in the page cache before a writer could be made to wait.

The kernel starts to write back in the background at ``vm.dirty_background_*`` and makes writers
sleep (balance_dirty_pages) halfway between that and ``vm.dirty_*``; both are shared by all
processes of the machine. A ratio is of the memory that could be dirty: what is free and what the
page cache holds, for which ``MemAvailable`` is a close lower bound.
"""

import logging
from pathlib import Path

LOG = logging.getLogger(__name__)

PROC = Path("/proc")
# Of the background limit: three quarters stay for other processes, and for the writes that go on
# while a sync is under way.
SHARE = 4
# A burst of this much takes ten seconds of sync on a slow disk (100 MB/s): more dirty data would
# make flushes late instead.
DIRTY_BYTES_MAX = 1 << 30
# What a machine of 1 GiB that is half used has by the rule above; less would send every second
# batch to the threads.
DIRTY_BYTES_MIN = 16 << 20


def dirty_inline_bytes_max(proc: Path = PROC) -> int:
    """The current limit in bytes. Where /proc does not tell, DIRTY_BYTES_MIN."""
    try:
        background_bytes = _background_bytes(proc)
    except (OSError, ValueError, LookupError) as error:
        LOG.info("the kernel's limits of dirty memory are not known: %s", error)
        return DIRTY_BYTES_MIN
    return max(DIRTY_BYTES_MIN, min(DIRTY_BYTES_MAX, background_bytes // SHARE))


def _background_bytes(proc: Path) -> int:
    """Dirty bytes at which the kernel begins to write back. Of the two settings the one that is not
    0 holds (proc_sys_vm(5)).
    """
    fixed = int((proc / "sys/vm/dirty_background_bytes").read_text())
    if fixed:
        return fixed
    return _available_bytes(proc) * int((proc / "sys/vm/dirty_background_ratio").read_text()) // 100


def _available_bytes(proc: Path) -> int:
    lines = dict(
        line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line
    )
    return int(lines["MemAvailable"].split()[0]) * 1024
