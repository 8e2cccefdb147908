"""The control socket with real clients, and a scripted service behind it."""

import asyncio
import gc
import os
import socket
import stat
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
import pytest_asyncio

from daemon.admin.client import ControlClient, Unreachable
from daemon.control.listener import ControlListener, ControlPathBusy
from protocol.control import calls, rows
from protocol.control.client_connection import ClientConnection, hello
from protocol.control.definition import AnyMethod
from protocol.control.errors import CONFLICT, INTERNAL, NOT_FOUND, ControlError
from protocol.control.frames import Notification, Response
from protocol.control.limits import ITEMS_PER_PART
from tests.daemon.fakes import example, split_row

GREETING = example(rows.Greeting, server="cleaved")
SPLIT = split_row()
DONE = split_row(state="done", percent=100.0, holes_remaining=0, eta_seconds=None)
POOL = example(rows.Pool, size_bytes=1)


class Script:
    """Answers by method; an exception is raised, a future is awaited. Records the calls."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"hello": GREETING}
        self.calls: list[tuple[str, Any]] = []

    async def call(self, call: AnyMethod) -> Any:
        self.calls.append((call.METHOD, call))
        answer = self.answers[call.METHOD]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, asyncio.Future):
            return await answer
        return answer


@pytest.fixture
def script() -> Script:
    return Script()


@pytest_asyncio.fixture
async def server(tmp_path: Path, script: Script) -> AsyncIterator[ControlListener]:
    found = ControlListener(str(tmp_path / "control.sock"), script.call)
    await found.start()
    yield found
    await found.stop(0.1)


class Client:
    """An asyncio client over the sans-IO one."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection = ClientConnection()
        self.messages: list[Any] = []

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_unix_connection(self._path)
        self.send(self._connection.request(hello("test"))[1])
        assert (await self.receive()).result == msgspec.to_builtins(GREETING)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        await self.writer.wait_closed()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def request(self, method: str, **params: Any) -> None:
        self.send(self._connection.request(calls.validate(method, params))[1])

    async def receive(self) -> Any:
        while not self.messages:
            data = await self.reader.read(1 << 16)
            assert data, "the daemon closed the connection"
            self.messages += self._connection.receive(data)
        return self.messages.pop(0)

    async def call(self, method: str, **params: Any) -> Any:
        self.request(method, **params)
        return await self.receive()


async def cleavectl(server: ControlListener, *arguments: str) -> tuple[int, str, str]:
    command = [
        sys.executable,
        "-c",
        "from daemon.admin.cli import main; main()",
        "--control",
        server.path,
        *arguments,
    ]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, messages = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), messages.decode()


async def test_the_socket_is_for_owner_and_group(server: ControlListener) -> None:
    assert stat.S_IMODE(os.stat(server.path).st_mode) == 0o660


async def test_the_socket_goes_when_the_daemon_stops(tmp_path: Path, script: Script) -> None:
    found = ControlListener(str(tmp_path / "control.sock"), script.call)
    await found.start()
    await found.stop(0.1)
    assert not (tmp_path / "control.sock").exists()


async def test_a_socket_that_a_dead_daemon_left_is_replaced(tmp_path: Path, script: Script) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    found = ControlListener(str(path), script.call)
    await found.start()
    async with Client(str(path)):
        pass
    await found.stop(0.1)


async def test_a_socket_that_another_daemon_serves_is_left_alone(
    server: ControlListener, script: Script
) -> None:
    with pytest.raises(ControlPathBusy, match="another daemon"):
        await ControlListener(server.path, script.call).start()
    async with Client(server.path):
        pass


async def test_a_path_that_is_no_socket_or_has_no_directory_is_refused(
    tmp_path: Path, script: Script
) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ControlPathBusy, match="is no socket"):
        await ControlListener(str(tmp_path / "file"), script.call).start()
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(ControlPathBusy, match="No such file"):
        await ControlListener(str(tmp_path / "none" / "control.sock"), script.call).start()


async def test_answers_come_as_they_are_ready(server: ControlListener, script: Script) -> None:
    slow = asyncio.get_running_loop().create_future()
    script.answers |= {"pool.check": slow, "pool.show": {"size_bytes": 1}}
    async with Client(server.path) as client:
        client.request("pool.check")
        answer = await client.call("pool.show")
        assert answer.result == {"size_bytes": 1}
        slow.set_result({"ok": True})
        assert (await client.receive()).result == {"ok": True}


async def test_a_long_list_comes_whole(server: ControlListener, script: Script) -> None:
    rows = [{"name": f"v{number}"} for number in range(10 * ITEMS_PER_PART + 1)]
    script.answers |= {"vdisk.ls": rows, "pool.show": {}}
    async with Client(server.path) as client:
        client.request("vdisk.ls")
        client.request("pool.show")
        answers = [await client.receive(), await client.receive()]
        assert sorted(len(answer.result) for answer in answers) == [0, len(rows)]


