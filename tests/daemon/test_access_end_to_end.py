"""Access control with the daemon as a process, real iSCSI clients, and the admin client."""

import asyncio
import os
import pty
import signal
import sys
from pathlib import Path

import pytest

from daemon.iscsi.initiator import Initiator, random_isid
from daemon.targets.names import TARGET_PREFIX
from protocol.iscsi.chap import ChapSecrets
from protocol.iscsi.errors import IscsiError
from protocol.iscsi.initiator.login import InitiatorSettings
from protocol.volume import Buffer
from tests.daemon.programs import CLEAVECTL, ROOT, Daemon, Result, cleaved, run, succeed

ANNA, BERTA = "iqn.2026-01.io.example:anna", "iqn.2026-01.io.example:berta"
SECRET, MUTUAL = "correct-horse-battery", "staple-horse-mutual"
MIB = 1 << 20


async def discovered(
    daemon: Daemon, initiator: str, *, user: str = "", portal: str | None = None
) -> list[str]:
    """Names that iscsi-ls shows an initiator, without the prefix; ``user`` is USER%SECRET@."""
    output = await succeed("iscsi-ls", "-i", initiator, f"iscsi://{user}{portal or daemon.portal}")
    return sorted(
        line.split()[0].removeprefix(f"Target:{TARGET_PREFIX}")
        for line in output.splitlines()
        if line.startswith("Target:")
    )


async def inquiry(
    daemon: Daemon, initiator: str, target: str, *, user: str = "", arguments: str = ""
) -> Result:
    url = f"iscsi://{user}{daemon.portal}/{TARGET_PREFIX}{target}/0{arguments}"
    return await run("iscsi-inq", "-i", initiator, url)


async def session(
    daemon: Daemon,
    initiator: str,
    target: str,
    isid: int | None = None,
    chap: ChapSecrets | None = None,
) -> Initiator:
    host, _, port = daemon.portal.rpartition(":")
    name = TARGET_PREFIX + target
    return await Initiator.connect(
        host,
        int(port),
        name,
        InitiatorSettings(initiator, name, isid=isid or random_isid(), chap=chap),
    )


def secret_file(directory: Path, secret: str) -> str:
    path = directory / f"secret-{secret[:5]}"
    path.write_text(secret + "\n")
    path.chmod(0o600)
    return str(path)


# --- Lists ----------------------------------------------------------------------------------------


@pytest.mark.client("iscsi-ls", "iscsi-inq")
async def test_initiators_see_and_use_what_is_theirs_and_nothing_else(tmp_path: Path) -> None:
    async with Daemon(tmp_path, options=("--no-open-access",)) as daemon:
        for name in ("a", "b", "c"):
            await daemon.ctl("vdisk", "create", name, "--size", "1MiB")
        assert await discovered(daemon, ANNA) == []
        await daemon.ctl("acl", "add", "a", ANNA, BERTA)
        await daemon.ctl("acl", "add", "b", BERTA)
        await daemon.stop(signal.SIGKILL)
        await daemon.start()
        assert await discovered(daemon, ANNA) == ["a"]
        assert await discovered(daemon, BERTA) == ["a", "b"]
        assert (await inquiry(daemon, ANNA, "a")).status == 0
        for initiator, target in ((ANNA, "b"), (ANNA, "c"), (BERTA, "c"), (ANNA, "none")):
            refused = await inquiry(daemon, initiator, target)
            assert refused.status != 0
            assert "Target not found" in refused.messages, refused
        await daemon.ctl("vdisk", "rename", "a", "z")
        assert await discovered(daemon, ANNA) == ["z"]
        assert [row["initiators"] for row in await daemon.ctl("acl", "ls", "z")] == [[ANNA, BERTA]]


