"""`cleavectl pool scrub`, against a daemon of its own process, on a pool with a block that rotted
while nobody served it.
"""

from pathlib import Path

from daemon.iscsi.initiator import Initiator
from storage.layout import BLOCK_BYTES
from tests.daemon.programs import Daemon

PATTERN = b"rot"


async def write_pattern(daemon: Daemon) -> None:

    host, _, port = daemon.portal.rpartition(":")
    async with await Initiator.connect(host, int(port), "iqn.2026-01.io.cleaved:disk") as initiator:
        await initiator.write(5 * BLOCK_BYTES, (PATTERN * BLOCK_BYTES)[:BLOCK_BYTES], fua=True)


async def test_scrub_names_the_damage(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    async with daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "16MiB")
        await write_pattern(daemon)
        await daemon.ctl("snapshot", "create", "disk@before")
        assert (await daemon.ctl("pool", "scrub", "--wait", "--max-rate", "1GiB/s"))[
            "damages"
        ] == []
    with daemon.pool_path.open("r+b") as pool:
        at = pool.read().index((PATTERN * BLOCK_BYTES)[:BLOCK_BYTES])
        pool.seek(at + 100)
        pool.write(b"\0")
    async with daemon:
        missing = await daemon.try_ctl("pool", "scrub", "--show")
        assert missing.status == 3, missing
        found = await daemon.try_ctl(
            "-o", "json", "pool", "scrub", "--wait", "--max-rate", "1GiB/s"
        )
        assert found.status == 1, found
        shown = await daemon.ctl("pool", "scrub", "--show")
        damages = {
            (damage["where"], damage["offset_bytes"], damage["vbn"]) for damage in shown["damages"]
        }
        assert damages == {
            ("disk", 5 * BLOCK_BYTES, at // BLOCK_BYTES),
            ("disk@before", 5 * BLOCK_BYTES, at // BLOCK_BYTES),
        }
        assert shown["state"] == "done" and shown["percent"] == 100.0
        assert (await daemon.ctl("pool", "scrub", "--cancel"))["state"] == "done"
    assert any(event["event"] == "scrub.damaged" for event in daemon.events())
