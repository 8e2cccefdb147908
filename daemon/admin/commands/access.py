"""`cleavectl target`, `acl` and `chap`: which targets there are beside the vdisks' own, who may use
them, and what they must prove.

A TARGET is an iSCSI name, or the NAME after the daemon's prefix: a vdisk's, or that of a created
target. Secrets come from a file or a prompt, never from the command line, where every process of
the machine could read them.
"""

import sys
from typing import Final

import click

from daemon.admin.command import Settings, command, plain_commands
from protocol.control import methods
from protocol.control.limits import CHAP_CHARACTERS_MAX, CHAP_SECRET_CHARACTERS_MIN, LUN_MAX

# A secret and a line's end; what is longer is no secret file.
_SECRET_FILE_CHARACTERS_MAX: Final = 1024


@click.group()
def target() -> None:
    """Targets with LUNs of your choice, beside each vdisk's own."""


plain_commands(target, methods.TargetCreate, methods.TargetList, methods.TargetDelete)


@command(target, methods.TargetMap)
@click.argument("name", metavar="TARGET")
@click.argument("vdisk")
@click.option("--lun", type=click.IntRange(0, LUN_MAX), help="the lowest free one, if not given")
def target_map(settings: Settings, name: str, vdisk: str, lun: int | None) -> None:
    """Make a vdisk a LUN of a created target. Open sessions are told."""
    settings.run(methods.TargetMap(target=name, vdisk=vdisk, lun=lun))


@command(target, methods.TargetUnmap)
@click.argument("name", metavar="TARGET")
@click.argument("vdisk", required=False)
@click.option("--lun", type=click.IntRange(0, LUN_MAX), help="instead of the vdisk's name")
def target_unmap(settings: Settings, name: str, vdisk: str | None, lun: int | None) -> None:
    """Take a LUN out of a created target. Open sessions are told."""
    if (vdisk is None) == (lun is None):
        raise click.UsageError("name the LUN by its VDISK or by --lun, one of them")
    settings.run(methods.TargetUnmap(target=name, vdisk=vdisk, lun=lun))


@click.group()
def acl() -> None:
    """Lists of the initiators that may use a target."""


plain_commands(acl, methods.AclClear, methods.AclList)


@command(acl, methods.AclAdd)
@click.argument("name", metavar="TARGET")
@click.argument("initiators", nargs=-1, required=True, metavar="INITIATOR...")
def acl_add(settings: Settings, name: str, initiators: tuple[str, ...]) -> None:
    """Let initiators use a target. From the first one on, nobody else may: sessions of others are
    ended.
    """
    settings.run(methods.AclAdd(target=name, initiators=list(initiators)))


@command(acl, methods.AclRemove)
@click.argument("name", metavar="TARGET")
@click.argument("initiator")
def acl_rm(settings: Settings, name: str, initiator: str) -> None:
    """Take an initiator off the list, and end its sessions. An empty list lets nobody in; acl clear
    removes it.
    """
    settings.run(methods.AclRemove(target=name, initiator=initiator))


@click.group()
def chap() -> None:
    """What single initiators must prove."""


plain_commands(chap, methods.ChapDelete, methods.ChapList)


@command(chap, methods.ChapSet)
@click.argument("initiator")
@click.option("--user", help="the name that the initiator gives  [default: its iSCSI name]")
@click.option(
    "--secret-file",
    metavar="FILE",
    help="first line: the secret; - for standard input. Without it you are asked",
)
@click.option("--mutual-user", metavar="USER", help="the target proves itself too, by this name")
@click.option("--mutual-secret-file", metavar="FILE", help="the target's secret, likewise")
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
    secret = _secret(secret_file, "Secret", "--secret-file")
    mutual_secret = None
    if mutual_user is not None:
        mutual_secret = _secret(mutual_secret_file, "Mutual secret", "--mutual-secret-file")
    settings.run(
        methods.ChapSet(
            initiator=initiator,
            user=user or initiator,
            secret=secret,
            mutual_user=mutual_user,
            mutual_secret=mutual_secret,
        )
    )


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
