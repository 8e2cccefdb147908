"""EXTENDED COPY between vdisks of a real pool, over iSCSI: the copy shares its blocks, and from
then on the two go their own ways.
"""

import os
from pathlib import Path

from daemon.iscsi.initiator import Initiator
from tests.daemon.copier import DESTINATION, SOURCE, Copier, two_disks, used_bytes
from tests.daemon.programs import Daemon

MIB = 1 << 20
DISK_BYTES = 96 * MIB
DATA_BYTES = 64 * MIB
# Pointer blocks of the destination, a block for each MiB and a few above them, and the share map's.
METADATA_BYTES_MAX = 2 * MIB


async def filled(client: Copier, data: bytes) -> None:
    for at in range(0, len(data), MIB):
        await client.write(at, data[at : at + MIB])
    await client.flush()


async def content(client: Copier, lun: int, offset: int, size: int) -> bytes:
    found = b""
    for at in range(offset, offset + size, MIB):
        sectors = min(MIB, offset + size - at) >> 9
        cdb = (
            bytes((0x28, 0))
            + (at >> 9).to_bytes(4, "big")
            + b"\0"
            + sectors.to_bytes(2, "big")
            + b"\0"
        )
        found += bytes(await client.command(cdb, lun=lun, read_bytes=sectors << 9))
    return found


async def test_whole_blocks_are_shared_and_the_rest_is_copied(tmp_path: Path) -> None:
    data = os.urandom(16 * MIB) + bytes(16 * MIB) + os.urandom(DATA_BYTES - 32 * MIB)
    daemon = Daemon(tmp_path, pool_size="512MiB")
    async with daemon:
        async with await two_disks(daemon, DISK_BYTES) as client:
            await filled(client, data)
            before = await used_bytes(daemon)
            await client.copy(DATA_BYTES)
            assert await content(client, DESTINATION, 0, DATA_BYTES) == data
            assert await used_bytes(daemon) - before <= METADATA_BYTES_MAX
            # By sectors, to where blocks do not lie alike: its data move.
            await client.copy(4 * MIB - 512, 512, DATA_BYTES + 1024)
            assert (
                await content(client, DESTINATION, DATA_BYTES + 1024, 4 * MIB - 512)
                == data[512 : 4 * MIB]
            )
            await client.write(0, bytes(MIB))
            await client.unmap(8 * MIB, MIB)
            assert await content(client, DESTINATION, 0, 16 * MIB) == data[: 16 * MIB]
            changed = await content(client, SOURCE, 0, 16 * MIB)
            assert (
                changed == bytes(MIB) + data[MIB : 8 * MIB] + bytes(MIB) + data[9 * MIB : 16 * MIB]
            )
        assert (await daemon.ctl("pool", "check", "--verify-data"))["errors"] == []
        await daemon.ctl("target", "unmap", "copying", "source")
        await daemon.ctl("vdisk", "rm", "source")
        await daemon.stop()
        await daemon.start()
        host, _, port = daemon.portal.rpartition(":")
        async with await Initiator.connect(
            host, int(port), daemon.url("destination").split("/")[3]
        ) as alone:
            for at in range(0, DATA_BYTES, MIB):
                assert bytes(await alone.read(at, MIB)) == data[at : at + MIB]
        assert (await daemon.ctl("pool", "check", "--verify-data"))["errors"] == []
