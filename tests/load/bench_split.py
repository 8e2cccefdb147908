"""Splits: speed on an idle daemon, next to QEMU's block-stream; the effect on client latency; and
the cost of ``kill -9``.

    python -m tests.load.bench_split [--disk-mib 2048] [--rounds 3] [--parts idle,load,crash]

The comparison needs qemu-utils and qemu-system-common (qemu-storage-daemon).
"""

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from daemon.admin.client import ControlClient
from tests.daemon.programs import ROOT, Daemon, succeed
from tests.load import qemu_stream
from tests.load.measuring import machine, median, table, warm_memory

POLL_SECONDS = 0.02
# Long enough for several consistency points.
PHASE_SECONDS = 10.0
# The daemon is killed at this progress.
KILL_PERCENT = 40.0
# The planned duration of the split: several consistency points, so that one is well before the
# kill.
KILLED_SPLIT_SECONDS = 30


def wait_for_split(control: ControlClient, name: str, percent: float = 100.0) -> dict[str, Any]:
    """Poll until the split is done, or at least at ``percent``."""
    while True:
        shown: dict[str, Any] = control.call("split.show", name=name)
        if shown["state"] in ("failed", "cancelled", "paused"):
            raise RuntimeError(f"the split of {name} is {shown['state']}: {shown['reason']}")
        if shown["state"] == "done" or (
            percent < 100.0 and shown["counted"] and shown["percent"] >= percent
        ):
            return shown
        time.sleep(POLL_SECONDS)


def timed_split(control: ControlClient, name: str, mode: str) -> float:
    """Return the seconds from the command to the released association. The split is durable then,
    since the release is a consistency point.
    """
    started = time.perf_counter()
    control.call("split.start", name=name, mode=mode)
    wait_for_split(control, name)
    return time.perf_counter() - started


async def filled_daemon(directory: Path, disk_mib: int) -> Daemon:
    """Start a daemon with a vdisk ``golden`` full of stamped blocks, and its snapshot ``v1``."""
    daemon = Daemon(directory, pool_size=f"{disk_mib * 8}MiB")
    await daemon.start()
    await daemon.ctl("vdisk", "create", "golden", "--size", f"{disk_mib}MiB")
    await load_program(daemon, "golden", disk_mib, "--fill")
    await daemon.ctl("snapshot", "create", "golden@v1")
    return daemon


def load_arguments(daemon: Daemon, vdisk: str, disk_mib: int) -> tuple[str, ...]:
    target = f"iqn.2026-01.io.cleaved:{vdisk}"
    return (
        sys.executable,
        "-m",
        "tests.load.random_load",
        daemon.portal,
        target,
        "--disk-mib",
        str(disk_mib),
    )


async def load_program(daemon: Daemon, vdisk: str, disk_mib: int, *options: str) -> str:
    return await succeed(*load_arguments(daemon, vdisk, disk_mib), *options)


# --- Idle -----------------------------------------------------------------------------------------


async def idle(directory: Path, disk_mib: int, rounds: int) -> None:
    """Measure copy, share and block-stream in turn."""
    base = directory / "base.raw"
    daemon = await filled_daemon(directory, disk_mib)
    has_qemu = shutil.which(qemu_stream.PROGRAM) is not None
    seconds: dict[str, list[float]] = {}
    try:
        if has_qemu:
            await succeed(
                "qemu-img", "convert", "-f", "raw", "-O", "raw", daemon.url("golden"), str(base)
            )
        with ControlClient(str(daemon.control_path)) as control:
            for number in range(rounds):
                for mode in ("copy", "share"):
                    clone = f"{mode}{number}"
                    control.call("clone.create", snapshot="golden@v1", name=clone)
                    seconds.setdefault(mode, []).append(timed_split(control, clone, mode))
                    control.call("vdisk.rm", name=clone)
                await settle(control)
                if has_qemu:
                    done, synced = await qemu_stream.stream(base, directory / "overlay.qcow2")
                    seconds.setdefault("qemu", []).append(done)
                    seconds.setdefault("qemu synced", []).append(synced)
            check = control.call("pool.check", verify_data=False)
    finally:
        await daemon.stop()
        base.unlink(missing_ok=True)
    names = {
        "copy": "cleaved, copy mode (durable when done)",
        "share": "cleaved, share mode (durable when done)",
        "qemu": "QEMU block-stream, job done",
        "qemu synced": "QEMU block-stream, and synced",
    }
    rows = [
        (names[key], f"{median(all_):.3f} s", f"{disk_mib / 1024 / median(all_):.2f} GiB/s")
        for key, all_ in seconds.items()
    ]
    print(f"### Split of a fully backed clone of {disk_mib} MiB, idle; median of {rounds}\n")
    print(table(("what", "time", "rate"), rows))
    print(f"\npool check afterwards: {'clean' if check['ok'] else check['errors']}\n")
    if not has_qemu:
        print(f"{qemu_stream.PROGRAM} is missing: apt-get install qemu-system-common\n")


async def settle(control: ControlClient) -> None:
    """Wait until deleted clones are reclaimed: freeing their blocks in the background would disturb
    the next measurement.
    """
    before = -1
    while (used := control.call("pool.show")["used_bytes"]) != before:
        before = used
        await asyncio.sleep(1.0)


