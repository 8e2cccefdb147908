"""`cleavectl split`: separate clones from their backing store, and wait for that.

Who waits is no part of the split: it goes on when the waiting ends (Ctrl-C), and ``split start
--wait`` joins it again.
"""

import sys
from collections.abc import Callable
from typing import Any, Final

import click
from click.core import ParameterSource

from daemon.admin.client import ControlClient
from daemon.admin.parameters import RATE
from daemon.admin.settings import Settings, with_output
from daemon.process.units import format_size
from protocol.control.errors import CONFLICT, FAILED, ControlError

SPLIT_COLUMNS: Final = (
    "name",
    "state",
    "mode",
    "percent",
    "holes_remaining",
    "rate_bytes_per_second",
    "eta_seconds",
    "reason",
)
NOTIFICATION_SECONDS: Final = 2.0

Row = dict[str, Any]


@click.group()
def split() -> None:
    """Separate clones from their backing store."""


@split.command("start")
@click.argument("name")
@click.option(
    "--mode",
    type=click.Choice(["copy", "share"]),
    default="copy",
    show_default=True,
    help="share moves no data",
)
@click.option(
    "--wait", is_flag=True, help="show progress until it is done; joins a split that runs already"
)
@click.option("--max-rate", type=RATE, metavar="SIZE/s", help="ceiling of the copying")
@click.option(
    "--min-rate", type=RATE, metavar="SIZE/s", help="floor of the copying, kept under any load"
)
@with_output
@click.pass_context
def split_start(
    ctx: click.Context, name: str, mode: str, wait: bool, max_rate: int | None, min_rate: int | None
) -> None:
    """Start to split a clone; it goes on in the background. With --wait, Ctrl-C ends only the
    waiting.
    """
    settings: Settings = ctx.obj
    wanted = {"mode": mode, "rate_min_bytes": min_rate, "rate_max_bytes": max_rate}
    with settings.client() as client:
        if not wait:
            settings.show(client.call("split.start", name=name, **wanted))
            return
        asked_for = {key: value for key, value in wanted.items() if value is not None}
        if ctx.get_parameter_source("mode") is ParameterSource.DEFAULT:
            del asked_for["mode"]
        settings.show(
            _wait_for_split(client, name, lambda: _start_or_join(client, name, wanted, asked_for))
        )


@split.command("resume")
@click.argument("name")
@click.option("--wait", is_flag=True, help="show progress until it is done")
@with_output
@click.pass_obj
def split_resume(settings: Settings, name: str, wait: bool) -> None:
    """Resume a paused split. With --wait, Ctrl-C ends only the waiting."""
    with settings.client() as client:
        if not wait:
            settings.show(client.call("split.resume", name=name))
            return
        settings.show(_wait_for_split(client, name, lambda: client.call("split.resume", name=name)))


def _split_command(name: str, method: str, summary: str) -> None:
    """The commands that take a name and show the split."""

    @split.command(name, help=summary)
    @click.argument("name")
    @with_output
    @click.pass_obj
    def run(settings: Settings, name: str) -> None:
        settings.show(settings.call(method, name=name))


_split_command("show", "split.show", "Show state and progress of one split.")
_split_command("pause", "split.pause", "Pause a split; resume goes on where it was.")
_split_command("cancel", "split.cancel", "Cancel a split; the clone keeps its backing store.")
_split_command("estimate", "split.estimate", "How much would be copied, and how long that takes.")


@split.command("ls")
@with_output
@click.pass_obj
def split_ls(settings: Settings) -> None:
    """List the splits that run or are paused."""
    settings.show(settings.call("split.ls"), SPLIT_COLUMNS)


def _start_or_join(client: ControlClient, name: str, wanted: Row, asked_for: Row) -> None:
    """Start it; where it runs already, say so, unless it was asked for with other options than
    those it has. Raises ControlError.
    """
    try:
        client.call("split.start", name=name, **wanted)
    except ControlError as error:
        if error.code != CONFLICT:
            raise
        running = _running(client, name)
        if running is None:
            raise
        _check_same(running, asked_for)
        sys.stderr.write(
            f"cleavectl: the split of {name} runs already (mode {running['mode']}): joining it\n"
        )


def _running(client: ControlClient, name: str) -> Row | None:
    """The split, if it runs."""
    try:
        found: Row = client.call("split.show", name=name)
    except ControlError:
        return None  # there is none: what `split.start` said is the answer
    return found if found["state"] == "running" else None


def _check_same(running: Row, asked_for: Row) -> None:
    """Raise ControlError where a running split has other options than the command line names."""
    for key, value in asked_for.items():
        has = running.get(key)
        if has != value:
            option = {
                "mode": "--mode",
                "rate_min_bytes": "--min-rate",
                "rate_max_bytes": "--max-rate",
            }[key]
            words = "none" if has is None else has if key == "mode" else f"{format_size(has)}/s"
            name = running["name"]
            raise ControlError(
                CONFLICT,
                f"the split of {name} runs already, with another {option} ({words})",
                f"to join it: cleavectl split start {name} --wait; to change that: cleavectl split"
                f" cancel {name}, then start it again",
            )


def _wait_for_split(client: ControlClient, name: str, begin: Callable[[], object]) -> Row:
    """``begin`` it, and show progress to its end; the final state. Raises ControlError when the
    split stops short of its end.
    """
    client.call("rpc.subscribe", events=["split.progress"])
    try:
        begin()
        found = _follow(client, name)
    except KeyboardInterrupt:
        sys.stderr.write(
            f"\ncleavectl: the split of {name} goes on without this command\n  to wait for it"
            f" again: cleavectl split start {name} --wait; to end it: cleavectl split cancel"
            f" {name}\n"
        )
        raise click.Abort from None
    if found["state"] != "done":
        reason = found.get("reason") or "by request"
        raise ControlError(
            FAILED,
            f"the split of {name} is {found['state']}: {reason}",
            f"cleavectl split show {name}",
        )
    return found


def _follow(client: ControlClient, name: str) -> Row:
    """Show progress until it runs no more."""
    from daemon.admin.progress import progress_view  # noqa: PLC0415 -- only for those who wait

    with progress_view(name) as view:
        found: Row = client.call("split.show", name=name)
        view.update(found)
        while found["state"] == "running":
            update = client.notification(NOTIFICATION_SECONDS)
            if update is None:
                # Progress comes several times a second: silence means that the split ended unseen,
                # or its vdisk was deleted.
                found = client.call("split.show", name=name)
            elif update.params["name"] == name:
                found = update.params
            view.update(found)
    return found
