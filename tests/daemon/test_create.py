"""`cleaved create`, and what `cleaved serve` makes of files and devices that hold no pool."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.programs import Daemon, cleaved
from tests.storage.device_makers import loop_device, looped

MIB = 1 << 20


@pytest.fixture
def loop_path(tmp_path: Path) -> Iterator[str]:
    """A block device of 16 MiB."""
    with loop_device(tmp_path) as made:
        yield made


def size_of(path: str) -> int:
    return os.stat(path).st_size


def names_in(folder: Path) -> list[str]:
    return os.listdir(folder)


def content_of(path: str) -> bytes:
    return Path(path).read_bytes()


class DaemonOn(Daemon):
    """On a pool of any path."""

    def __init__(self, folder: Path, pool_path: str, *options: str) -> None:
        super().__init__(folder)
        self._options = ("--pool", pool_path, *options)


async def serve(tmp_path: Path, pool: object, *options: str) -> tuple[int, str]:
    """A start that must fail."""
    listeners = (
        "--iscsi",
        "127.0.0.1:0",
        "--control",
        str(tmp_path / "c.sock"),
        "--log-format",
        "json",
    )
    result = await cleaved("serve", "--pool", str(pool), *options, *listeners)
    return result.status, result.messages


async def test_a_created_file_is_served(tmp_path: Path) -> None:
    path = str(tmp_path / "made")
    result = await cleaved("create", path, "--size", "32MiB", "-o", "json")
    assert result.status == 0, result
    made = json.loads(result.output)
    assert made["path"] == path and made["size_bytes"] == 32 * MIB
    async with DaemonOn(tmp_path, path) as daemon:
        shown = await daemon.ctl("pool", "show")
        assert (shown["uuid"], shown["size_bytes"]) == (made["uuid"], made["size_bytes"])
        for options in ((), ("--overwrite",)):
            refused = await cleaved("create", path, "--size", "32MiB", *options)
            assert refused.status == 4, refused
    assert (await cleaved("create", path, "--size", "16MiB")).status == 4
    assert (await cleaved("create", path, "--size", "16MiB", "--overwrite")).status == 0
    assert size_of(path) == 16 * MIB


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("pool",), 1, "needs a size, as in --size 64GiB"),
        (("pool", "--size", "10GB"), 2, "--size: '10GB' is not a size"),
        (("pool", "--size", "4KiB"), 2, "--size: '4KiB' is too small; at least 8MiB"),
        (("no/pool", "--size", "8MiB"), 1, "choose a folder that exists"),
        (("there", "--size", "8MiB"), 4, "holds data of an unknown kind"),
        ((), 2, "PATH|DEVICE"),
    ],
)
async def test_what_cannot_be_created_is_said_with_the_next_step(
    tmp_path: Path, arguments: tuple[str, ...], status: int, words: str
) -> None:
    (tmp_path / "there").write_bytes(b"precious")
    where = (str(tmp_path / arguments[0]),) if arguments else ()
    result = await cleaved("create", *where, *arguments[1:])
    assert result.status == status and words in result.messages, result
    assert names_in(tmp_path) == ["there"]


async def test_the_help_says_what_is_never_touched() -> None:
    result = await cleaved("create", "--help")
    assert result.status == 0
    assert all(
        words in result.output for words in ("--overwrite", "--size", "mounted", "PATH|DEVICE")
    )


@pytest.mark.parametrize("options", [(), ("--pool-size", "16MiB")], ids=["", "with a size"])
@pytest.mark.parametrize("content", [b"", bytes(16 * MIB)], ids=["empty", "zeros"])
async def test_serve_says_how_to_go_on_from_a_half_made_file(
    tmp_path: Path, content: bytes, options: tuple[str, ...]
) -> None:
    """As an interrupted creation of an older version left it."""
    path = tmp_path / "half"
    path.write_bytes(content)
    status, messages = await serve(tmp_path, path, *options)
    assert status == 1
    assert "no pool was completed in it" in messages
    assert f"cleaved create {path} --size SIZE --overwrite" in messages


async def test_serve_takes_over_from_a_creation_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / ".pool.creating").write_bytes(b"half")
    async with Daemon(tmp_path, "16MiB") as daemon:
        assert [event["event"] for event in daemon.events()][:3] == [
            "python.log",
            "pool.created",
            "pool.opened",
        ]
        assert not (tmp_path / ".pool.creating").exists()
    # A kill between link and unlink, where there is no better rename: the second name goes at the
    # next start.
    os.link(tmp_path / "pool", tmp_path / ".pool.creating")
    async with daemon:
        assert not (tmp_path / ".pool.creating").exists()


@pytest.mark.needs("loop device")
async def test_serve_makes_a_pool_on_a_blank_device(tmp_path: Path, loop_path: str) -> None:
    """Found from outside: what the README names was refused."""
    status, messages = await serve(tmp_path, loop_path)
    assert status == 1 and f"make one with `cleaved create {loop_path}`" in messages
    status, messages = await serve(tmp_path, loop_path, "--pool-size", "1GiB")
    assert status == 1 and f"{loop_path} has 16777216 bytes, fewer than 1073741824" in messages
    for _ in range(2):  # made, then found
        async with DaemonOn(tmp_path, loop_path, "--pool-size", "16MiB") as daemon:
            assert (await daemon.ctl("pool", "show"))["size_bytes"] == 16 * MIB
    assert [event["event"] for event in daemon.events()].count("pool.created") == 1


@pytest.mark.needs("loop device")
async def test_a_device_that_holds_something_is_left_alone(tmp_path: Path, loop_path: str) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", loop_path], check=True, capture_output=True)  # noqa: ASYNC221 -- takes a moment
    before = content_of(loop_path)
    status, messages = await serve(tmp_path, loop_path, "--pool-size", "16MiB")
    assert status == 1 and "it holds an ext2, ext3 or ext4 file system: check the path" in messages
    result = await cleaved("create", loop_path)
    assert result.status == 4 and f"`cleaved create {loop_path} --overwrite`" in result.messages
    assert content_of(loop_path) == before
    assert (await cleaved("create", loop_path, "--overwrite")).status == 0
    async with DaemonOn(tmp_path, loop_path):
        assert (await serve(tmp_path, loop_path))[0] == 4


@pytest.mark.needs("loop device")
async def test_a_second_daemon_on_a_loop_device_over_the_pool_is_refused(tmp_path: Path) -> None:
    async with Daemon(tmp_path, "16MiB") as daemon:
        with looped(str(daemon.pool_path)) as device:
            status, messages = await serve(tmp_path, device)
            assert status == 4
            assert (
                f"process {daemon.pid} has the pool" in messages
                and "open by another path" in messages
            )
            result = await cleaved("check", device)
            assert result.status == 4 and "--copy" in result.messages
        await daemon.ctl("vdisk", "create", "still-served", "--size", "1MiB")
        report = await daemon.ctl("pool", "check")
        assert report["ok"]


async def test_a_repaired_superblock_is_a_warning_in_the_log(tmp_path: Path) -> None:
    async with Daemon(tmp_path, "16MiB") as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
    with daemon.pool_path.open("r+b") as file:
        file.write(b"\xff" * 4096)
    async with daemon:
        (event,) = [event for event in daemon.events() if event["event"] == "superblock.repaired"]
        assert (event["level"], event["vbn"], event["reason"]) == ("warning", 0, "damaged")
