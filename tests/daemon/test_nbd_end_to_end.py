"""The daemon as a process, served over NBD: real clients, a client of our own, and iSCSI on the
same vdisk.
"""

import asyncio
import signal
import struct
from pathlib import Path
from typing import Self

import pytest

from daemon.iscsi.initiator import Initiator
from daemon.targets.names import TARGET_PREFIX
from protocol.iscsi.initiator.task import CommandDone
from protocol.volume import Buffer
from tests.daemon.programs import Daemon, succeed
from tests.protocol.nbd_client import (
    ACK,
    EPERM,
    ESHUTDOWN,
    FLUSH,
    GO,
    GREETING,
    LIST,
    READ,
    SERVER,
    STARTTLS,
    TRIM,
    UNKNOWN,
    WRITE,
    Reply,
    info_data,
    option,
)

MIB = 1 << 20
KIB64 = 1 << 16


def served(directory: Path, *options: str) -> Daemon:
    return Daemon(directory, options=("--nbd", str(directory / "nbd"), *options))


def uri(daemon: Daemon, export: str) -> str:
    return f"nbd+unix:///{export}?socket={daemon.directory / 'nbd'}"


class NbdClient:
    """A socket, with simple replies."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def over_unix(cls, daemon: Daemon) -> Self:
        return await cls._greeted(*await asyncio.open_unix_connection(daemon.directory / "nbd"))

    @classmethod
    async def over_tcp(cls, address: str) -> Self:
        host, _, port = address.rpartition(":")
        return await cls._greeted(*await asyncio.open_connection(host, int(port)))

    @classmethod
    async def _greeted(cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Self:
        assert await reader.readexactly(len(GREETING)) == GREETING
        writer.write((3).to_bytes(4, "big"))
        return cls(reader, writer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def option(self, number: int, data: bytes = b"") -> list[Reply]:
        """Replies up to the last one."""
        self.writer.write(option(number, data))
        found: list[Reply] = []
        while not found or (found[-1].kind != ACK and found[-1].kind < 1 << 31):
            _, asked, kind, length = struct.unpack(">QIII", await self.reader.readexactly(20))
            found.append(Reply(asked, kind, await self.reader.readexactly(length)))
        return found

    async def go(self, export: str) -> int:
        """The kind of the last reply."""
        return (await self.option(GO, info_data(export)))[-1].kind

    async def exports(self) -> list[str]:
        found = [reply.data for reply in await self.option(LIST) if reply.kind == SERVER]
        return [data[4 : 4 + int.from_bytes(data[:4], "big")].decode() for data in found]

    async def request(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b""
    ) -> tuple[int, bytes]:
        """The error, and what was read."""
        header = struct.pack(">IHHQQI", 0x25609513, 0, command, 7, offset, length or len(data))
        self.writer.write(header + data)
        reply = await self.reader.readexactly(16)
        magic, error, cookie = struct.unpack(">IIQ", reply)
        assert (magic, cookie) == (0x67446698, 7)
        wanted = length if command == READ and not error else 0
        return error, await self.reader.readexactly(wanted)


async def initiator(daemon: Daemon, vdisk: str = "disk") -> Initiator:
    host, _, port = daemon.portal.rpartition(":")
    return await Initiator.connect(host, int(port), TARGET_PREFIX + vdisk)


def tcp_of(daemon: Daemon) -> str:
    """Where NBD listens on TCP."""
    (ready,) = [event for event in daemon.events() if event["event"] == "daemon.ready"]
    found = [part for part in ready["listeners"].split(", ") if part.startswith("nbd 127.")]
    return str(found[0].removeprefix("nbd "))


# --- Real clients ---------------------------------------------------------------------------------


@pytest.mark.client("qemu-img")
async def test_qemu_img_copies_in_and_out(tmp_path: Path) -> None:
    image, back = tmp_path / "image", tmp_path / "back"
    image.write_bytes(bytes(MIB) + b"cleaved!" * (MIB // 8) + bytes(2 * MIB))
    async with served(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "4MiB")
        await succeed(
            "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), uri(daemon, "disk")
        )
        await succeed(
            "qemu-img", "convert", "-f", "raw", "-O", "raw", uri(daemon, "disk"), str(back)
        )
        assert back.read_bytes() == image.read_bytes()
        mapped = await succeed("qemu-img", "map", "-f", "raw", "--output=json", uri(daemon, "disk"))
        assert '"data": false' in mapped and '"data": true' in mapped


@pytest.mark.client("qemu-io")
async def test_qemu_io_writes_what_iscsi_reads(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "16MiB")
        commands = ("write -P 7 0 1M", "write -z 64k 64k", "flush", "discard 512k 512k")
        given = [word for command in commands for word in ("-c", command)]
        await succeed("qemu-io", "-f", "raw", "-d", "unmap", *given, uri(daemon, "disk"))
        async with await initiator(daemon) as client:
            found = bytes(await client.read(0, MIB))
        assert found[:KIB64] == found[2 * KIB64 : MIB // 2][:KIB64] == b"\7" * KIB64
        assert found[KIB64 : 2 * KIB64] == bytes(KIB64)
        assert found[MIB // 2 :] == bytes(MIB // 2)


@pytest.mark.client("qemu-nbd")
async def test_qemu_nbd_lists_vdisks_and_snapshots(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "16MiB")
        await daemon.ctl("snapshot", "create", "disk@monday")
        listed = await succeed("qemu-nbd", "--list", "-k", str(tmp_path / "nbd"))
        assert "export: 'disk'" in listed and "export: 'disk@monday'" in listed
        assert listed.count("readonly") == 1


@pytest.mark.client("fio")
async def test_fio_verifies_what_it_wrote(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "16MiB")
        job = "--name=job --rw=randwrite --bs=4k --iodepth=16 --size=4M --verify=crc32c"
        await succeed("fio", "--ioengine=nbd", f"--uri={uri(daemon, 'disk')}", *job.split())


# --- One vdisk by both protocols ------------------------------------------------------------------


async def test_both_protocols_see_each_others_writes(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "16MiB")
        async with await initiator(daemon) as iscsi, await NbdClient.over_unix(daemon) as nbd:
            assert await nbd.go("disk") == ACK
            assert await nbd.request(WRITE, KIB64, data=b"n" * KIB64) == (0, b"")
            assert await nbd.request(FLUSH) == (0, b"")
            assert bytes(await iscsi.read(KIB64, KIB64)) == b"n" * KIB64
            await iscsi.write(0, b"i" * KIB64)
            await iscsi.flush()
            assert await nbd.request(READ, 0, KIB64) == (0, b"i" * KIB64)
            assert await nbd.request(TRIM, 0, KIB64) == (0, b"")
            assert bytes(await iscsi.read(0, KIB64)) == bytes(KIB64)
            await iscsi.unmap(KIB64, KIB64)
            assert await nbd.request(READ, KIB64, KIB64) == (0, bytes(KIB64))
        stats = await daemon.ctl("stats", "disk")
        assert stats["writes"] >= 2 and stats["reads"] >= 4


async def test_a_snapshot_is_read_only(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "16MiB")
        async with await initiator(daemon) as iscsi:
            await iscsi.write(0, b"old" * 512 + b"!" * 2560)
            await daemon.ctl("snapshot", "create", "disk@monday")
            await iscsi.write(0, bytes(4096))
        async with await NbdClient.over_unix(daemon) as nbd:
            assert await nbd.exports() == ["disk", "disk@monday"]
            assert await nbd.go("disk@monday") == ACK
            assert await nbd.request(READ, 0, 4096) == (0, b"old" * 512 + b"!" * 2560)
            assert await nbd.request(WRITE, 0, data=bytes(4096)) == (EPERM, b"")
            refused = await daemon.try_ctl("snapshot", "rm", "disk@monday")
            assert refused.status == 4 and "NBD client" in refused.messages


def reserve_out(action: int, kind: int = 0, key: int = 0, new_key: int = 0) -> tuple[bytes, bytes]:
    """PERSISTENT RESERVE OUT: its CDB and parameters (SPC-4 6.16)."""
    return struct.pack(">BBB2xIx", 0x5F, action, kind, 24), struct.pack(">QQ8x", key, new_key)


async def send_out(client: Initiator, cdb: bytes, data: bytes) -> None:
    def submit(done: CommandDone) -> object:
        return client._connection.submit(0, cdb, done, data=data)

    answer: Buffer = await client._command(submit)
    assert not answer


async def test_a_vdisk_reserved_over_iscsi_is_not_writable_over_nbd(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "16MiB")
        async with await initiator(daemon) as iscsi, await NbdClient.over_unix(daemon) as nbd:
            assert await nbd.go("disk") == ACK
            await send_out(iscsi, *reserve_out(0, new_key=1))
            assert await nbd.request(WRITE, 0, data=bytes(512)) == (0, b"")
            await send_out(iscsi, *reserve_out(1, kind=1, key=1))  # write exclusive
            assert await nbd.request(WRITE, 0, data=bytes(512)) == (EPERM, b"")
            assert await nbd.request(TRIM, 0, 4096) == (EPERM, b"")
            assert await nbd.request(READ, 0, 512) == (0, bytes(512))
            await send_out(iscsi, *reserve_out(2, kind=1, key=1))
            await send_out(iscsi, *reserve_out(1, kind=3, key=1))  # exclusive access
            assert await nbd.request(READ, 0, 512) == (EPERM, b"")
            await send_out(iscsi, *reserve_out(2, kind=3, key=1))
            assert await nbd.request(WRITE, 0, data=bytes(512)) == (0, b"")


# --- Access ---------------------------------------------------------------------------------------


async def test_over_tcp_only_what_is_open_to_everybody_is_an_export(tmp_path: Path) -> None:
    async with served(tmp_path, "--nbd", "127.0.0.1:0") as daemon:
        for name in ("open", "listed"):
            await daemon.ctl("vdisk", "create", name, "--size", "16MiB")
        await daemon.ctl("acl", "add", "listed", "iqn.2026-01.io.example:host")
        async with (
            await NbdClient.over_tcp(tcp_of(daemon)) as nbd,
            await NbdClient.over_unix(daemon) as trusted,
        ):
            assert await nbd.exports() == ["open"]
            assert await nbd.go("listed") == UNKNOWN
            assert [reply.kind for reply in await nbd.option(STARTTLS)][-1] >= 1 << 31
            assert await nbd.go("open") == ACK
            assert await trusted.exports() == ["listed", "open"]
            assert await trusted.go("listed") == ACK
            # A list that comes later shuts out those that are there.
            changed = await daemon.ctl("acl", "add", "open", "iqn.2026-01.io.example:host")
            assert changed["sessions_ended"] == 1
            assert (await nbd.request(READ, 0, 512))[0] == ESHUTDOWN
            assert (await trusted.request(READ, 0, 512))[0] == 0


async def test_closed_access_closes_nbd_over_tcp(tmp_path: Path) -> None:
    async with served(tmp_path, "--nbd", "127.0.0.1:0", "--no-open-access") as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "16MiB")
        async with await NbdClient.over_tcp(tcp_of(daemon)) as nbd:
            assert await nbd.exports() == []
            assert await nbd.go("disk") == UNKNOWN
        assert ((tmp_path / "nbd").stat().st_mode & 0o777) == 0o660


# --- Administration -------------------------------------------------------------------------------


async def test_sessions_are_shown_and_ended_and_keep_their_vdisks(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "16MiB")
        async with await initiator(daemon), await NbdClient.over_unix(daemon) as nbd:
            assert await nbd.go("disk") == ACK
            shown = await daemon.ctl("session", "ls")
            assert [row["type"] for row in shown] == ["iscsi", "nbd"]
            assert shown[1]["target"] == "disk" and shown[1]["address"] == str(tmp_path / "nbd")
            assert (await daemon.ctl("stats", "disk"))["sessions"] == 2
        async with await NbdClient.over_unix(daemon) as nbd:
            assert await nbd.go("disk") == ACK
            refused = await daemon.try_ctl("vdisk", "rm", "disk")
            assert refused.status == 4 and "NBD client" in refused.messages, refused
            (row,) = [one for one in await daemon.ctl("session", "ls") if one["type"] == "nbd"]
            ended = await daemon.ctl("session", "end", str(row["id"]))
            assert ended == {"id": row["id"], "initiator": "", "target": "disk", "ended": True}


async def test_connect_prints_lines_for_nbd(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "16MiB")
        qemu = await daemon.ctl("connect", "disk", "--client", "qemu-nbd")
        assert uri(daemon, "disk") in qemu["lines"][0]
        kernel = await daemon.ctl("connect", "disk", "--client", "nbd")
        assert kernel["lines"][2].endswith("/dev/nbd0 -N disk")


async def test_a_stop_is_the_protocols_shutdown(tmp_path: Path) -> None:
    async with served(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "disk", "--size", "16MiB")
        async with await NbdClient.over_unix(daemon) as nbd:
            assert await nbd.go("disk") == ACK
            assert (await nbd.request(WRITE, 0, data=b"w" * 4096))[0] == 0
            daemon._process.send_signal(signal.SIGTERM)
            error, seconds = 0, 0.0
            while not error and seconds < 3:
                error, _ = await nbd.request(READ, 0, 512)
                await asyncio.sleep(0.02)
                seconds += 0.02
            assert error == ESHUTDOWN
            assert await nbd.reader.read() == b""
        assert await daemon.ended() == 0
        assert not (tmp_path / "nbd").exists()
