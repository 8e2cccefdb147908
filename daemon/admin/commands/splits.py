"""`cleavectl split`: separate clones from their backing store, and wait for that.

Waiting is no part of the split: it goes on when the waiting ends (Ctrl-C), and ``split start
--wait`` joins it again.
"""

import sys
from collections.abc import Callable, Collection
from typing import Final, get_args

import click
from click.core import ParameterSource

from daemon.admin.client import ControlClient
from daemon.admin.command import Settings, command, plain_commands
from daemon.admin.parameters import RATE
from daemon.admin.progress import progress_view
from daemon.process.units import format_size
from protocol.control import methods
from protocol.control.errors import CONFLICT, FAILED, ControlError
from protocol.control.parameters import SplitMode
from protocol.control.rows import Split

EVENT_SECONDS: Final = 2.0
# Each key of a split that an option of `split start` sets.
OPTIONS: Final = {"mode": "--mode", "rate_min_bytes": "--min-rate", "rate_max_bytes": "--max-rate"}


@click.group()
def split() -> None:
    """Separate clones from their backing store."""


plain_commands(
    split,
    methods.SplitList,
    methods.SplitShow,
    methods.SplitPause,
    methods.SplitCancel,
    methods.SplitEstimate,
)


@command(split, methods.SplitStart)
@click.argument("name")
@click.option(
    "--mode",
    type=click.Choice(get_args(SplitMode)),
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
def split_start(
    settings: Settings,
    name: str,
    mode: SplitMode,
    wait: bool,
    max_rate: int | None,
    min_rate: int | None,
) -> None:
    """Start to split a clone; it goes on in the background. With --wait, Ctrl-C ends only the
    waiting.
    """
    start = methods.SplitStart(
        name=name, mode=mode, rate_min_bytes=min_rate, rate_max_bytes=max_rate
    )
    if not wait:
        settings.run(start)
        return
    by_default = click.get_current_context().get_parameter_source("mode") is ParameterSource.DEFAULT
    asked_for = {key for key in OPTIONS if getattr(start, key) is not None}
    asked_for -= {"mode"} if by_default else set()
    with settings.client() as client:
        done = _wait_for_split(client, name, lambda: _start_or_join(client, start, asked_for))
    settings.show(methods.SplitShow, done)


@command(split, methods.SplitResume)
@click.argument("name")
@click.option("--wait", is_flag=True, help="show progress until it is done")
def split_resume(settings: Settings, name: str, wait: bool) -> None:
    """Resume a paused split. With --wait, Ctrl-C ends only the waiting."""
    resume = methods.SplitResume(name=name)
    if not wait:
        settings.run(resume)
        return
    with settings.client() as client:
        done = _wait_for_split(client, name, lambda: client.call(resume))
    settings.show(methods.SplitShow, done)


def _start_or_join(
    client: ControlClient, start: methods.SplitStart, asked_for: Collection[str]
) -> None:
    """Start it; where it runs already, say so, unless it was asked for with other options than
    those it has. Raises ControlError.
    """
    try:
        client.call(start)
    except ControlError as error:
        if error.code != CONFLICT:
            raise
        running = _running(client, start.name)
        if running is None:
            raise
        _check_same(running, start, asked_for)
        sys.stderr.write(
            f"cleavectl: the split of {start.name} runs already (mode {running.mode}): joining it\n"
        )


def _running(client: ControlClient, name: str) -> Split | None:
    """The split, if it runs."""
    try:
        found = client.call(methods.SplitShow(name=name))
    except ControlError:
        return None  # there is none: what `split.start` said is the answer
    return found if found.state == "running" else None


def _check_same(running: Split, start: methods.SplitStart, asked_for: Collection[str]) -> None:
    """Raise ControlError where a running split has other options than the command line names."""
    for key, option in OPTIONS.items():
        has = getattr(running, key)
        if key in asked_for and has != getattr(start, key):
            words = "none" if has is None else has if key == "mode" else f"{format_size(has)}/s"
            name = running.name
            raise ControlError(
                CONFLICT,
                f"the split of {name} runs already, with another {option} ({words})",
                f"to join it: cleavectl split start {name} --wait; to change that: cleavectl split"
                f" cancel {name}, then start it again",
            )


def _wait_for_split(client: ControlClient, name: str, begin: Callable[[], object]) -> Split:
    """``begin`` it, and show progress to its end; the final state. Raises ControlError when the
    split stops short of its end.
    """
    client.call(methods.Subscribe(events=[methods.SPLIT_PROGRESS]))
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
    if found.state != "done":
        reason = found.reason or "by request"
        raise ControlError(
            FAILED,
            f"the split of {name} is {found.state}: {reason}",
            f"cleavectl split show {name}",
        )
    return found


def _follow(client: ControlClient, name: str) -> Split:
    """Show progress until it runs no more."""
    with progress_view(name) as view:
        found = client.call(methods.SplitShow(name=name))
        view.update(found)
        while found.state == "running":
            update = client.event(EVENT_SECONDS)
            if update is None:
                # Progress comes several times a second: silence means that the split ended unseen,
                # or its vdisk was deleted.
                found = client.call(methods.SplitShow(name=name))
            elif isinstance(update, Split) and update.name == name:
                found = update
            view.update(found)
    return found
