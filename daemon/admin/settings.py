"""What the global options of `cleavectl` say, for the modules that hold its commands."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from daemon.admin.client import ControlClient
from daemon.admin.output import print_json, print_record, print_table

Command = TypeVar("Command", bound=Callable[..., Any])


class Settings:
    """What the global options say, and the connection, made when the command needs it."""

    def __init__(self, control: str, output: str) -> None:
        self.control = control
        self.output = output

    def client(self) -> ControlClient:
        """A new connection. Raises Unreachable."""
        return ControlClient(self.control)

    def call(self, method: str, **params: Any) -> Any:
        """One call over a connection of its own."""
        with self.client() as client:
            return client.call(method, **params)

    def show(self, value: Any, columns: tuple[str, ...] | None = None) -> None:
        """Print a result: a record, or the rows of a table."""
        if self.output == "json":
            print_json(value)
        elif columns is not None:
            print_table(value, columns)
        elif value is not None:
            print_record(value)

    def show_with_warnings(self, value: Any, columns: tuple[str, ...] | None = None) -> None:
        """Print a result, and on stderr what the daemon warns of: it is done, and yet somebody
        should know.
        """
        rows = value if isinstance(value, list) else [value]
        warnings = dict.fromkeys(warning for row in rows for warning in row.get("warnings", ()))
        if self.output == "table":
            for row in rows:
                row.pop("warnings", None)
        self.show(value, columns)
        sys.stdout.flush()
        sys.stderr.writelines(f"cleavectl: warning: {warning}\n" for warning in warnings)


def confirm(what: str, yes: bool) -> None:
    """Ask on the terminal before something is destroyed; ``yes``: it was answered beforehand.
    Raises UsageError, Abort.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{what}. There is no terminal to ask: give --yes if that is meant")
    if not click.confirm(f"{what}. Go on?", err=True):
        sys.stderr.write("cleavectl: nothing was changed\n")
        raise click.Abort


def _set_output(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Settings)
        ctx.obj.output = value


def with_output(command: Command) -> Command:
    """``-o`` after the command too: people and scripts write it in both places."""
    help_text = "table, or json with stable keys"
    option = click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        callback=_set_output,
        expose_value=False,
        help=help_text,
    )
    return option(command)
