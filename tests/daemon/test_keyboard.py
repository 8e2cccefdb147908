"""For the person at the keyboard: what is asked before data go, what is said when something is in
the way, and what to do about it.
"""

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from daemon.admin.client_lines import CLIENTS, NBD_CLIENTS, check_nbd, check_reachable, notes
from daemon.control.listener import ControlListener
from daemon.iscsi.initiator import INITIATOR_NAME
from protocol.control import calls, rows
from protocol.control.definition import row_type
from protocol.control.errors import CONFLICT, NOT_FOUND, ControlError
from tests.daemon.fakes import example, split_row
from tests.daemon.programs import CLEAVECTL, ROOT, Daemon, run
from tests.daemon.test_control_socket import DONE, SPLIT, Script, cleavectl
from tests.daemon.test_end_to_end import connect

ANNA, BERTA = "iqn.2026-01.io.example:anna", "iqn.2026-01.io.example:berta"
SECRET = "correct-horse-battery"
MIB = 1 << 20


@pytest.fixture
def script() -> Script:
    return Script()


@pytest_asyncio.fixture
async def server(tmp_path: Path, script: Script) -> AsyncIterator[ControlListener]:
    found = ControlListener(str(tmp_path / "control.sock"), script.call)
    await found.start()
    yield found
    await found.stop(0.1)


async def on_a_terminal(server: ControlListener, answer: str, *arguments: str) -> tuple[int, str]:
    """Run `cleavectl` on a terminal of its own, and answer its question; its exit code and all that
    the terminal showed.
    """
    master, slave = pty.openpty()
    command = (sys.executable, "-c", CLEAVECTL, "--control", server.path, *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True
    )
    os.close(slave)
    shown = b""
    while b"[y/N]" not in shown:
        shown += await asyncio.to_thread(os.read, master, 4096)
    os.write(master, answer.encode() + b"\n")
    status = await process.wait()
    os.close(master)
    return status, shown.decode()


# --- Shrinking ------------------------------------------------------------------------------------


async def test_a_vdisk_is_cut_only_when_that_is_said_twice_in_a_script(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "3MiB")
        refused = await daemon.try_ctl("vdisk", "resize", "a", "1MiB")
        assert (refused.status, refused.output) == (4, "")
        assert "cut off its last 2 MiB (2,097,152 bytes)" in refused.messages
        assert "cleavectl vdisk resize a 1048576 --shrink" in refused.messages
        unasked = await daemon.try_ctl("vdisk", "resize", "a", "1MiB", "--shrink")
        assert (unasked.status, unasked.output) == (2, "")
        assert "cuts 2 MiB (2,097,152 bytes)" in unasked.messages
        assert "--yes" in unasked.messages
        assert (await daemon.ctl("vdisk", "show", "a"))["size_bytes"] == 3 * MIB
        assert (await daemon.ctl("vdisk", "resize", "a", "4MiB"))[
            "size_bytes"
        ] == 4 * MIB  # growing needs nothing of it
        assert (await daemon.ctl("vdisk", "resize", "a", "4MiB", "--shrink"))[
            "size_bytes"
        ] == 4 * MIB
        assert (await daemon.ctl("vdisk", "resize", "a", "1MiB", "--shrink", "--yes"))[
            "size_bytes"
        ] == MIB


@pytest.mark.parametrize(
    ("answer", "status", "methods"),
    [("y", 0, ["vdisk.show", "vdisk.resize"]), ("n", 1, ["vdisk.show"])],
)
async def test_on_a_terminal_shrinking_is_asked_for(
    server: ControlListener, script: Script, answer: str, status: int, methods: list[str]
) -> None:
    script.answers |= {
        "vdisk.show": example(rows.VdiskDetail, size_bytes=10 << 30),
        "vdisk.resize": example(rows.ResizedVdisk, size_bytes=1 << 30),
    }
    found, shown = await on_a_terminal(server, answer, "vdisk", "resize", "a", "1GiB", "--shrink")
    assert found == status
    assert "cuts 9 GiB (9,663,676,416 bytes) off the end of vdisk a" in " ".join(shown.split())
    assert [method for method, _ in script.calls if method != "hello"] == methods


