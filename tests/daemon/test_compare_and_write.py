"""COMPARE AND WRITE on a clone while it is split: counters that several sessions raise lose no
step, whatever the split does under them.
"""

import asyncio
import os
import random
from pathlib import Path

from protocol.iscsi.initiator.task import CommandFailed
from tests.daemon.copier import Copier
from tests.daemon.programs import Daemon

MIB = 1 << 20
DISK_MIB = 16
COUNTERS, RAISES = 32, 40
SESSIONS = 3
MISCOMPARE = 0xE


def place(counter: int) -> int:
    """LBA of a counter: scattered, so that the split comes by while they are in use."""
    return counter * (DISK_MIB * 2048 // COUNTERS) + counter % 8


async def raise_one(client: Copier, counter: int) -> None:
    """Read, and write one more if it is still as it was read; again until that held."""
    while True:
        old = bytes(await client.read(place(counter) * 512, 512))
        new = (int.from_bytes(old[:8], "big") + 1).to_bytes(8, "big") + old[8:]
        cdb = bytes((0x89, 0)) + place(counter).to_bytes(8, "big") + bytes((0, 0, 0, 1, 0, 0))
        try:
            await client.command(cdb, data=old + new)
        except CommandFailed as error:
            if error.key != MISCOMPARE:
                raise
        else:
            return


async def raise_many(client: Copier, seed: int) -> list[int]:
    """How often each was raised."""
    chance, raised = random.Random(seed), [0] * COUNTERS
    for _ in range(RAISES):
        counter = chance.randrange(COUNTERS)
        await raise_one(client, counter)
        raised[counter] += 1
    return raised


async def counted(client: Copier) -> list[int]:
    return [
        int.from_bytes(bytes(await client.read(place(counter) * 512, 512))[:8], "big")
        for counter in range(COUNTERS)
    ]


async def test_counters_lose_no_step_while_the_clone_is_split(tmp_path: Path) -> None:
    async with Daemon(tmp_path, pool_size="128MiB") as daemon:
        host, _, port = daemon.portal.rpartition(":")
        await daemon.ctl("vdisk", "create", "golden", "--size", f"{DISK_MIB}MiB")
        async with await Copier.connect(
            host, int(port), daemon.url("golden").split("/")[3]
        ) as golden:
            for at in range(DISK_MIB):
                await golden.write(at * MIB, os.urandom(MIB))
            for counter in range(COUNTERS):
                await golden.write(place(counter) * 512, bytes(512))
        await daemon.ctl("snapshot", "create", "golden@v1")
        await daemon.ctl("clone", "create", "golden@v1", "clone")
        clients = [
            await Copier.connect(host, int(port), daemon.url("clone").split("/")[3])
            for _ in range(SESSIONS)
        ]
        await daemon.ctl("split", "start", "clone", "--max-rate", f"{DISK_MIB // 2}MiB/s")
        rounds: list[list[int]] = []
        while not rounds or (await daemon.ctl("split", "show", "clone"))["state"] != "done":
            rounds += await asyncio.gather(
                *(raise_many(client, len(rounds) + number) for number, client in enumerate(clients))
            )
        expected = [sum(column) for column in zip(*rounds, strict=True)]
        assert await counted(clients[0]) == expected
        for client in clients:
            await client.close()
        assert (await daemon.ctl("pool", "check", "--verify-data"))["errors"] == []