async def test_a_bug_in_a_call_is_answered_and_the_next_call_served(
    server: ControlListener, script: Script
) -> None:
    script.answers |= {"pool.check": ZeroDivisionError("planted"), "pool.show": {}}
    async with Client(server.path) as client:
        answer = await client.call("pool.check")
        assert answer.error["code"] == INTERNAL
        assert "planted" in answer.error["message"]
        assert (await client.call("pool.show")).result == {}


async def test_bytes_that_are_no_frames_close_that_connection_alone(
    server: ControlListener, script: Script
) -> None:
    script.answers["pool.show"] = {}
    async with Client(server.path) as good, Client(server.path) as bad:
        bad.send(b"GET / HTTP/1.1\r\n\r\n")
        answer = await bad.receive()
        assert isinstance(answer, Response)
        assert answer.error["code"] == "invalid_request"
        assert await bad.reader.read() == b""
        assert (await good.call("pool.show")).result == {}


async def test_a_client_that_goes_does_not_stop_what_it_asked_for(
    server: ControlListener, script: Script
) -> None:
    slow = asyncio.get_running_loop().create_future()
    script.answers["vdisk.rm"] = slow
    async with Client(server.path) as client:
        client.request("vdisk.rm", name="a")
        while not any(method == "vdisk.rm" for method, _ in script.calls):
            await asyncio.sleep(0)
    slow.set_result(None)
    while server.tasks:
        await asyncio.sleep(0)


async def test_connections_above_the_limit_are_closed(server: ControlListener) -> None:
    server.connections_max = 1
    async with Client(server.path):
        reader, writer = await asyncio.open_unix_connection(server.path)
        assert await reader.read() == b""
        writer.close()
    while server.connections:
        await asyncio.sleep(0)
    async with Client(server.path):
        pass


async def test_notifications_come_to_subscribers(server: ControlListener) -> None:
    async with Client(server.path) as client, Client(server.path) as other:
        await client.call("rpc.subscribe", events=["split.progress"])
        server.notify("split.progress", SPLIT)
        expected = Notification("split.progress", msgspec.to_builtins(SPLIT))
        assert await client.receive() == expected
        assert (await other.call("rpc.list")).error is None


async def test_stopping_cancels_what_does_not_end(tmp_path: Path, script: Script) -> None:
    never = asyncio.get_running_loop().create_future()
    script.answers["pool.check"] = never
    found = ControlListener(str(tmp_path / "control.sock"), script.call)
    await found.start()
    async with Client(found.path) as client:
        client.request("pool.check")
        while not found.tasks:
            await asyncio.sleep(0)
        await found.stop(0.01)
        assert never.cancelled()
        assert await client.reader.read() == b""


async def test_cleavectl_prints_tables_and_json(server: ControlListener, script: Script) -> None:
    script.answers["vdisk.ls"] = [
        example(rows.Vdisk, name="golden", size_bytes=10 << 30, used_bytes=4096)
    ]
    status, output, _ = await cleavectl(server, "vdisk", "ls")
    assert status == 0
    assert output.splitlines() == [
        "NAME    SIZE    USED   BACKING  SPLIT",
        "golden  10 GiB  4 KiB  -        none",
    ]
    for arguments in (("-o", "json", "vdisk", "ls"), ("vdisk", "ls", "-o", "json")):
        status, output, _ = await cleavectl(server, *arguments)
        assert '"size_bytes": 10737418240' in output


@pytest.mark.parametrize(
    ("code", "status"), [(NOT_FOUND, 3), (CONFLICT, 4), ("pool_full", 1), ("invalid_params", 2)]
)
async def test_cleavectl_exits_by_the_error(
    server: ControlListener, script: Script, code: str, status: int
) -> None:
    script.answers["vdisk.show"] = ControlError(code, "the reason", "the next step")
    found, output, messages = await cleavectl(server, "vdisk", "show", "none")
    assert (found, output) == (status, "")
    assert messages == "cleavectl: the reason\n  the next step\n"


async def test_cleavectl_without_a_daemon(tmp_path: Path, script: Script) -> None:
    status, output, messages = await cleavectl(
        ControlListener(str(tmp_path / "none"), script.call), "vdisk", "ls"
    )
    assert (status, output) == (5, "")
    assert "no daemon answers" in messages
    assert "--control" in messages


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("vdisk", "create", "a"), "--size"),
        (("vdisk", "create", "a", "--size", "10GB"), "10GiB"),
        (("vdisk", "resize", "a", "lots"), "10GiB"),
        (("snapshot", "create", "a"), "VDISK@SNAPSHOT"),
        (("snapshot", "create"), "VDISK@SNAPSHOT"),
        (("split", "start", "a", "--max-rate", "5"), "100MiB/s"),
        (("split", "start", "a", "--mode", "move"), "'copy', 'share'"),
        (("stats", "a", "--watch", "--interval", "5"), "30s"),
        (("connect", "a"), "--client"),
        (("explode",), "explode"),
    ],
)
async def test_cleavectl_usage(
    server: ControlListener, script: Script, arguments: tuple[str, ...], words: str
) -> None:
    status, output, messages = await cleavectl(server, *arguments)
    assert (status, output) == (2, "")
    assert words in messages
    assert script.calls == []


