"""`cleaved`: create a pool, serve it, check a configuration, check a pool that is not served.

Exit codes: 0 done (for serve: stopped in order), 1 failed, 2 a wrong command line or configuration,
4 a conflict: the pool is in use by another process, or something is already where one shall be
created.
"""

import sys
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from daemon import CONTROL_PATH_DEFAULT, VERSION
from daemon.process import runtime
from daemon.process.config import (
    Config,
    ConfigError,
    build,
    check_private,
    load_file,
    pool_size_bytes,
)
from protocol.control.errors import EXIT_CONFLICT, EXIT_FAILED, EXIT_USAGE
from storage.errors import Conflict, PoolLocked, StorageError

Command = TypeVar("Command", bound=Callable[..., Any])


# Stands for the dot between section and key where a Python name is wanted.
_DOT: Final = "__"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(VERSION)
def cleaved() -> None:
    """Block-storage daemon: live virtual disks over iSCSI, instant snapshots and clones, and online
    clone split.
    """


def setting(option: str, place: str, **more: Any) -> Callable[[Command], Command]:
    """An option that stands for ``SECTION.KEY`` of the configuration file."""
    return click.option(option, place.replace(".", _DOT), **more)


@cleaved.command()
@click.option(
    "--config", "config_path", metavar="FILE", help="TOML file; the other options win over it"
)
@setting("--pool", "pool.path", metavar="PATH", help="the pool: an ordinary file or a block device")
@setting(
    "--pool-size",
    "pool.size",
    metavar="SIZE",
    help=(
        "create the pool with this size, as in 64GiB, when no file is there yet, or a blank block"
        " device"
    ),
)
@setting(
    "--iscsi",
    "iscsi.listen",
    metavar="HOST:PORT",
    multiple=True,
    help="listen here; port 0 for any free one  [default: 127.0.0.1:3260]",
)
@setting(
    "--advertise",
    "iscsi.advertise",
    metavar="HOST:PORT",
    multiple=True,
    help="tell initiators this address instead of the local ones (behind NAT)",
)
@setting(
    "--open-access/--no-open-access",
    "iscsi.open_access",
    default=None,
    help="whether targets without a list of initiators are for everybody",
)
@setting(
    "--nbd",
    "nbd.listen",
    metavar="HOST:PORT|PATH",
    multiple=True,
    help="serve NBD here too; a path (with a slash) is a Unix socket",
)
@setting(
    "--control",
    "control.path",
    metavar="PATH",
    help=f"control socket  [default: {CONTROL_PATH_DEFAULT}]",
)
@setting("--log-level", "log.level", type=click.Choice(["debug", "info", "warning", "error"]))
@setting("--log-format", "log.format", type=click.Choice(["auto", "json", "text"]))
def serve(config_path: str | None, **options: Any) -> None:
    """Serve one pool until SIGTERM (or Ctrl-C, or the terminal is closed). Prints one line that
    names every listener when it is ready.
    """
    runtime.hold_standard_descriptors()
    config = read_config(config_path, options)
    runtime.tune_start()
    import uvloop  # noqa: PLC0415 -- check-config and --help need none of what follows

    from daemon import server  # noqa: PLC0415
    from daemon.control.listener import ControlPathBusy  # noqa: PLC0415
    from daemon.process import logs  # noqa: PLC0415
    from daemon.process.descriptors import TooFewDescriptors  # noqa: PLC0415
    from daemon.tcp.listener import ListenFailed  # noqa: PLC0415

    logs.set_up(config.log_level, config.log_format)
    try:
        server.create_pool(config)
        uvloop.run(server.run(config))
    except (ListenFailed, ControlPathBusy, TooFewDescriptors) as error:
        fail(str(error), EXIT_FAILED)


@cleaved.command()
@click.argument("path", metavar="PATH|DEVICE")
@click.option(
    "--size", metavar="SIZE", help="as in 64GiB; a block device is used whole unless given"
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="destroy what is there: a file, a file system, partitions, another pool",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="json has stable keys",
)
def create(path: str, size: str | None, overwrite: bool, output: str) -> None:
    """Make a new pool in a file (sparse) or on a block device.

    What is there already is not touched, unless --overwrite is given: a file, or on a device
    anything but zeros in the first and the last MiB. A device that is mounted or otherwise in use,
    and a pool that is served, are always refused. A creation that is interrupted leaves nothing
    behind that a new one, or `serve --pool-size`, stumbles over.
    """
    from daemon.admin.output import print_json, print_record  # noqa: PLC0415 -- not for serve
    from protocol.control.rows import NewPool, row_of  # noqa: PLC0415
    from storage.pool import Pool  # noqa: PLC0415

    size_bytes = None if size is None else pool_size_bytes("--size", size)
    made = row_of(NewPool, Pool.create(path, size_bytes, overwrite=overwrite))
    (print_json if output == "json" else print_record)(made)


@cleaved.command("check-config")
@click.argument("config_path", metavar="FILE")
def check_config(config_path: str) -> None:
    """Check a configuration file. Exit 2 names what is wrong."""
    read_config(config_path, {})
    click.echo(f"{config_path} is right")


@cleaved.command()
@click.argument("path")
@click.option(
    "--verify-data", is_flag=True, help="read every data block too, and compare its checksum"
)
@click.option(
    "--copy",
    is_flag=True,
    help=(
        "PATH is a copy of a pool that may be served meanwhile: do not ask whether its UUID is"
        " in use"
    ),
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="json has stable keys",
)
def check(path: str, verify_data: bool, copy: bool, output: str) -> None:
    """Check a pool that is not served; nothing is changed. Exit 1 when something is wrong."""
    from daemon.admin.output import print_json, print_record  # noqa: PLC0415 -- not for serve
    from protocol.control.rows import CheckReport, row_of  # noqa: PLC0415
    from storage.check import check_path  # noqa: PLC0415

    found = check_path(path, verify_data=verify_data, is_copy=copy)
    report = row_of(CheckReport, found.as_dict())
    if output == "json":
        print_json(report)
    else:
        print_record(report, without=("errors",))
        for error in report.errors:
            click.echo(error)
    if not report.ok:
        sys.exit(EXIT_FAILED)


def read_config(path: str | None, options: dict[str, Any]) -> Config:
    """The file, if any, with the command line laid over it. Raises ConfigError."""
    tables: dict[str, Any] = {} if path is None else load_file(path)
    given = {place: value for place, value in options.items() if value not in {None, ()}}
    if path is None and f"pool{_DOT}path" not in given:
        raise ConfigError("--pool is missing; give --pool PATH, or --config FILE")
    for place, value in given.items():
        section, key = place.split(_DOT)
        table = tables.setdefault(section, {})
        if isinstance(table, dict):  # what is no table is refused by build, which says so
            table[key] = list(value) if isinstance(value, tuple) else value
    config = build(tables)
    if path is not None and config.chap is not None:
        check_private(path)
    return config


def fail(message: str, exit_code: int) -> None:
    """Say why on stderr, and exit."""
    sys.stderr.write(f"cleaved: {message}\n")
    sys.exit(exit_code)


def main() -> None:
    """Entry point of the command."""
    try:
        cleaved.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(EXIT_FAILED)
    except ConfigError as error:
        fail(str(error), EXIT_USAGE)
    except (PoolLocked, Conflict) as error:
        fail(str(error), EXIT_CONFLICT)
    except StorageError as error:
        fail(str(error), EXIT_FAILED)