# --- A pool without room --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "arguments", "many"),
    [
        ("vdisk.create", ("vdisk", "create", "a", "--size", "1MiB"), False),
        ("vdisk.resize", ("vdisk", "resize", "a", "1MiB"), False),
        ("snapshot.create", ("snapshot", "create", "a@s", "a@t"), True),
        ("clone.create", ("clone", "create", "a@s", "b"), False),
    ],
)
async def test_warnings_go_to_stderr_once(
    server: ControlListener, script: Script, method: str, arguments: tuple[str, ...], many: bool
) -> None:
    kind = row_type(calls.METHODS[method])
    row = example(kind, name="a", warnings=["the pool is full: delete something"])
    script.answers[method] = [row, row] if many else row
    for output in ("json", "table"):
        status, text, messages = await cleavectl(server, "-o", output, *arguments)
        assert (status, messages) == (0, "cleavectl: warning: the pool is full: delete something\n")
        assert ("pool is full" in text) == (output == "json")


# --- Sessions -------------------------------------------------------------------------------------


async def test_what_an_error_names_is_what_session_ls_shows_and_session_end_takes(
    tmp_path: Path,
) -> None:
    """A vdisk was "in use by ... (session 4)", `session ls` showed another number, and no command
    ended one.
    """
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "other", "--size", "1MiB")
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        async with await connect(daemon, "other"):
            disk = await connect(daemon, "a")
            numbers = {
                row["target"].rpartition(":")[2]: row["id"]
                for row in await daemon.ctl("session", "ls")
            }
            busy = await daemon.try_ctl("vdisk", "rm", "a")
            assert busy.status == 4
            assert f"in use by {INITIATOR_NAME} (session {numbers['a']})" in busy.messages
            assert f"cleavectl session end {numbers['a']}" in busy.messages
            listed = await daemon.try_ctl("session", "ls")
            assert listed.output.splitlines()[0].startswith("ID ")

            ending = asyncio.create_task(daemon.ctl("session", "end", str(numbers["a"])))
            while not disk._connection.logout_requested:
                await asyncio.sleep(0)
            await disk.read(0, 512)  # commands are still answered
            await disk.close()  # as RFC 7143 11.9 wants it
            assert (await ending)["ended"]
            await daemon.ctl("vdisk", "rm", "a")
            assert [row["id"] for row in await daemon.ctl("session", "ls")] == [numbers["other"]]
            assert (await daemon.try_ctl("session", "end", str(numbers["a"]))).status == 3
        events = [
            (event["event"], event.get("id"))
            for event in daemon.events()
            if event["event"].startswith("session.")
        ]
        assert ("session.ending", numbers["a"]) in events
        assert ("session.closed", numbers["a"]) in events


async def test_an_initiator_that_does_not_log_out_is_cut_off(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        disk = await connect(daemon, "a")
        (row,) = await daemon.ctl("session", "ls")
        assert await daemon.ctl("session", "end", str(row["id"])) == {
            "id": row["id"], "initiator": row["initiator"], "target": row["target"], "ended": True,
        }  # fmt: skip
        await daemon.ctl("vdisk", "rm", "a")
        await disk.close()


# --- Waiting for a split --------------------------------------------------------------------------

RUNNING = ControlError(
    CONFLICT, "the split of web1 is running and cannot start: possible now: cancel, pause"
)


async def called(script: Script, method: str, times: int = 1) -> None:
    while sum(name == method for name, _ in script.calls) < times:
        await asyncio.sleep(0.01)


async def test_waiting_for_a_split_that_runs_joins_it(
    server: ControlListener, script: Script
) -> None:
    script.answers |= {
        "split.start": RUNNING,
        "split.show": split_row(rate_max_bytes=MIB),
    }
    joining = asyncio.create_task(
        cleavectl(server, "-o", "json", "split", "start", "web1", "--wait", "--max-rate", "1MiB/s")
    )
    await called(script, "split.show", 2)
    server.notify("split.progress", DONE)
    status, output, messages = await joining
    assert status == 0, messages
    assert json.loads(output)["state"] == "done"
    assert "cleavectl: the split of web1 runs already (mode copy): joining it" in messages


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--mode", "share"), "--mode (copy)"), (("--max-rate", "2MiB/s"), "--max-rate (1 MiB/s)")],
)
async def test_a_split_that_runs_with_other_options_is_not_joined(
    server: ControlListener, script: Script, options: tuple[str, ...], words: str
) -> None:
    script.answers |= {"split.start": RUNNING, "split.show": split_row(rate_max_bytes=MIB)}
    status, output, messages = await cleavectl(server, "split", "start", "web1", "--wait", *options)
    assert (status, output) == (4, "")
    assert f"with another {words}" in messages
    assert "cleavectl split cancel web1" in messages


