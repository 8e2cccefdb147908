"""`cleavectl session`, `stats` and `connect`."""

import sys

import click
import msgspec

from daemon.admin.client_lines import (
    CLIENTS,
    NBD_CLIENTS,
    ClientLines,
    check_nbd,
    check_reachable,
    notes,
)
from daemon.admin.command import Settings, command, plain_commands
from daemon.admin.output import print_json
from daemon.admin.parameters import DURATION
from daemon.admin.stats_watch import watch_stats
from protocol.control import methods


@click.group()
def session() -> None:
    """The sessions of iSCSI and NBD."""


plain_commands(session, methods.SessionList)


@command(session, methods.SessionEnd)
@click.argument("number", metavar="ID", type=click.IntRange(min=1))
def session_end(settings: Settings, number: int) -> None:
    """End a session (ID as session ls shows it), and wait for its end.

    Its initiator is asked to log out, an NBD client gets the protocol's shutdown; it is cut off
    after 5 s if it does not end. One that still wants
    the disk logs in again: log out there, or shut it out by an access list (acl).
    """
    settings.run(methods.SessionEnd(id=number))


@command(None, methods.Stats)
@click.argument("name")
@click.option("--watch", is_flag=True, help="show what happens, until interrupted")
@click.option("--interval", type=DURATION, default="1s", show_default=True, help="of --watch")
def stats(settings: Settings, name: str, watch: bool, interval: float) -> None:
    """Counters of one vdisk since the daemon started."""
    if not watch:
        settings.run(methods.Stats(name=name))
        return
    with settings.client() as client:
        watch_stats(lambda: client.call(methods.Stats(name=name)), interval, settings.output)


@command(None, methods.Connect)
@click.argument("name")
@click.option("--client", "kind", type=click.Choice(sorted(CLIENTS)), required=True)
@click.option(
    "--portal",
    help="HOST:PORT by which the client reaches the daemon, where that is not what it listens on",
)
@click.option(
    "--initiator", metavar="IQN", help="the client's iSCSI name, where the access list has several"
)
def connect(
    settings: Settings, name: str, kind: str, portal: str | None, initiator: str | None
) -> None:
    """Print what a client program needs to use a vdisk. Fails where a login would be refused, and
    says what opens access.
    """
    where = settings.call(methods.Connect(name=name, initiator=initiator))
    if portal is not None:
        where = msgspec.structs.replace(where, portals=[portal], nbd=[portal])
    is_nbd = kind in NBD_CLIENTS
    (check_nbd if is_nbd else check_reachable)(where)
    lines = CLIENTS[kind](where)
    left_open = [] if is_nbd else notes(where)
    if settings.output == "json":
        print_json(
            ClientLines(**msgspec.structs.asdict(where), client=kind, lines=lines, notes=left_open)
        )
    else:
        sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    sys.stderr.writelines(f"cleavectl: {note}\n" for note in left_open)
