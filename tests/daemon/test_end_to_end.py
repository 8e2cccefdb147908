"""The daemon as a process, with real iSCSI clients and the admin client: data, restarts, crashes,
and what goes wrong.
"""

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from daemon.iscsi.initiator import Initiator
from daemon.targets.names import TARGET_PREFIX
from protocol.iscsi.initiator.task import CommandFailed
from tests.daemon.programs import Daemon, cleaved, succeed

MIB = 1 << 20


async def connect(daemon: Daemon, vdisk: str) -> Initiator:
    host, _, port = daemon.portal.rpartition(":")
    return await Initiator.connect(host, int(port), TARGET_PREFIX + vdisk)


async def checked(daemon: Daemon) -> None:
    """The live check finds nothing, checksums of all data included."""
    assert (await daemon.ctl("pool", "check", "--verify-data"))["errors"] == []


# --- Data by real clients -------------------------------------------------------------------------


@pytest.mark.client("iscsi-ls", "iscsi-inq")
async def test_iscsi_ls_and_inq_see_the_vdisks(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "golden", "--size", "1GiB")
        listed = await succeed("iscsi-ls", "-s", f"iscsi://{daemon.portal}")
        assert "iqn.2026-01.io.cleaved:golden" in listed
        assert "Size:1023M" in listed  # libiscsi rounds down from the last block's number
        inquiry = await succeed("iscsi-inq", daemon.url("golden"))
        assert "Peripheral Device Type:DIRECT_ACCESS" in inquiry


@pytest.mark.client("iscsi-perf")
async def test_iscsi_perf_reads(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "64MiB")
        output = await succeed(
            "iscsi-perf", "-t", "1", "-r", "-m", "32", "-b", "8", daemon.url("disk")
        )
        assert "iops" in output
        stats = await daemon.ctl("stats", "disk")
        assert (
            stats["read_bytes"] >= 4096 * stats["reads"] - 65536 > 0
        )  # all but the first few are of 8 sectors


@pytest.mark.client("qemu-img")
async def test_an_image_goes_in_and_out_unchanged_and_over_a_restart(tmp_path: Path) -> None:
    image = os.urandom(8 * MIB) + bytes(16 * MIB) + os.urandom(8 * MIB)
    (tmp_path / "image").write_bytes(image)
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", str(len(image)))
        await succeed(
            "qemu-img",
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            str(tmp_path / "image"),
            daemon.url("disk"),
        )
        shown = await daemon.ctl("vdisk", "show", "disk")
        assert shown["used_bytes"] == 16 * MIB  # what was zeros takes no space
        await succeed(
            "qemu-img",
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            str(tmp_path / "image"),
            daemon.url("disk"),
        )
        assert await daemon.stop() == 0
        await daemon.start()
        await succeed(
            "qemu-img",
            "convert",
            "-f",
            "raw",
            "-O",
            "raw",
            daemon.url("disk"),
            str(tmp_path / "copy"),
        )
        assert (tmp_path / "copy").read_bytes() == image
        await checked(daemon)


@pytest.mark.client("qemu-io")
async def test_patterns_of_qemu_io_survive_kill_9_when_flushed(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "64MiB")
        steps = [
            "write -P 17 0 1M",
            "write -P 34 1536 512",
            "write -P 51 8191k 3k",
            "discard 64k 64k",
            "write -z 256k 4k",
            "flush",
        ]
        await succeed(
            "qemu-io",
            "-f",
            "raw",
            *(part for step in steps for part in ("-c", step)),
            daemon.url("disk"),
        )
        await daemon.stop(signal.SIGKILL)
        await daemon.start()
        steps = [
            "read -P 17 0 1536",
            "read -P 34 1536 512",
            "read -P 17 2048 62k",
            "read -P 0 64k 64k",
            "read -P 17 128k 128k",
        ]
        steps += [
            "read -P 0 256k 4k",
            "read -P 17 260k 764k",
            "read -P 51 8191k 3k",
            "read -P 0 8194k 1M",
        ]
        output = await succeed(
            "qemu-io",
            "-f",
            "raw",
            *(part for step in steps for part in ("-c", step)),
            daemon.url("disk"),
        )
        assert "Pattern verification failed" not in output
        assert any(
            event["event"] == "pool.opened" and event["records_replayed"]
            for event in daemon.events()
        )
        await checked(daemon)


