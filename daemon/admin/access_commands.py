"""`cleavectl target`, `acl` and `chap`: which targets there are beside the vdisks' own, who may use
them, and what they must prove.

A TARGET is an iSCSI name, or the NAME after the daemon's prefix: a vdisk's, or that of a created
target. Secrets come from a file or a prompt, never from the command line, where every process of
the machine could read them.
"""

import sys
from typing import Any, Final

import click

from daemon.admin.settings import Settings, with_output
from protocol.control.limits import CHAP_CHARACTERS_MAX, CHAP_SECRET_CHARACTERS_MIN, LUN_MAX

TARGET_COLUMNS: Final = ("target", "luns", "initiators", "sessions")
ACL_COLUMNS: Final = ("target", "initiators")
CHAP_COLUMNS: Final = ("initiator", "user", "mutual_user")
# A secret and a line's end; what is longer is no secret file.
_SECRET_FILE_CHARACTERS_MAX: Final = 1024

Row = dict[str, Any]


def _show(
    settings: Settings, value: Row | list[Row], columns: tuple[str, ...] | None = None
) -> None:
    """Print; for people, LUNs as NUMBER=VDISK, and what no list and an empty list mean."""
    if settings.output == "table":
        value = _readable(value) if isinstance(value, dict) else [_readable(row) for row in value]
    settings.show(value, columns)


def _readable(row: Row) -> Row:
    shown = dict(row)
    if "luns" in row:
        shown["luns"] = [f"{lun['lun']}={lun['vdisk'] or '(missing)'}" for lun in row["luns"]]
    if "initiators" in row and not row["initiators"]:
        shown["initiators"] = "(no list)" if row["initiators"] is None else "(nobody)"
    return shown


@click.group()
def target() -> None:
    """Targets with LUNs of your choice, beside each vdisk's own."""


@target.command("create")
@click.argument("name", metavar="TARGET")
@with_output
@click.pass_obj
def target_create(settings: Settings, name: str) -> None:
    """Create a target without LUNs. Give it a list of initiators (acl add) before you map anything
    into it.
    """
    _show(settings, settings.call("target.create", target=name))


@target.command("ls")
@with_output
@click.pass_obj
def target_ls(settings: Settings) -> None:
    """List the targets that were created."""
    _show(settings, settings.call("target.ls"), TARGET_COLUMNS)


@target.command("rm")
@click.argument("name", metavar="TARGET")
@with_output
@click.pass_obj
def target_rm(settings: Settings, name: str) -> None:
    """Remove a created target; its vdisks stay."""
    _show(settings, settings.call("target.rm", target=name))


@target.command("map")
@click.argument("name", metavar="TARGET")
@click.argument("vdisk")
@click.option("--lun", type=click.IntRange(0, LUN_MAX), help="the lowest free one, if not given")
@with_output
@click.pass_obj
def target_map(settings: Settings, name: str, vdisk: str, lun: int | None) -> None:
    """Make a vdisk a LUN of a created target. Open sessions are told."""
    _show(settings, settings.call("target.map", target=name, vdisk=vdisk, lun=lun))


@target.command("unmap")
@click.argument("name", metavar="TARGET")
@click.argument("vdisk", required=False)
@click.option("--lun", type=click.IntRange(0, LUN_MAX), help="instead of the vdisk's name")
@with_output
@click.pass_obj
def target_unmap(settings: Settings, name: str, vdisk: str | None, lun: int | None) -> None:
    """Take a LUN out of a created target. Open sessions are told."""
    if (vdisk is None) == (lun is None):
        raise click.UsageError("name the LUN by its VDISK or by --lun, one of them")
    _show(settings, settings.call("target.unmap", target=name, vdisk=vdisk, lun=lun))


@click.group()
def acl() -> None:
    """Lists of the initiators that may use a target."""


@acl.command("add")
@click.argument("name", metavar="TARGET")
@click.argument("initiators", nargs=-1, required=True, metavar="INITIATOR...")
@with_output
@click.pass_obj
def acl_add(settings: Settings, name: str, initiators: tuple[str, ...]) -> None:
    """Let initiators use a target. From the first one on, nobody else may: sessions of others are
    ended.
    """
    _show(settings, settings.call("acl.add", target=name, initiators=list(initiators)))


