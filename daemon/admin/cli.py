"""`cleavectl`: the commands. Each is one call of the control socket; what differs is what it
prints.

Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 daemon not reachable. Messages go
to stderr.
"""

import os
import sys
import time
from typing import Final

import click

from daemon.admin.access_commands import acl, chap, target
from daemon.admin.client import Unreachable
from daemon.admin.connect import CLIENTS, check_reachable, notes
from daemon.admin.output import print_json
from daemon.admin.parameters import DURATION, RATE, SIZE, SNAPSHOT
from daemon.admin.settings import Settings, confirm, with_output
from daemon.admin.split_commands import split
from daemon.process.units import format_exact
from protocol.control.errors import EXIT_FAILED, EXIT_UNREACHABLE, ControlError

CONTROL_PATH_DEFAULT: Final = "/run/cleaved/control.sock"

VDISK_COLUMNS: Final = ("name", "size_bytes", "used_bytes", "backing", "split")
SNAPSHOT_COLUMNS: Final = ("name", "size_bytes", "used_bytes", "clones", "created_ns")
SESSION_COLUMNS: Final = ("id", "initiator", "target", "address", "commands_in_flight")

SCRUB_POLL_SECONDS: Final = 0.5


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--control",
    envvar="CLEAVED_CONTROL",
    default=CONTROL_PATH_DEFAULT,
    show_default=True,
    help="the daemon's control socket",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="json has stable keys",
)
@click.pass_context
def cleavectl(ctx: click.Context, control: str, output: str) -> None:
    """Administer a running cleaved. Names are VDISK and VDISK@SNAPSHOT; sizes are written 10GiB.

    Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 daemon not reachable.
    """
    ctx.obj = Settings(control, output)


@cleavectl.group()
def vdisk() -> None:
    """Live virtual disks."""


@vdisk.command("create")
@click.argument("name")
@click.option("--size", type=SIZE, required=True)
@with_output
@click.pass_obj
def vdisk_create(settings: Settings, name: str, size: int) -> None:
    """Create an empty vdisk."""
    settings.show_with_warnings(settings.call("vdisk.create", name=name, size_bytes=size))


@vdisk.command("ls")
@with_output
@click.pass_obj
def vdisk_ls(settings: Settings) -> None:
    """List all vdisks."""
    settings.show(settings.call("vdisk.ls"), VDISK_COLUMNS)


@vdisk.command("show")
@click.argument("name")
@with_output
@click.pass_obj
def vdisk_show(settings: Settings, name: str) -> None:
    """Show one vdisk in full."""
    settings.show(settings.call("vdisk.show", name=name))


@vdisk.command("resize")
@click.argument("name")
@click.argument("size", type=SIZE)
@click.option(
    "--shrink",
    is_flag=True,
    help="a smaller size is meant: cut the end off, with the data in it; asks on a terminal",
)
@click.option(
    "--yes", is_flag=True, help="with --shrink: do not ask; needed where there is no terminal"
)
@with_output
@click.pass_obj
def vdisk_resize(settings: Settings, name: str, size: int, shrink: bool, yes: bool) -> None:
    """Change the size. A smaller one cuts the end off, with the data in it, and is refused without
    --shrink.
    """
    if shrink:
        before = settings.call("vdisk.show", name=name)["size_bytes"]
        if size < before:
            confirm(
                f"This cuts {format_exact(before - size)} off the end of vdisk {name}, with the"
                " data in them, for good",
                yes,
            )
    settings.show_with_warnings(
        settings.call("vdisk.resize", name=name, size_bytes=size, shrink=shrink)
    )


@vdisk.command("rename")
@click.argument("old")
@click.argument("new")
@with_output
@click.pass_obj
def vdisk_rename(settings: Settings, old: str, new: str) -> None:
    """Rename a vdisk; its iSCSI target name follows."""
    settings.show(settings.call("vdisk.rename", name=old, new_name=new))


@vdisk.command("rm")
@click.argument("name")
@with_output
@click.pass_obj
def vdisk_rm(settings: Settings, name: str) -> None:
    """Delete a vdisk. Its space is reclaimed in the background."""
    settings.show(settings.call("vdisk.rm", name=name))


@cleavectl.group()
def snapshot() -> None:
    """Read-only images of vdisks."""


@snapshot.command("create")
@click.argument("snapshots", type=SNAPSHOT, nargs=-1, required=True, metavar="VDISK@SNAPSHOT...")
@with_output
@click.pass_obj
def snapshot_create(settings: Settings, snapshots: tuple[str, ...]) -> None:
    """Take snapshots; several are of one moment, all or none."""
    settings.show_with_warnings(
        settings.call("snapshot.create", snapshots=list(snapshots)), SNAPSHOT_COLUMNS
    )


@snapshot.command("ls")
@click.argument("vdisk_name", metavar="[VDISK]", required=False)
@with_output
@click.pass_obj
def snapshot_ls(settings: Settings, vdisk_name: str | None) -> None:
    """List the snapshots of one vdisk, or all."""
    settings.show(settings.call("snapshot.ls", vdisk=vdisk_name), SNAPSHOT_COLUMNS)


@snapshot.command("rm")
@click.argument("name", type=SNAPSHOT, metavar="VDISK@SNAPSHOT")
@click.option(
    "--after-split",
    is_flag=True,
    help="where clones stand on it: delete it when the last of them has been split",
)
@with_output
@click.pass_obj
def snapshot_rm(settings: Settings, name: str, after_split: bool) -> None:
    """Delete a snapshot. Its space is reclaimed in the background."""
    settings.show(settings.call("snapshot.rm", snapshot=name, after_split=after_split))