# --- The main job ---------------------------------------------------------------------------------


async def fill(daemon: Daemon, name: str, size_bytes: int) -> bytes:
    data = os.urandom(size_bytes)
    await daemon.ctl("vdisk", "create", name, "--size", str(size_bytes))
    async with await connect(daemon, name) as disk:
        for at in range(0, size_bytes, MIB):
            await disk.write(at, data[at : at + MIB])
        await disk.flush()
    return data


async def contents(daemon: Daemon, name: str) -> bytes:
    async with await connect(daemon, name) as disk:
        size_bytes = await disk.capacity_bytes()
        return b"".join([bytes(await disk.read(at, MIB)) for at in range(0, size_bytes, MIB)])


@pytest.mark.parametrize("mode", ["copy", "share"])
async def test_snapshot_clone_split_release_delete(tmp_path: Path, mode: str) -> None:
    async with Daemon(tmp_path) as daemon:
        data = await fill(daemon, "golden", 16 * MIB)
        await daemon.ctl("snapshot", "create", "golden@v1")
        created = await daemon.ctl("clone", "create", "golden@v1", "web1")
        assert created["backing"] == "golden@v1"
        async with await connect(daemon, "web1") as disk:
            await disk.write(MIB, b"mine" * 1024)
            await disk.unmap(2 * MIB, MIB)
        assert (await daemon.try_ctl("snapshot", "rm", "golden@v1")).status == 4
        assert (await daemon.ctl("split", "estimate", "web1"))["blocks_to_copy"] == (
            16 * MIB - 4096 - MIB
        ) // 4096
        split = await daemon.ctl("split", "start", "web1", "--mode", mode, "--wait")
        assert (split["state"], split["holes_remaining"], split["percent"]) == ("done", 0, 100.0)
        assert split["blocks_copied" if mode == "copy" else "blocks_shared"] > 0
        assert (await daemon.ctl("vdisk", "show", "web1"))["backing"] is None
        await daemon.ctl("snapshot", "rm", "golden@v1")
        await daemon.ctl("vdisk", "rm", "golden")
        expected = (
            data[:MIB] + b"mine" * 1024 + data[MIB + 4096 : 2 * MIB] + bytes(MIB) + data[3 * MIB :]
        )
        assert await contents(daemon, "web1") == expected
        await checked(daemon)
    result = await cleaved("check", "--verify-data", "-o", "json", str(daemon.pool_path))
    assert result.status == 0
    assert '"ok": true' in result.output


async def test_a_split_goes_on_after_kill_9_while_clients_work(tmp_path: Path) -> None:
    async with Daemon(tmp_path, pool_size="512MiB") as daemon:
        data = bytearray(await fill(daemon, "golden", 64 * MIB))
        await daemon.ctl("snapshot", "create", "golden@v1")
        await daemon.ctl("clone", "create", "golden@v1", "web1")
        started = await daemon.ctl("split", "start", "web1", "--max-rate", "16MiB/s")
        assert started["state"] == "running"
        async with await connect(daemon, "web1") as disk:
            for number in range(64):
                at = number * MIB + 8192
                data[at : at + 4096] = os.urandom(4096)
                await disk.write(at, data[at : at + 4096], fua=True)
        await daemon.stop(signal.SIGKILL)
        await daemon.start()
        shown = await daemon.ctl("split", "show", "web1")
        assert shown["state"] == "running"
        assert 0 < shown["holes_remaining"] <= 64 * MIB // 4096
        assert bytes(data) == await contents(daemon, "web1")
        while (await daemon.ctl("split", "show", "web1"))["state"] == "running":
            await asyncio.sleep(0.1)
        assert (await daemon.ctl("vdisk", "show", "web1"))["backing"] is None
        assert bytes(data) == await contents(daemon, "web1")
        await checked(daemon)


