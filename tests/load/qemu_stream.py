"""QEMU's block-stream, for comparison: copies a whole backing file into its overlay, in a separate
qemu-storage-daemon.
"""

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from tests.daemon.programs import ROOT, run, succeed

PROGRAM = "qemu-storage-daemon"
START_SECONDS_MAX = 10.0


async def stream(base: Path, overlay: Path) -> tuple[float, float]:
    """Create a qcow2 overlay over the raw file ``base``, and stream it. Return the seconds until
    the job is done, and until it is also synced.
    """
    await succeed(
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(overlay)
    )
    socket_path = overlay.with_suffix(".qmp")
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        "--blockdev",
        f"driver=qcow2,node-name=disk,file.driver=file,file.filename={overlay}",
        "--chardev",
        f"socket,id=qmp,path={socket_path},server=on,wait=off",
        "--monitor",
        "chardev=qmp",
        cwd=ROOT,
    )
    try:
        return await _run_job(socket_path, overlay)
    finally:
        process.terminate()
        await process.wait()
        await run("rm", "-f", str(overlay), str(socket_path))


async def _run_job(socket_path: Path, overlay: Path) -> tuple[float, float]:
    reader, writer = await _connect(socket_path)
    try:
        await reader.readline()  # the greeting
        await _command(reader, writer, "qmp_capabilities")
        started = time.perf_counter()
        await _command(reader, writer, "block-stream", **{"device": "disk", "job-id": "stream"})
        while True:
            message = json.loads(await reader.readline())
            if message.get("event") == "BLOCK_JOB_COMPLETED":
                break
        assert "error" not in message["data"], message
        done = time.perf_counter() - started
        await asyncio.to_thread(_sync, overlay)
        return done, time.perf_counter() - started
    finally:
        writer.close()
        await writer.wait_closed()


async def _connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    until = time.perf_counter() + START_SECONDS_MAX
    while True:
        try:
            return await asyncio.open_unix_connection(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            if time.perf_counter() > until:
                raise
            await asyncio.sleep(0.05)


async def _command(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str, **arguments: Any
) -> None:
    writer.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
    while True:
        message = json.loads(await reader.readline())
        if "return" in message:
            return
        if "error" in message:
            raise RuntimeError(f"{name}: {message['error']}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