@pytest.mark.parametrize(
    "shown", [split_row(state="paused"), ControlError(NOT_FOUND, "web1 has no split")]
)
async def test_what_does_not_run_is_not_joined(
    server: ControlListener, script: Script, shown: Any
) -> None:
    script.answers |= {"split.start": RUNNING, "split.show": shown}
    status, _, messages = await cleavectl(server, "split", "start", "web1", "--wait")
    assert status == 4
    assert messages == f"cleavectl: {RUNNING.message}\n"


@pytest.mark.parametrize("command", ["start", "resume"])
async def test_ctrl_c_says_that_the_split_goes_on(
    server: ControlListener, script: Script, command: str
) -> None:
    script.answers |= {"split.start": SPLIT, "split.resume": SPLIT, "split.show": SPLIT}
    arguments = (
        sys.executable,
        "-c",
        CLEAVECTL,
        "--control",
        server.path,
        "split",
        command,
        "web1",
        "--wait",
    )
    process = await asyncio.create_subprocess_exec(
        *arguments, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stderr is not None
    shown = await process.stderr.readline()  # its first line of progress: it waits
    process.send_signal(signal.SIGINT)
    shown += await process.stderr.read()
    assert await process.wait() == 1
    assert b"goes on without this command" in shown
    assert b"cleavectl split start web1 --wait" in shown
    assert b"cleavectl split cancel web1" in shown
    assert b"Traceback" not in shown


async def test_resume_can_wait(server: ControlListener, script: Script) -> None:
    script.answers |= {"split.resume": SPLIT, "split.show": SPLIT}
    waiting = asyncio.create_task(
        cleavectl(server, "-o", "json", "split", "resume", "web1", "--wait")
    )
    await called(script, "split.show")
    server.notify("split.progress", DONE)
    status, output, _ = await waiting
    assert status == 0
    assert json.loads(output)["state"] == "done"


# --- Connecting -----------------------------------------------------------------------------------


def where(**access: Any) -> rows.Portal:
    """Of a vdisk that is for everybody, unless ``access`` says otherwise."""
    usual = {
        "name": "a",
        "target": "iqn.2026-01.io.cleaved:a",
        "portals": ["127.0.0.1:3260", "10.0.0.1:3260"],
        "allowed": True,
    }
    return example(rows.Portal, **{**usual, **access})


@pytest.mark.parametrize(
    ("access", "words"),
    [
        ({"allowed": False}, "access is not open (iscsi.open_access)"),
        ({"allowed": False, "initiators": []}, "the access list of a is empty"),
        (
            {"allowed": False, "initiators": [ANNA], "initiator": BERTA},
            f"{BERTA} is not on the access list of a",
        ),
    ],
)
def test_a_line_that_could_not_work_is_not_printed(access: dict[str, Any], words: str) -> None:
    with pytest.raises(ControlError) as caught:
        check_reachable(where(**access))
    assert words in caught.value.message
    assert (
        caught.value.next_step
        == f"to let a client in: cleavectl acl add a {access.get('initiator') or 'INITIATOR'}"
    )
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("qemu", f"-iscsi initiator-name={ANNA},user=anna,password-secret=chap"),
        ("open-iscsi", f"InitiatorName={ANNA}\n"),
        ("open-iscsi", "node.session.auth.username -v anna\n"),
        ("libiscsi", f"iscsi-inq -i {ANNA} iscsi://anna%SECRET@"),
        ("libvirt", f"<initiator><iqn name='{ANNA}'/></initiator>"),
        ("libvirt", "<auth username='anna'>"),
    ],
)
def test_the_lines_hold_the_names_that_the_login_needs(kind: str, words: str) -> None:
    found = where(initiators=[ANNA], initiator=ANNA, chap=True, chap_user="anna")
    lines = "\n".join(CLIENTS[kind](found)) + "\n"
    assert words in lines
    assert (
        "10.0.0.1" in lines
    )  # another machine does not reach the loopback address, which comes first
    assert "USER" not in lines