@acl.command("rm")
@click.argument("name", metavar="TARGET")
@click.argument("initiator")
@with_output
@click.pass_obj
def acl_rm(settings: Settings, name: str, initiator: str) -> None:
    """Take an initiator off the list, and end its sessions. An empty list lets nobody in; acl clear
    removes it.
    """
    _show(settings, settings.call("acl.rm", target=name, initiator=initiator))


@acl.command("clear")
@click.argument("name", metavar="TARGET")
@with_output
@click.pass_obj
def acl_clear(settings: Settings, name: str) -> None:
    """Remove a target's list: it is for everybody where access is open (iscsi.open_access), else
    for nobody.
    """
    _show(settings, settings.call("acl.clear", target=name))


@acl.command("ls")
@click.argument("name", metavar="[TARGET]", required=False)
@with_output
@click.pass_obj
def acl_ls(settings: Settings, name: str | None) -> None:
    """Show the lists of all targets that have one, or of one."""
    _show(settings, settings.call("acl.ls", target=name), ACL_COLUMNS)


@click.group()
def chap() -> None:
    """What single initiators must prove."""


@chap.command("set")
@click.argument("initiator")
@click.option("--user", help="the name that the initiator gives  [default: its iSCSI name]")
@click.option(
    "--secret-file",
    metavar="FILE",
    help="first line: the secret; - for standard input. Without it you are asked",
)
@click.option("--mutual-user", metavar="USER", help="the target proves itself too, by this name")
@click.option("--mutual-secret-file", metavar="FILE", help="the target's secret, likewise")
@with_output
@click.pass_obj
def chap_set(
    settings: Settings,
    initiator: str,
    user: str | None,
    secret_file: str | None,
    mutual_user: str | None,
    mutual_secret_file: str | None,
) -> None:
    """Set an initiator's CHAP credentials, in the place of those that it has. They count from its
    next login on.
    """
    if mutual_secret_file is not None and mutual_user is None:
        raise click.UsageError("--mutual-secret-file needs --mutual-user USER")
    params: Row = {
        "initiator": initiator,
        "user": user or initiator,
        "secret": _secret(secret_file, "Secret", "--secret-file"),
    }
    if mutual_user is not None:
        params["mutual_user"] = mutual_user
        params["mutual_secret"] = _secret(
            mutual_secret_file, "Mutual secret", "--mutual-secret-file"
        )
    settings.show(settings.call("chap.set", **params))


@chap.command("rm")
@click.argument("initiator")
@with_output
@click.pass_obj
def chap_rm(settings: Settings, initiator: str) -> None:
    """Remove an initiator's credentials. Those of the configuration file, if any, are asked of it
    then.
    """
    settings.show(settings.call("chap.rm", initiator=initiator))


@chap.command("ls")
@with_output
@click.pass_obj
def chap_ls(settings: Settings) -> None:
    """List who has credentials. Secrets are never shown."""
    settings.show(settings.call("chap.ls"), CHAP_COLUMNS)


def _secret(path: str | None, what: str, option: str) -> str:
    """From a file's first line, or asked twice on the terminal. Raises UsageError, which never
    repeats what was given.
    """
    secret = _ask(what, option) if path is None else _read_line(path, option)
    if not CHAP_SECRET_CHARACTERS_MIN <= len(secret) <= CHAP_CHARACTERS_MAX:
        raise click.UsageError(
            f"{option}: {len(secret)} characters; a secret has {CHAP_SECRET_CHARACTERS_MIN} to"
            f" {CHAP_CHARACTERS_MAX}"
        )
    return secret


def _ask(what: str, option: str) -> str:
    if not sys.stdin.isatty():
        raise click.UsageError(
            f"there is no terminal to ask for a secret; give {option} FILE, - for standard input"
        )
    return str(click.prompt(what, hide_input=True, confirmation_prompt=True, err=True))


def _read_line(path: str, option: str) -> str:
    try:
        with click.open_file(path, encoding="utf-8") as file:
            text: str = file.read(_SECRET_FILE_CHARACTERS_MAX)
    except OSError as error:
        raise click.UsageError(f"{option} {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise click.UsageError(f"{option} {path}: not text") from None
    return text.partition("\n")[0].rstrip("\r")
