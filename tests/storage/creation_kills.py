"""Kills a process that creates a pool, before and after each of its system calls, and looks what a
later start makes of what is left.

    python -m tests.storage.creation_kills PATH [overwrite]

A program of its own, because it forks: the child dies by SIGKILL at its n-th call, for n = 1 until
it comes to its end. After each death the same pool is created anew and opened, as ``serve --pool
PATH --pool-size 8MiB`` does. Prints the number of kills, and of those that left the finished pool;
exits 1 with the reason when a later start fails or something else is left in the folder.
"""

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from storage.device import creation, is_vacant, remove_leftover
from storage.pool import Pool

SIZE_BYTES = 8 << 20
CALLS_MAX = 2000
# What a creation asks of the kernel, by the names under which the modules call it.
CALLS = (
    (os, "open"),
    (os, "close"),
    (os, "ftruncate"),
    (os, "pwritev"),
    (os, "fdatasync"),
    (os, "fsync"),
    (os, "unlink"),
    (os, "link"),
    (os, "rename"),
    (fcntl, "flock"),
    (creation, "_renameat2"),
)


def die_at(nth: int) -> None:
    """From now on this process dies at its n-th call: an odd n before the call, an even one after
    it.
    """
    count = 0

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **options)
            count += 1
            if count == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for module, name in CALLS:
        setattr(module, name, wrapped(getattr(module, name)))


def killed(path: str, nth: int, overwrite: bool) -> bool:
    """Create in a child; whether it was killed before it was done."""
    child = os.fork()
    if not child:
        die_at(nth)
        Pool.create(path, SIZE_BYTES, overwrite=overwrite)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"call {nth}: the creation failed")
    return os.WIFSIGNALED(status)


async def opens(path: str) -> str:
    """The UUID of the pool, which opens and closes."""
    pool = await Pool.open(path)
    uuid: str = pool.show()["uuid"]
    await pool.close()
    return uuid


def start(path: str) -> bool:
    """What serve does. Whether the pool had to be made."""
    made = is_vacant(path)
    if made:
        Pool.create(path, SIZE_BYTES)
    else:
        remove_leftover(path)
    asyncio.run(opens(path))
    return made


def main() -> None:
    path, overwrite = sys.argv[1], "overwrite" in sys.argv[2:]
    kills = finished = 0
    for nth in range(1, CALLS_MAX):
        before = ""
        if overwrite:
            start(path)
            before = asyncio.run(opens(path))
        if not killed(path, nth, overwrite):
            break
        kills += 1
        made = start(path)
        finished += not made
        if overwrite and made:
            raise SystemExit(
                f"call {nth}: the old pool is gone and the new one is not there: {before}"
            )
        left = os.listdir(os.path.dirname(path))
        if not overwrite:
            os.unlink(path)
        if [name for name in left if name != os.path.basename(path)] and not overwrite:
            raise SystemExit(f"call {nth}: left in the folder: {left}")
    sys.stdout.write(f"{kills} {finished}\n")


if __name__ == "__main__":
    main()