async def test_a_session_that_is_shut_out_ends(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        anna, berta = await session(daemon, ANNA, "a"), await session(daemon, BERTA, "a")
        assert (await daemon.ctl("acl", "add", "a", ANNA))["sessions_ended"] == 1
        while not berta._connection.logout_requested:
            await berta.read(0, 512)
        await berta.close()
        with pytest.raises(IscsiError):
            await session(daemon, BERTA, "a")
        assert len(await anna.read(0, 512)) == 512
        assert [row["initiator"] for row in await daemon.ctl("session", "ls")] == [ANNA]
        await anna.close()


# --- CHAP -----------------------------------------------------------------------------------------


@pytest.mark.client("iscsi-ls", "iscsi-inq")
async def test_chap_of_single_initiators_by_real_clients(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        for name in ("a", "b"):
            await daemon.ctl("vdisk", "create", name, "--size", "1MiB")
        await daemon.ctl("acl", "add", "a", ANNA)
        files = (
            "--secret-file",
            secret_file(tmp_path, SECRET),
            "--mutual-secret-file",
            secret_file(tmp_path, MUTUAL),
        )
        shown = await daemon.ctl(
            "chap", "set", ANNA, "--user", "anna", "--mutual-user", "storage", *files
        )
        assert shown == {"initiator": ANNA, "user": "anna", "mutual_user": "storage"}
        right, wrong = f"anna%{SECRET}@", f"anna%{SECRET}x@"
        assert await discovered(daemon, ANNA, user=right) == ["a", "b"]
        assert await discovered(daemon, BERTA) == ["b"]
        assert (await inquiry(daemon, ANNA, "a", user=right)).status == 0
        mutual = f"?target_user=storage&target_password={MUTUAL}"
        assert (await inquiry(daemon, ANNA, "a", user=right, arguments=mutual)).status == 0
        for user, arguments in (
            ("", ""),
            (wrong, ""),
            (f"berta%{SECRET}@", ""),
            (right, mutual + "x"),
        ):
            assert (await inquiry(daemon, ANNA, "a", user=user, arguments=arguments)).status != 0
        assert (await run("iscsi-ls", "-i", ANNA, f"iscsi://{daemon.portal}")).status != 0
        await daemon.stop()
        await daemon.start()
        assert (await inquiry(daemon, ANNA, "a")).status != 0
        assert (await inquiry(daemon, ANNA, "a", user=right)).status == 0
        await daemon.ctl("chap", "rm", ANNA)
        assert (await inquiry(daemon, ANNA, "a")).status == 0
        told = daemon.log() + str(await daemon.ctl("chap", "ls"))
        assert SECRET not in told
        assert MUTUAL not in told


@pytest.mark.client("qemu-img")
async def test_data_with_chap_by_qemu(tmp_path: Path) -> None:
    data = os.urandom(MIB)
    (tmp_path / "source").write_bytes(data)
    file = secret_file(tmp_path, SECRET)
    (tmp_path / "secret").write_text(
        SECRET
    )  # QEMU takes the whole file, the end of the line included
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        await daemon.ctl("acl", "add", "a", ANNA)
        await daemon.ctl("chap", "set", ANNA, "--secret-file", file)
        where = f"portal={daemon.portal},target={TARGET_PREFIX}a,lun=0"
        options = f"driver=iscsi,transport=tcp,{where},initiator-name={ANNA}"
        with_chap = f"{options},user={ANNA},password-secret=chap"
        secret = ("--object", f"secret,id=chap,file={tmp_path / 'secret'}")
        source = f"driver=raw,file.driver=file,file.filename={tmp_path / 'source'}"
        await succeed(
            "qemu-img",
            "convert",
            *secret,
            "-n",
            "--image-opts",
            "--target-image-opts",
            source,
            with_chap,
        )
        await succeed("qemu-img", "compare", *secret, "--image-opts", source, with_chap)
        assert (await run("qemu-img", "info", "--image-opts", options)).status != 0
        assert (
            await run("qemu-img", "info", *secret, "--image-opts", with_chap.replace(ANNA, BERTA))
        ).status != 0


async def test_mutual_chap_with_our_own_initiator(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        files = (
            "--secret-file",
            secret_file(tmp_path, SECRET),
            "--mutual-secret-file",
            secret_file(tmp_path, MUTUAL),
        )
        await daemon.ctl("chap", "set", ANNA, "--mutual-user", "storage", *files)
        async with await session(
            daemon, ANNA, "a", chap=ChapSecrets(ANNA, SECRET.encode(), "storage", MUTUAL.encode())
        ) as disk:
            assert len(await disk.read(0, 512)) == 512
        with pytest.raises(IscsiError):
            await session(
                daemon,
                ANNA,
                "a",
                chap=ChapSecrets(ANNA, SECRET.encode(), "storage", MUTUAL.encode() + b"x"),
            )


async def ask(daemon: Daemon, *answers: str) -> tuple[int, str]:
    """Run ``chap set`` on a terminal of its own; its exit code and everything that
    terminal showed.
    """
    master, slave = pty.openpty()
    command = (
        sys.executable,
        "-c",
        CLEAVECTL,
        "--control",
        str(daemon.control_path),
        "chap",
        "set",
        ANNA,
    )
    process = await asyncio.create_subprocess_exec(
        *command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True
    )
    os.close(slave)
    shown = b""
    loop = asyncio.get_running_loop()
    for answer in answers:
        prompts = shown.count(b": ")
        while shown.count(b": ") == prompts:
            shown += await loop.run_in_executor(None, os.read, master, 4096)
        os.write(master, answer.encode() + b"\n")
    status = await process.wait()
    os.set_blocking(master, False)
    try:
        while data := os.read(master, 4096):
            shown += data
    except OSError:
        shown += b"."  # the other end is closed: that was all
    os.close(master)
    return status, shown.decode()


async def test_a_secret_is_asked_for_twice_and_not_shown(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        status, shown = await ask(daemon, SECRET, SECRET)
        assert status == 0, shown
        assert "Secret" in shown
        assert SECRET not in shown
        status, shown = await ask(daemon, "short", "short")
        assert status == 2
        assert "5 characters" in shown


async def test_wrong_secrets_are_usage_and_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "file"
    async with Daemon(tmp_path) as daemon:
        for text, options, words in (
            ("", (), "--secret-file"),
            ("short\n", ("--secret-file", "FILE"), "5 characters"),
            ("x" * 256, ("--secret-file", "FILE"), "256 characters"),
            ("", ("--secret-file", "/nonexistent"), "No such file"),
            (SECRET, ("--secret-file", "FILE", "--mutual-secret-file", "FILE"), "--mutual-user"),
            (
                SECRET,
                ("--secret-file", "FILE", "--mutual-user", "m", "--mutual-secret-file", "FILE"),
                "different",
            ),
            ("", ("--secret", "x"), "No such option"),
        ):
            file.write_text(text)
            result = await daemon.try_ctl(
                "chap", "set", ANNA, *(option.replace("FILE", str(file)) for option in options)
            )
            assert result.status == 2, result
            assert words in result.messages
            assert not text or text.strip() not in result.messages
        assert await daemon.ctl("chap", "ls") == []


async def test_a_secret_from_standard_input(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        command = (
            sys.executable,
            "-c",
            CLEAVECTL,
            "--control",
            str(daemon.control_path),
            "chap",
            "set",
            ANNA,
            "--secret-file",
            "-",
        )
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, cwd=ROOT
        )
        await process.communicate(f"{SECRET}\n".encode())
        assert process.returncode == 0
        assert await daemon.ctl("chap", "ls") == [
            {"initiator": ANNA, "user": ANNA, "mutual_user": None}
        ]


# --- Created targets ------------------------------------------------------------------------------


@pytest.mark.client("iscsi-ls", "iscsi-inq")
async def test_a_target_with_several_luns_by_real_clients(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("target", "create", "cluster1")
        for name, size in (("quorum", "16MiB"), ("data", "64MiB")):
            await daemon.ctl("vdisk", "create", name, "--size", size)
            await daemon.ctl("target", "map", "cluster1", name)
        output = await succeed("iscsi-ls", "-s", f"iscsi://{daemon.portal}")
        cluster = output[output.index(f"{TARGET_PREFIX}cluster1") :].split("Target:")[0]
        assert "Lun:0" in cluster
        assert "Lun:1" in cluster
        refused = await daemon.try_ctl("vdisk", "rm", "data")
        assert refused.status == 4
        assert f"{TARGET_PREFIX}cluster1" in refused.messages
        await daemon.ctl("vdisk", "rename", "data", "data2")
        await daemon.stop(signal.SIGKILL)
        await daemon.start()
        (row,) = await daemon.ctl("target", "ls")
        assert [(lun["lun"], lun["vdisk"]) for lun in row["luns"]] == [(0, "quorum"), (1, "data2")]
        serial = {
            name: (await daemon.ctl("vdisk", "show", name))["uuid"].replace("-", "")
            for name in ("quorum", "data2")
        }
        for lun, name in ((0, "quorum"), (1, "data2")):
            url = f"iscsi://{daemon.portal}/{TARGET_PREFIX}cluster1/{lun}"
            assert serial[name] in await succeed("iscsi-inq", "-e", "1", "-c", "128", url)
        await daemon.ctl("target", "unmap", "cluster1", "data2")
        assert (
            await run("iscsi-inq", f"iscsi://{daemon.portal}/{TARGET_PREFIX}cluster1/1")
        ).status != 0
        await daemon.ctl("vdisk", "rm", "data2")
        await daemon.ctl("target", "rm", "cluster1")
        assert await discovered(daemon, ANNA) == ["quorum"]


async def test_a_name_is_a_vdisk_or_a_target_and_exit_codes_say_so(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        await daemon.ctl("snapshot", "create", "a@s")
        await daemon.ctl("target", "create", "t")
        for status, words, arguments in (
            (4, "vdisk", ("target", "create", "a")),
            (4, "exists", ("target", "create", "t")),
            (4, "target t", ("vdisk", "create", "t", "--size", "1MiB")),
            (4, "target t", ("vdisk", "rename", "a", "t")),
            (4, "target t", ("clone", "create", "a@s", "t")),
            (4, "own target", ("target", "map", "a", "a")),
            (4, "own target", ("target", "rm", "a")),
            (3, "none", ("target", "map", "none", "a")),
            (3, "none", ("target", "map", "t", "none")),
            (3, "none", ("acl", "add", "none", ANNA)),
            (3, ANNA, ("acl", "rm", "a", ANNA)),
            (3, ANNA, ("chap", "rm", ANNA)),
            (3, "LUN 3", ("target", "unmap", "t", "--lun", "3")),
            (2, "--lun", ("target", "map", "t", "a", "--lun", "256")),
            (2, "one of them", ("target", "unmap", "t")),
            (2, "initiators", ("acl", "add", "a", "not-an-iscsi-name")),
            (2, "target", ("target", "create", "a b")),
        ):
            result = await daemon.try_ctl(*arguments)
            assert result.status == status, (arguments, result)
            assert words in result.messages, (arguments, result)


async def test_the_documented_keys_and_tables(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        created = await daemon.ctl("target", "create", "t")
        assert created == {
            "target": f"{TARGET_PREFIX}t",
            "luns": [],
            "initiators": None,
            "sessions": 0,
        }
        mapped = await daemon.ctl("target", "map", "t", "a", "--lun", "9")
        assert mapped["luns"] == [
            {
                "lun": 9,
                "vdisk": "a",
                "uuid": (await daemon.ctl("vdisk", "show", "a"))["uuid"].replace("-", ""),
            }
        ]
        assert "9=a" in (await daemon.try_ctl("target", "ls")).output
        assert "(no list)" in (await daemon.try_ctl("target", "ls")).output
        await daemon.ctl("acl", "add", "t", ANNA)
        assert await daemon.ctl("acl", "rm", "t", ANNA) == {
            "target": f"{TARGET_PREFIX}t",
            "initiators": [],
            "sessions_ended": 0,
        }
        assert "(nobody)" in (await daemon.try_ctl("acl", "ls")).output
        assert await daemon.ctl("acl", "clear", "t") == {
            "target": f"{TARGET_PREFIX}t",
            "initiators": None,
            "sessions_ended": 0,
        }
        assert await daemon.ctl("acl", "ls") == []
        assert await daemon.ctl("target", "unmap", "t", "--lun", "9") == created
        assert await daemon.ctl("target", "rm", "t") == {
            "target": f"{TARGET_PREFIX}t",
            "deleted": True,
        }


# --- Exposure and portals -------------------------------------------------------------------------


async def test_nothing_is_open_by_accident(tmp_path: Path) -> None:
    result = await cleaved(
        "serve", "--pool", str(tmp_path / "pool"), "--pool-size", "64MiB", "--iscsi", "0.0.0.0:0"
    )
    assert result.status == 2
    assert "--no-open-access" in result.messages
    assert not (tmp_path / "pool").exists()
    (tmp_path / "config").write_text(
        f'pool.path = "{tmp_path / "pool"}"\niscsi.listen = ["[::]:3260"]\n'
    )
    result = await cleaved("check-config", str(tmp_path / "config"))
    assert result.status == 2
    assert "iscsi.open_access" in result.messages


@pytest.mark.parametrize(("mode", "status"), [(0o600, 0), (0o640, 0), (0o644, 2), (0o602, 2)])
async def test_a_file_with_secrets_is_not_for_everybody(
    tmp_path: Path, mode: int, status: int
) -> None:
    path = tmp_path / "config"
    path.write_text(f'pool.path = "/p"\niscsi.chap = {{user = "u", secret = "{SECRET}"}}\n')
    path.chmod(mode)
    result = await cleaved("check-config", str(path))
    assert result.status == status
    assert ("chmod" in result.messages) == (status == 2)
    assert SECRET not in result.messages


@pytest.mark.client("iscsi-ls")
async def test_two_portals_one_of_them_ipv6(tmp_path: Path) -> None:
    async with Daemon(tmp_path, options=("--iscsi", "[::1]:0")) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        portals = (await daemon.ctl("connect", "a", "--client", "libiscsi"))["portals"]
        assert len(portals) == 2
        assert portals[0].startswith("[::1]:") or portals[1].startswith("[::1]:")
        for portal in portals:
            output = await succeed("iscsi-ls", f"iscsi://{portal}")
            assert all(f"{other},1" in output for other in portals), output


@pytest.mark.client("iscsi-ls")
async def test_discovery_by_a_real_client_tells_what_is_advertised(tmp_path: Path) -> None:
    async with Daemon(
        tmp_path, options=("--advertise", "203.0.113.5:3260", "--advertise", "[2001:db8::5]:3261")
    ) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        output = await succeed("iscsi-ls", f"iscsi://{daemon.portal}")
        assert (
            "Portal:203.0.113.5:3260,1" in output
            and "Portal:[2001:db8::5]:3261,1" in output
            and "127.0.0.1" not in output
        )
        assert (await daemon.ctl("connect", "a", "--client", "qemu"))["portals"] == [
            "203.0.113.5:3260",
            "[2001:db8::5]:3261",
        ]


# --- Reservations over a restart ------------------------------------------------------------------


async def reserve_out(
    disk: Initiator, action: int, key: int, new_key: int = 0, *, aptpl: bool = False
) -> None:
    body = key.to_bytes(8, "big") + new_key.to_bytes(8, "big") + bytes(4) + bytes((aptpl, 0, 0, 0))
    cdb = bytes((0x5F, action, 1, 0, 0, 0, 0, 0, 24, 0))
    await disk._command(lambda done: disk._connection.submit(0, cdb, done, data=body))


async def reserve_in(disk: Initiator, action: int) -> Buffer:
    cdb = bytes((0x5E, action, 0, 0, 0, 0, 0, 1, 0, 0))
    return await disk._command(lambda done: disk._connection.submit(0, cdb, done, read_bytes=256))


async def test_a_reservation_outlives_kill_9(tmp_path: Path) -> None:
    register, reserve, read_keys, read_reservation = 0, 1, 0, 1
    async with Daemon(tmp_path) as daemon:
        for name in ("kept", "other"):
            await daemon.ctl("vdisk", "create", name, "--size", "1MiB")
            disk = await session(daemon, ANNA, name, isid=0x800000000001)
            await reserve_out(disk, register, 0, 0xABCD, aptpl=name == "kept")
            await reserve_out(disk, reserve, 0xABCD)
        await daemon.stop(signal.SIGKILL)
        await daemon.start()
        stranger = await session(daemon, BERTA, "kept")
        assert bytes(await reserve_in(stranger, read_keys))[4:16] == (8).to_bytes(4, "big") + (
            0xABCD
        ).to_bytes(8, "big")
        assert bytes(await reserve_in(stranger, read_reservation))[21] == 1
        with pytest.raises(IscsiError):
            await stranger.write(0, bytes(512))
        holder = await session(daemon, ANNA, "kept", isid=0x800000000001)
        await holder.write(0, bytes(512))
        volatile = await session(daemon, BERTA, "other")
        assert bytes(await reserve_in(volatile, read_keys))[4:8] == bytes(4)
        for disk in (stranger, holder, volatile):
            await disk.close()
        await daemon.ctl("vdisk", "rm", "kept")
        await daemon.stop()
        await daemon.start()
        assert [row["name"] for row in await daemon.ctl("vdisk", "ls")] == ["other"]