async def test_pause_resume_cancel(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await fill(daemon, "golden", 32 * MIB)
        await daemon.ctl("snapshot", "create", "golden@v1")
        await daemon.ctl("clone", "create", "golden@v1", "web1")
        await daemon.ctl("split", "start", "web1", "--max-rate", "4MiB/s")
        assert (await daemon.ctl("split", "pause", "web1"))["state"] == "paused"
        assert [split["name"] for split in await daemon.ctl("split", "ls")] == ["web1"]
        assert (await daemon.try_ctl("split", "pause", "web1")).status == 4
        assert (await daemon.ctl("split", "resume", "web1"))["state"] == "running"
        assert (await daemon.ctl("split", "cancel", "web1"))["state"] == "cancelled"
        assert (await daemon.ctl("vdisk", "show", "web1"))["backing"] == "golden@v1"
        await checked(daemon)


# --- The admin client -----------------------------------------------------------------------------


async def test_what_does_not_exist_is_3_and_what_exists_or_is_busy_is_4(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        for command in (
            *(
                "vdisk show b",
                "vdisk rm b",
                "vdisk resize b 1MiB",
                "vdisk rename b c",
                "snapshot rm a@s",
                "snapshot create b@s",
            ),
            *(
                "clone create a@s c",
                "split show a",
                "split start b",
                "stats b",
                "connect b --client qemu",
            ),
        ):
            assert (await daemon.try_ctl(*command.split())).status == 3, command
        exists = await daemon.try_ctl("vdisk", "create", "a", "--size", "1MiB")
        assert exists.status == 4
        assert "a" in exists.messages
        async with await connect(daemon, "a"):
            busy = await daemon.try_ctl("vdisk", "rm", "a")
            assert busy.status == 4
            assert (
                "iqn.2026-01.io.cleaved:initiator" in busy.messages
            )  # the message names what blocks
            (session,) = await daemon.ctl("session", "ls")
            assert (session["target"], session["initiator"]) == (
                "iqn.2026-01.io.cleaved:a",
                "iqn.2026-01.io.cleaved:initiator",
            )
        await daemon.ctl("vdisk", "rm", "a")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-a", "ä", "a@b", "a" * 201, "a\nb"])
async def test_a_bad_name_is_usage(tmp_path: Path, name: str) -> None:
    async with Daemon(tmp_path) as daemon:
        assert (await daemon.try_ctl("vdisk", "create", "--size", "1MiB", "--", name)).status == 2


async def test_the_documented_keys(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        shown = await daemon.ctl("vdisk", "show", "a")
        assert {
            "name",
            "uuid",
            "size_bytes",
            "backing",
            "used_bytes",
            "shared_bytes",
            "exclusive_bytes",
        } <= shown.keys()
        assert {"size_bytes", "used_bytes", "free_bytes", "cp_number", "read_only"} <= (
            await daemon.ctl("pool", "show")
        ).keys()
        assert {"ok", "errors"} <= (await daemon.ctl("pool", "check")).keys()
        await daemon.ctl("snapshot", "create", "a@s")
        await daemon.ctl("clone", "create", "a@s", "b", "--split")
        split = await daemon.ctl("split", "show", "b")
        wanted = {
            "state",
            "mode",
            "holes_total",
            "holes_remaining",
            "blocks_copied",
            "blocks_shared",
            "percent",
            "eta_seconds",
        }
        assert wanted <= split.keys()


async def test_a_group_of_snapshots_is_all_or_none(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        for name in ("a", "b"):
            await daemon.ctl("vdisk", "create", name, "--size", "1MiB")
        assert (await daemon.try_ctl("snapshot", "create", "a@s", "none@s")).status == 3
        assert await daemon.ctl("snapshot", "ls") == []
        created = await daemon.ctl("snapshot", "create", "a@s", "b@s")
        assert [snapshot["name"] for snapshot in created] == ["a@s", "b@s"]
        assert [snapshot["name"] for snapshot in await daemon.ctl("snapshot", "ls", "b")] == ["b@s"]


async def test_a_resize_is_seen_by_open_sessions(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        async with await connect(daemon, "a") as disk:
            assert await disk.capacity_bytes() == MIB
            await daemon.ctl("vdisk", "resize", "a", "3MiB")
            assert await disk.capacity_bytes() == 3 * MIB
            await disk.write(2 * MIB, b"x" * 4096)
            await daemon.ctl("vdisk", "resize", "a", "1MiB", "--shrink", "--yes")
            with pytest.raises(CommandFailed) as caught:
                await disk.read(2 * MIB, 4096)
            assert (caught.value.key, caught.value.asc) == (
                0x5,
                0x21,
            )  # LOGICAL BLOCK ADDRESS OUT OF RANGE


async def test_every_table_prints(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        await daemon.ctl("snapshot", "create", "a@s")
        commands = (
            ("vdisk", "ls"),
            ("vdisk", "show", "a"),
            ("snapshot", "ls"),
            ("split", "ls"),
            ("session", "ls"),
            ("pool", "show"),
            ("stats", "a"),
        )
        for command in commands:
            result = await daemon.try_ctl(*command)
            assert (result.status, result.messages) == (0, ""), command
            assert result.output


# --- Start and stop -------------------------------------------------------------------------------


async def test_sigterm_with_clients_at_work_is_orderly(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "16MiB")
        disk = await connect(daemon, "a")
        acknowledged = 0

        async def write() -> None:
            nonlocal acknowledged
            for number in range(4096):
                await disk.write(number * 4096, number.to_bytes(8, "big") * 512)
                acknowledged = number + 1

        writing = asyncio.create_task(write())
        while acknowledged < 100:
            await asyncio.sleep(0)
        stopped = asyncio.create_task(daemon.stop())
        await asyncio.wait([writing])
        assert await stopped == 0
        assert writing.exception() is None or acknowledged < 4096
        await daemon.start()
        data = await contents(daemon, "a")
        for number in range(acknowledged):
            assert data[number * 4096 : number * 4096 + 8] == number.to_bytes(8, "big")
        assert [
            event["event"] for event in daemon.events() if event["level"] in {"warning", "error"}
        ] == []


async def test_ready_is_told_to_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        async with Daemon(tmp_path):
            assert await asyncio.to_thread(notified.recv, 100) == b"READY=1"
        assert notified.recv(100) == b"STOPPING=1"


async def test_the_log_is_json_with_stable_events(tmp_path: Path) -> None:
    async with Daemon(tmp_path):
        pass
    names = [event["event"] for event in Daemon(tmp_path).events()]
    assert names == [
        "pool.created",
        "pool.opened",
        "daemon.ready",
        "daemon.stopping",
        "pool.closed",
        "daemon.stopped",
    ]


async def test_a_configuration_file_and_options_over_it(tmp_path: Path) -> None:
    (tmp_path / "cleaved.toml").write_text(
        f'pool.path = "{tmp_path}/pool"\npool.size = "16MiB"\niscsi.listen = ["127.0.0.1:3"]\n'
    )
    assert (await cleaved("check-config", str(tmp_path / "cleaved.toml"))).status == 0
    daemon = Daemon(
        tmp_path, pool_size="32MiB", options=("--config", str(tmp_path / "cleaved.toml"))
    )
    async with daemon:
        assert (await daemon.ctl("pool", "show"))["size_bytes"] == 32 * MIB


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--pool is missing"),
        (("--pool", "p", "--pool-size", "10GB"), "pool.size: '10GB' is not a size"),
        (("--pool", "p", "--iscsi", "localhost"), "iscsi.listen: 'localhost' is not HOST:PORT"),
        (("--pool", "p", "--nfs", "x:1"), "No such option"),
        (("--config", "/none"), "/none: No such file"),
    ],
)
async def test_a_wrong_command_line_is_2(arguments: tuple[str, ...], words: str) -> None:
    result = await cleaved("serve", *arguments)
    assert (result.status, result.output) == (2, "")
    assert words in result.messages


async def test_check_config_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('[pool]\npath = "/p"\ncache = "lots"\n')
    result = await cleaved("check-config", str(tmp_path / "bad.toml"))
    assert result.status == 2
    assert "pool.cache: 'lots' is not a size" in result.messages
    assert "10GiB" in result.messages


async def serve(path: Path, directory: Path, *options: str) -> tuple[int, str]:
    control = ("--control", str(directory / "other.sock"))
    result = await cleaved(
        "serve", "--pool", str(path), "--iscsi", "127.0.0.1:0", *control, *options
    )
    return result.status, result.messages


async def test_a_pool_that_is_served_is_refused_to_others(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        status, messages = await serve(daemon.pool_path, tmp_path)
        assert status == 4
        assert str(daemon.pool_path) in messages
        result = await cleaved("check", str(daemon.pool_path))
        assert result.status == 4
        await checked(daemon)


async def test_what_is_no_pool_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("precious\n" * 10000)
    before = (tmp_path / "text").read_bytes()
    for options in ((), ("--pool-size", "16MiB")):
        status, messages = await serve(tmp_path / "text", tmp_path, *options)
        assert status == 1
        assert "text" in messages
    assert (tmp_path / "text").read_bytes() == before
    assert (await serve(tmp_path / "none", tmp_path))[0] == 1
    assert (await serve(tmp_path, tmp_path))[0] == 1


async def test_a_truncated_pool_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    async with Daemon(tmp_path, pool_size="32MiB") as daemon:
        await fill(daemon, "a", MIB)
    os.truncate(daemon.pool_path, 16 * MIB)
    before = daemon.pool_path.read_bytes()
    status, messages = await serve(daemon.pool_path, tmp_path)
    assert status == 1
    assert "cleaved: " in messages
    assert daemon.pool_path.read_bytes() == before


async def test_listeners_that_cannot_be_are_named(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        options = ("--pool", str(tmp_path / "second"), "--pool-size", "16MiB")
        result = await cleaved(
            "serve", *options, "--iscsi", daemon.portal, "--control", str(tmp_path / "other.sock")
        )
        assert result.status == 1
        assert daemon.portal in result.messages
        result = await cleaved(
            "serve", *options, "--iscsi", "127.0.0.1:0", "--control", str(daemon.control_path)
        )
        assert result.status == 1
        assert "another daemon" in result.messages


# --- A full pool ----------------------------------------------------------------------------------


async def test_a_full_pool_fails_writes_with_their_sense_and_serves_the_rest(
    tmp_path: Path,
) -> None:
    async with Daemon(tmp_path, pool_size="32MiB") as daemon:
        data = await fill(daemon, "keep", MIB)
        await daemon.ctl("vdisk", "create", "big", "--size", "1GiB")
        async with await connect(daemon, "big") as disk:
            with pytest.raises(CommandFailed) as caught:
                await write_random(disk, 64 * MIB)
            # DATA PROTECT, SPACE ALLOCATION FAILED WRITE PROTECT
            assert (caught.value.key, caught.value.asc, caught.value.ascq) == (0x7, 0x27, 0x07)
            await disk.read(0, MIB)
            await disk.flush()
        assert await contents(daemon, "keep") == data
        await daemon.ctl("vdisk", "rm", "big")
        assert await fill_when_free(daemon, "again", 8 * MIB)
        await checked(daemon)


async def write_random(disk: Initiator, size_bytes: int) -> None:
    for at in range(0, size_bytes, MIB):
        await disk.write(at, os.urandom(MIB))


async def fill_when_free(daemon: Daemon, name: str, size_bytes: int) -> bytes:
    while (await daemon.ctl("pool", "show"))["free_bytes"] < 2 * size_bytes:
        await asyncio.sleep(0.05)
    return await fill(daemon, name, size_bytes)


async def test_a_split_in_a_full_pool_pauses_with_the_reason(tmp_path: Path) -> None:
    async with Daemon(tmp_path, pool_size="64MiB") as daemon:
        data = await fill(daemon, "golden", 40 * MIB)
        await daemon.ctl("snapshot", "create", "golden@v1")
        await daemon.ctl("clone", "create", "golden@v1", "web1")
        result = await daemon.try_ctl("split", "start", "web1", "--wait")
        assert result.status == 1
        assert "paused" in result.messages
        assert "full" in result.messages
        assert await contents(daemon, "web1") == data
        await checked(daemon)