@cleavectl.group()
def clone() -> None:
    """Writable clones of snapshots."""


@clone.command("create")
@click.argument("source", type=SNAPSHOT, metavar="VDISK@SNAPSHOT")
@click.argument("name")
@click.option("--split", is_flag=True, help="start to split it from its backing store at once")
@with_output
@click.pass_obj
def clone_create(settings: Settings, source: str, name: str, split: bool) -> None:
    """Create a clone; it is a vdisk like any other."""
    settings.show_with_warnings(
        settings.call("clone.create", snapshot=source, name=name, split=split)
    )


cleavectl.add_command(split)


@cleavectl.group()
def pool() -> None:
    """The pool that the daemon serves."""


@pool.command("show")
@with_output
@click.pass_obj
def pool_show(settings: Settings) -> None:
    """Show size, use and state."""
    settings.show(settings.call("pool.show"))


@pool.command("check")
@click.option(
    "--verify-data", is_flag=True, help="read every data block too, and compare its checksum"
)
@with_output
@click.pass_obj
def pool_check(settings: Settings, verify_data: bool) -> None:
    """Check the whole pool while it serves. Exit 1 when something is wrong."""
    report = settings.call("pool.check", verify_data=verify_data)
    settings.show(report)
    if not report["ok"]:
        sys.exit(EXIT_FAILED)


@pool.command("scrub")
@click.option(
    "--max-rate", type=RATE, metavar="SIZE/s", help="ceiling of the reading  [default: 64MiB/s]"
)
@click.option("--wait", is_flag=True, help="wait for its end; exit 1 when it found damage")
@click.option(
    "--show",
    "action",
    flag_value="pool.scrub_show",
    help="show the last one instead: progress, and what it found",
)
@click.option("--cancel", "action", flag_value="pool.scrub_cancel", help="end it instead")
@with_output
@click.pass_obj
def pool_scrub(settings: Settings, max_rate: int | None, wait: bool, action: str | None) -> None:
    """Read and verify every block in use, in the background; damage is named by vdisk or snapshot,
    and offset.
    """
    if action is not None:
        settings.show(settings.call(action))
        return
    with settings.client() as client:
        shown = client.call("pool.scrub", rate_max_bytes=max_rate)
        while wait and shown["state"] == "running":
            time.sleep(SCRUB_POLL_SECONDS)
            shown = client.call("pool.scrub_show")
    settings.show(shown)
    if shown["damages_total"] or shown["state"] == "failed":
        sys.exit(EXIT_FAILED)


cleavectl.add_command(target)
cleavectl.add_command(acl)
cleavectl.add_command(chap)


@cleavectl.group()
def session() -> None:
    """The iSCSI sessions."""


@session.command("ls")
@with_output
@click.pass_obj
def session_ls(settings: Settings) -> None:
    """List the open sessions."""
    settings.show(settings.call("session.ls"), SESSION_COLUMNS)


@session.command("end")
@click.argument("number", metavar="ID", type=click.IntRange(min=1))
@with_output
@click.pass_obj
def session_end(settings: Settings, number: int) -> None:
    """End a session (ID as session ls shows it), and wait for its end.

    Its initiator is asked to log out, and cut off after 5 s if it does not. One that still wants
    the disk logs in again: log out there, or shut it out by an access list (acl).
    """
    settings.show(settings.call("session.end", id=number))


@cleavectl.command()
@click.argument("name")
@click.option("--watch", is_flag=True, help="show what happens, until interrupted")
@click.option("--interval", type=DURATION, default="1s", show_default=True, help="of --watch")
@with_output
@click.pass_obj
def stats(settings: Settings, name: str, watch: bool, interval: float) -> None:
    """Counters of one vdisk since the daemon started."""
    if not watch:
        settings.show(settings.call("stats", name=name))
        return
    from daemon.admin.watch import watch_stats  # noqa: PLC0415 -- only for those who watch

    with settings.client() as client:
        watch_stats(lambda: client.call("stats", name=name), interval, settings.output)


@cleavectl.command()
@click.argument("name")
@click.option("--client", "kind", type=click.Choice(sorted(CLIENTS)), required=True)
@click.option(
    "--portal",
    help="HOST:PORT by which the client reaches the daemon, where that is not what it listens on",
)
@click.option(
    "--initiator", metavar="IQN", help="the client's iSCSI name, where the access list has several"
)
@with_output
@click.pass_obj
def connect(
    settings: Settings, name: str, kind: str, portal: str | None, initiator: str | None
) -> None:
    """Print what a client program needs to use a vdisk. Fails where a login would be refused, and
    says what opens access.
    """
    where = settings.call("connect", name=name, initiator=initiator)
    if portal is not None:
        where["portals"] = [portal]
    check_reachable(where)
    lines = CLIENTS[kind](where)
    if settings.output == "json":
        print_json({**where, "client": kind, "lines": lines, "notes": notes(where)})
    else:
        sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    sys.stderr.writelines(f"cleavectl: {note}\n" for note in notes(where))


def main() -> None:
    """Entry point of the command."""
    try:
        cleavectl.main(standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(EXIT_FAILED)
    except ControlError as error:
        _fail(error.message, error.next_step, error.exit_code)
    except Unreachable as error:
        _fail(str(error), None, EXIT_UNREACHABLE)
    except BrokenPipeError:
        # The reader (head, less) has gone: nobody is left to tell. stdout is replaced so that the
        # exit's flush does not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)


def _fail(message: str, next_step: str | None, exit_code: int) -> None:
    sys.stderr.write(f"cleavectl: {message}\n" + (f"  {next_step}\n" if next_step else ""))
    sys.exit(exit_code)
