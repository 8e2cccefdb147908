"""`cleavectl`: the global options, the groups of commands, and how it exits.

Each command is one call of the control socket; what differs is what it prints.

Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 daemon not reachable. Messages go
to stderr.
"""

import os
import sys
from importlib import import_module
from typing import Final

import click

from daemon import CONTROL_PATH_DEFAULT
from daemon.admin.client import Unreachable
from daemon.admin.command import OUTPUT_KINDS, Settings
from protocol.control.errors import EXIT_FAILED, EXIT_UNREACHABLE, ControlError

# The module of daemon.admin.commands that has each of them, by its own name.
COMMANDS: Final = {
    "vdisk": "vdisks",
    "snapshot": "vdisks",
    "clone": "vdisks",
    "split": "splits",
    "pool": "pool",
    "target": "access",
    "acl": "access",
    "chap": "access",
    "session": "sessions",
    "stats": "sessions",
    "connect": "sessions",
}


class Commands(click.Group):
    """Imports only the command that is called: start-up time counts."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command or group of this name."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"daemon.admin.commands.{COMMANDS[cmd_name]}")
        found: click.Command = getattr(module, cmd_name)
        return found


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