async def test_cleavectl_sends_what_the_options_say(
    server: ControlListener, script: Script
) -> None:
    script.answers["split.start"] = SPLIT
    status, output, _ = await cleavectl(
        server, "split", "start", "web1", "--mode", "share", "--max-rate", "1MiB/s"
    )
    assert status == 0
    assert "40.0 %" in output
    _, params = script.calls[-1]
    assert (params.name, params.mode, params.rate_min_bytes, params.rate_max_bytes) == (
        "web1",
        "share",
        None,
        1 << 20,
    )


async def split_and_wait(
    server: ControlListener, script: Script, end: rows.Split, *arguments: str
) -> tuple[int, str, str]:
    script.answers |= {"split.start": SPLIT, "split.show": SPLIT}
    running = asyncio.create_task(cleavectl(server, "split", "start", "web1", "--wait", *arguments))
    while not any(method == "split.show" for method, _ in script.calls):
        await asyncio.sleep(0.01)
    server.notify("split.progress", split_row(name="other"))
    server.notify("split.progress", split_row(percent=100.0, counted=False))
    server.notify("split.progress", split_row(percent=70.0))
    server.notify("split.progress", end)
    return await running


async def test_waiting_for_a_split_writes_lines_and_ends_with_it(
    server: ControlListener, script: Script
) -> None:
    status, output, messages = await split_and_wait(server, script, DONE, "-o", "json")
    assert status == 0
    assert '"state": "done"' in output
    lines = messages.splitlines()
    assert [line.split(", ")[:2] for line in lines] == [
        ["split web1: running", "40.0 %"],
        ["split web1: running", "70.0 %"],
        ["split web1: done", "100.0 %"],
    ]
    assert "ETA 0:12" in lines[0]


async def test_waiting_for_a_split_that_pauses_fails_with_the_reason(
    server: ControlListener, script: Script
) -> None:
    paused = split_row(state="paused", reason="the pool is full")
    status, _, messages = await split_and_wait(server, script, paused)
    assert status == 1
    assert "the split of web1 is paused: the pool is full" in messages
    assert "cleavectl split show web1" in messages


@pytest.mark.parametrize(
    ("size", "words"), [("0", "above zero"), ("99999999TiB", "8192PiB"), ("10GB", "10GiB")]
)
async def test_what_is_no_size_of_a_vdisk_is_a_usage_error(
    server: ControlListener, size: str, words: str
) -> None:
    for command in (("create", "a", "--size"), ("resize", "a")):
        status, _, messages = await cleavectl(server, "vdisk", *command, size)
        assert status == 2
        assert words in messages


async def test_a_failed_check_is_exit_1(server: ControlListener, script: Script) -> None:
    script.answers["pool.check"] = example(
        rows.CheckReport, ok=False, errors=["VBN 7 is used twice"]
    )
    status, output, _ = await cleavectl(server, "pool", "check")
    assert status == 1
    assert "VBN 7 is used twice" in output


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("qemu", "file=iscsi://127.0.0.1:3260/iqn.2026-01.io.cleaved:a/0"),
        ("open-iscsi", "iscsiadm -m node -T iqn.2026-01.io.cleaved:a -p 127.0.0.1:3260 --login"),
        ("libiscsi", "iscsi://127.0.0.1:3260/iqn.2026-01.io.cleaved:a/0"),
        ("libvirt", "<host name='127.0.0.1' port='3260'/>"),
    ],
)
async def test_connect_prints_what_a_client_needs(
    server: ControlListener, script: Script, kind: str, words: str
) -> None:
    where = example(
        rows.Portal,
        name="a",
        target="iqn.2026-01.io.cleaved:a",
        portals=["127.0.0.1:3260"],
        allowed=True,
    )
    script.answers["connect"] = where
    status, output, _ = await cleavectl(server, "connect", "a", "--client", kind)
    assert status == 0
    assert words in output
    assert "SECRET" not in output
    script.answers["connect"] = msgspec.structs.replace(where, chap=True)
    _, output, _ = await cleavectl(server, "connect", "a", "--client", kind, "--portal", "san:1")
    assert "USER" in output
    assert "san:1" in output or "name='san'" in output
    assert "discovery" not in output  # it would ask for CHAP as well


def test_a_client_whose_greeting_fails_closes_its_socket(tmp_path: Path) -> None:
    """Found in a run of kills: the daemon was gone between the connection and its greeting."""
    path = str(tmp_path / "control")
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        closing = threading.Thread(target=lambda: listening.accept()[0].close())
        closing.start()
        with pytest.raises(Unreachable):
            ControlClient(path)
        closing.join()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