# --- Under load -----------------------------------------------------------------------------------


async def loaded(directory: Path, disk_mib: int) -> None:
    """Measure latencies of 2,000 reads and 2,000 writes per second before, during and after a
    split; compare every byte.
    """
    daemon = await filled_daemon(directory, disk_mib)
    try:
        with ControlClient(str(daemon.control_path)) as control:
            control.call("clone.create", snapshot="golden@v1", name="clone")
            process = await asyncio.create_subprocess_exec(
                *load_arguments(daemon, "clone", disk_mib),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                cwd=ROOT,
            )
            assert process.stdin is not None
            await asyncio.sleep(1.0)
            process.stdin.write(b"phase before\n")
            await asyncio.sleep(PHASE_SECONDS)
            process.stdin.write(b"phase during\n")
            seconds = await asyncio.to_thread(timed_split, control, "clone", "copy")
            process.stdin.write(b"phase after\n")
            await asyncio.sleep(PHASE_SECONDS)
            output, _ = await process.communicate(b"stop\n")
            found = json.loads(output)
            backing = control.call("vdisk.show", name="clone")["backing"]
            deleted = control.call("snapshot.rm", snapshot="golden@v1")
            check = control.call("pool.check", verify_data=True)
    finally:
        await daemon.stop()
    report_load(found, disk_mib, seconds)
    print(
        f"\nbacking store afterwards: {backing}; snapshot deleted: {deleted['deleted']}; pool check"
        f" with data: {'clean' if check['ok'] else check['errors']}\n"
    )


def report_load(found: dict[str, Any], disk_mib: int, seconds: float) -> None:
    print(
        f"### Split of {disk_mib} MiB with 2,000 random reads and 2,000 random writes of 4 KiB"
        f" per second: {seconds:.1f} s ({disk_mib / seconds:.0f} MiB/s)\n"
    )
    rows = [
        (
            name,
            kind,
            *(phase[kind][key] for key in ("count", "p50_ms", "p99_ms", "p99.9_ms", "max_ms")),
        )
        for name, phase in found["phases"].items()
        if name != "start"
        for kind in ("reads", "writes")
    ]
    print(table(("split", "what", "count", "p50 ms", "p99 ms", "p99.9 ms", "max ms"), rows))
    for kind in ("reads", "writes"):
        before, during = (found["phases"][name][kind]["p99_ms"] for name in ("before", "during"))
        print(f"\np99 of {kind}: {during / before:.2f} times that without the split")
    wrong = found["wrong"]
    print(
        f"\n{found['verified_blocks']} blocks compared afterwards, all reads checked:"
        f" {wrong[:3] if wrong else 'every byte right'}"
    )


# --- kill -9 --------------------------------------------------------------------------------------


async def crash(directory: Path, disk_mib: int) -> None:
    """Kill the daemon in the middle of a split, which must resume."""
    daemon = await filled_daemon(directory, disk_mib)
    try:
        with ControlClient(str(daemon.control_path)) as control:
            control.call("clone.create", snapshot="golden@v1", name="clone")
            control.call(
                "split.start",
                name="clone",
                mode="copy",
                rate_max_bytes=disk_mib * (1 << 20) // KILLED_SPLIT_SECONDS,
            )
            before = wait_for_split(control, "clone", KILL_PERCENT)
        await daemon.stop(signal.SIGKILL)
        started = time.perf_counter()
        await daemon.start()
        with ControlClient(str(daemon.control_path)) as control:
            restart_seconds = time.perf_counter() - started
            # The holes are counted again first.
            after = wait_for_split(control, "clone", 1.0)
            wait_for_split(control, "clone")
            total = control.call("split.show", name="clone")
            check = control.call("pool.check", verify_data=True)
        found = json.loads(await load_program(daemon, "clone", disk_mib, "--verify"))
    finally:
        await daemon.stop()
    print("### kill -9 in the middle of a split\n")
    moments = (
        ("just before the kill", before),
        (f"restarted, {restart_seconds:.2f} s after it", after),
        ("at the end", total),
    )
    rows = [
        (when, shown["state"], shown["holes_remaining"], shown["percent"])
        for when, shown in moments
    ]
    print(table(("when", "state", "holes remaining", "percent"), rows))
    wrong = found["wrong"]
    print(
        f"\n{found['verified_blocks']} blocks compared:"
        f" {wrong[:3] if wrong else 'every byte right'}; pool check with data:"
        f" {'clean' if check['ok'] else check['errors']}\n"
    )


async def main_async(parts: list[str], directory: Path, disk_mib: int, rounds: int) -> None:
    print(f"{machine()}\n")
    warm_memory(directory, 4 * disk_mib << 20)
    for part in parts:
        where = directory / part
        where.mkdir()
        if part == "idle":
            await idle(where, disk_mib, rounds)
        elif part == "load":
            await loaded(where, disk_mib)
        else:
            await crash(where, disk_mib)
        shutil.rmtree(where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--disk-mib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default="idle,load,crash")
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        asyncio.run(
            main_async(options.parts.split(","), Path(directory), options.disk_mib, options.rounds)
        )


if __name__ == "__main__":
    main()
