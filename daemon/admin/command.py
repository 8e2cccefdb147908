"""What all commands of `cleavectl` are made with: the global options, the connection, and the
decorators that turn a method of the control socket into a command.
"""

import sys
from collections.abc import Callable
from typing import Any, Final

import click
import msgspec

from daemon.admin.client import ControlClient
from daemon.admin.output import print_answer
from protocol.control.definition import AnyMethod, Method, Result

Function = Callable[..., object]


class Settings:
    """What the global options say, and the connection, made when the command needs it."""

    def __init__(self, control: str, output: str) -> None:
        self.control = control
        self.output = output

    def client(self) -> ControlClient:
        """A new connection. Raises Unreachable."""
        return ControlClient(self.control)

    def call(self, call: Method[Result]) -> Result:
        """One call over a connection of its own."""
        with self.client() as client:
            return client.call(call)

    def run(self, call: AnyMethod) -> None:
        """One call, and its answer printed."""
        self.show(type(call), self.call(call))

    def show(self, method: type[AnyMethod], answer: Any) -> None:
        """Print an answer of a method, and on stderr what the daemon warns of: it is done, and yet
        somebody should know.
        """
        print_answer(method, answer, self.output)
        sys.stdout.flush()
        rows = answer if isinstance(answer, list) else [answer]
        warnings = dict.fromkeys(
            warning for row in rows for warning in getattr(row, "warnings", ())
        )
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


def command(
    group: click.Group | None, method: type[AnyMethod]
) -> Callable[[Function], click.Command]:
    """Decorates the function behind a command that calls ``method``, and is named as it is; without
    a group, `daemon.admin.cli` adds it. The function takes `Settings` and what click's options and
    arguments say; its docstring is the help.
    """

    def decorate(function: Function) -> click.Command:
        name = method.METHOD.rpartition(".")[2]
        found = click.command(name)(click.pass_obj(function))
        found.params.append(_output_option())
        if group is not None:
            group.add_command(found)
        return found

    return decorate


def plain_commands(group: click.Group, *methods: type[AnyMethod]) -> None:
    """Commands that only call a method and print its answer. The method says all of it: its
    parameters are the arguments, its docstring the help.
    """
    for method in methods:

        def call(settings: Settings, method: type[AnyMethod] = method, **given: str) -> None:
            settings.run(method(**given))

        call.__doc__ = method.__doc__
        for field in reversed(msgspec.structs.fields(method)):
            click.argument(field.name, required=field.required)(call)
        command(group, method)(call)


OUTPUT_KINDS: Final = click.Choice(["table", "json"])


def _set_output(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Settings)
        ctx.obj.output = value


def _output_option() -> click.Option:
    """``-o`` after the command too: people and scripts write it in both places."""
    return click.Option(
        ["-o", "--output"],
        type=OUTPUT_KINDS,
        callback=_set_output,
        expose_value=False,
        help="table, or json with stable keys",
    )
