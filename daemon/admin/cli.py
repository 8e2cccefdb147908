"""`cleavectl`: the global options, the groups of commands, and how it exits.

Each command is one call of the control socket; what differs is what it prints.

Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 daemon not reachable. Messages go
to stderr.
"""

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Final

import click

from daemon import CONTROL_PATH_DEFAULT
from daemon.admin.client import Unreachable
from daemon.admin.command import OUTPUT_KINDS, Settings
from protocol.control.errors import EXIT_FAILED, EXIT_UNREACHABLE, ControlError


class Commands(click.Group):
    """Imports only the command that is called: start-up time counts."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command or group of this name."""
        find = COMMANDS.get(cmd_name)
        if find is None:
            return None
        found: click.Command = getattr(find(), cmd_name)
        return found


def _vdisks() -> ModuleType:
    from daemon.admin.commands import vdisks  # noqa: PLC0415 -- see Commands

    return vdisks


def _splits() -> ModuleType:
    from daemon.admin.commands import splits  # noqa: PLC0415

    return splits


def _pool() -> ModuleType:
    from daemon.admin.commands import pool  # noqa: PLC0415

    return pool


def _access() -> ModuleType:
    from daemon.admin.commands import access  # noqa: PLC0415

    return access


def _sessions() -> ModuleType:
    from daemon.admin.commands import sessions  # noqa: PLC0415

    return sessions


# The module that has each of them, by its own name.
COMMANDS: Final[dict[str, Callable[[], ModuleType]]] = {
    "vdisk": _vdisks,
    "snapshot": _vdisks,
    "clone": _vdisks,
    "split": _splits,
    "pool": _pool,
    "target": _access,
    "acl": _access,
    "chap": _access,
    "session": _sessions,
    "stats": _sessions,
    "connect": _sessions,
}


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
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
    type=OUTPUT_KINDS,
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