@pytest.mark.parametrize("kind", sorted(NBD_CLIENTS))
def test_lines_for_nbd_name_what_the_client_can_reach(kind: str) -> None:
    listens = ["127.0.0.1:10809", "10.0.0.1:10809", "/run/cleaved/nbd.sock"]
    for nbd_open, wanted in ((True, "10.0.0.1"), (False, "/run/cleaved/nbd.sock")):
        found = where(nbd=listens, nbd_open=nbd_open)
        check_nbd(found)
        lines = "\n".join(CLIENTS[kind](found))
        assert wanted in lines
        assert "127.0.0.1" not in lines


@pytest.mark.parametrize(
    ("nbd", "words"), [([], "does not serve NBD"), (["10.0.0.1:1"], "not open")]
)
def test_lines_for_nbd_that_could_not_work_are_not_printed(nbd: list[str], words: str) -> None:
    with pytest.raises(ControlError, match=words):
        check_nbd(where(nbd=nbd, nbd_open=False))


@pytest.mark.parametrize("kind", sorted(CLIENTS.keys() - NBD_CLIENTS))
def test_where_any_of_several_may_the_name_is_left_open_and_a_note_says_so(kind: str) -> None:
    several = where(initiators=[ANNA, BERTA])
    assert "INITIATOR" in "\n".join(CLIENTS[kind](several))
    assert ANNA in notes(several)[0]
    assert BERTA in notes(several)[0]
    assert "INITIATOR" not in "\n".join(CLIENTS[kind](where()))


def test_notes() -> None:
    assert notes(where()) == []
    (loopback,) = notes(where(portals=["127.0.0.1:3260", "[::1]:3260"]))
    assert "this machine alone" in loopback
    many = [f"{ANNA}{number}" for number in range(20)]
    assert "and 15 more (cleavectl acl ls a)" in notes(where(initiators=many))[0]
    (chap,) = notes(where(chap=True))
    assert "USER is the client's CHAP user (cleavectl chap ls)" in chap


@pytest.mark.client("iscsi-inq")
async def test_what_connect_prints_works_where_it_is_printed(tmp_path: Path) -> None:
    """It printed the same line whatever the access list said, and the login was refused."""
    (tmp_path / "secret").write_text(SECRET)
    async with Daemon(tmp_path, options=("--no-open-access",)) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        closed = await daemon.try_ctl("connect", "a", "--client", "libiscsi")
        assert (closed.status, closed.output) == (4, "")
        assert "cleavectl acl add a INITIATOR" in closed.messages
        await daemon.ctl("acl", "add", "a", ANNA)
        shown = await daemon.ctl("connect", "a", "--client", "libiscsi")
        assert (shown["initiator"], shown["chap"], shown["allowed"]) == (ANNA, False, True)
        assert (await run("sh", "-c", shown["lines"][-1])).status == 0
        assert (await run("sh", "-c", shown["lines"][-1].replace(f"-i {ANNA}", ""))).status != 0
        await daemon.ctl(
            "chap", "set", ANNA, "--user", "anna", "--secret-file", str(tmp_path / "secret")
        )
        shown = await daemon.ctl("connect", "a", "--client", "libiscsi")
        assert (await run("sh", "-c", shown["lines"][-1].replace("SECRET", SECRET))).status == 0
        assert (await run("sh", "-c", shown["lines"][-1])).status != 0
        refused = await daemon.try_ctl("connect", "a", "--client", "libiscsi", "--initiator", BERTA)
        assert refused.status == 4
        assert f"cleavectl acl add a {BERTA}" in refused.messages


@pytest.mark.client("qemu-system-x86_64")
async def test_what_connect_prints_for_qemu_works(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "a", "--size", "1MiB")
        await daemon.ctl("acl", "add", "a", ANNA)
        await daemon.ctl(
            "chap", "set", ANNA, "--user", "anna", "--secret-file", str(tmp_path / "secret")
        )
        shown = await daemon.ctl("connect", "a", "--client", "qemu")
        lines = " ".join(shown["lines"]).replace("SECRETFILE", str(tmp_path / "secret"))
        machine = (
            "qemu-system-x86_64 -machine q35 -accel tcg -nodefaults -display none -S -monitor stdio"
        )
        result = await run("sh", "-c", f"echo quit | {machine} {lines}")
        assert result.status == 0, result
        assert [
            event["initiator"] for event in daemon.events() if event["event"] == "session.opened"
        ] == [ANNA], result
