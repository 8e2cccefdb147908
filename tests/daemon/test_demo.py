"""The demo, small: it ends well, and it notices what is wrong."""

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from daemon import demo
from daemon.iscsi.initiator import Initiator
from daemon.iscsi.listener import IscsiListener
from daemon.process.addresses import Address
from daemon.targets.directory import Targets
from daemon.targets.names import TARGET_PREFIX
from tests.daemon.fakes import MemoryPool
from tests.daemon.programs import run

MIB = 1 << 20


@pytest.fixture
def pool() -> MemoryPool:
    return MemoryPool(disk=2 * MIB)


@pytest_asyncio.fixture
async def disk(pool: MemoryPool) -> AsyncIterator[Initiator]:
    listener = IscsiListener(Targets(pool, None), connections_max=1)
    await listener.listen(Address("127.0.0.1", 0))
    host, port = listener.addresses[0]
    async with await Initiator.connect(host, port, f"{TARGET_PREFIX}disk") as found:
        yield found
    await listener.stop(1)


async def test_the_demo_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = await run(sys.executable, "-m", "daemon.demo", "--size", "16MiB")
    assert result.status == 0, result
    assert "All of it held." in result.output
    for shown in (
        "snapshot golden@v1",
        "split, copy mode",
        "pool check after the split",
        "every byte after a restart",
    ):
        assert shown in result.output
    assert os.listdir(tmp_path) == []


async def test_a_wrong_size_is_usage() -> None:
    result = await run(sys.executable, "-m", "daemon.demo", "--size", "1000")
    assert result.status == 2
    assert "1MiB" in result.messages


async def test_a_machine_without_room_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.run(1 << 60) == 1
    assert "are needed; set TMPDIR, or --size" in capsys.readouterr().out


async def test_a_byte_that_differs_is_found(disk: Initiator, pool: MemoryPool) -> None:
    data = demo.seeded_data("test", 2 * MIB)
    await demo.write_all(disk, data)
    await demo.verify_all(disk, data, "the disk")
    pool.volumes["disk"].data[MIB + 5] ^= 1
    with pytest.RaisesGroup(
        pytest.RaisesExc(demo.DemoFailed, match=f"the disk: bytes {MIB} to {2 * MIB}")
    ):
        await demo.verify_all(disk, data, "the disk")


async def test_the_load_finds_a_byte_that_differs(disk: Initiator, pool: MemoryPool) -> None:
    load = demo.Load(disk, bytearray(2 * MIB))
    pool.volumes["disk"].data[:] = b"x" * 2 * MIB
    with pytest.raises(demo.DemoFailed, match="during the split"):
        await load.work(0)
