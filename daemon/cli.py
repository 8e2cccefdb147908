"""`cleaved`: serve a pool, check a configuration, check a pool that is not served.

Exit codes: 0 done (for serve: stopped in order), 1 failed, 2 a wrong command line or configuration, 4 the pool is in use
by another process.
"""

import sys
from typing import Any

import click

from daemon import VERSION, runtime
from daemon.config import Config, ConfigError, build, check_private, load_file
from protocol.control.errors import EXIT_CONFLICT, EXIT_FAILED, EXIT_USAGE
from storage.errors import PoolLocked, StorageError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(VERSION)
def cleaved() -> None:
    """Block-storage daemon: live virtual disks over iSCSI, instant snapshots and clones, and online clone split."""


@cleaved.command()
@click.option("--config", "config_path", metavar="FILE", help="TOML file; the other options win over it")
@click.option("--pool", metavar="PATH", help="the pool: an ordinary file or a block device")
@click.option("--pool-size", metavar="SIZE", help="create the pool with this size when it does not exist yet, as in 64GiB")
@click.option("--iscsi", metavar="HOST:PORT", multiple=True, help="listen here; port 0 for any free one  [default: 127.0.0.1:3260]")
@click.option("--open-access/--no-open-access", default=None, help="whether targets without a list of initiators are for everybody")
@click.option("--control", metavar="PATH", help="control socket  [default: /run/cleaved/control.sock]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--log-format", type=click.Choice(["auto", "json", "text"]))
def serve(config_path: str | None, **options: Any) -> None:
    """Serve one pool until SIGTERM (or Ctrl-C, or the terminal is closed). Prints one line that names every listener when it is ready."""
    runtime.hold_standard_descriptors()
    config = read_config(config_path, options)
    runtime.tune_start()
    import uvloop  # noqa: PLC0415 -- check-config and --help need none of what follows

    from daemon import logs, server  # noqa: PLC0415
    from daemon.control import ControlPathBusy  # noqa: PLC0415
    from daemon.iscsi_listener import ListenFailed  # noqa: PLC0415

    logs.set_up(config.log_level, config.log_format)
    try:
        server.create_pool(config)
        uvloop.run(server.run(config))
    except (ListenFailed, ControlPathBusy) as error:
        fail(str(error), EXIT_FAILED)


@cleaved.command("check-config")
@click.argument("config_path", metavar="FILE")
def check_config(config_path: str) -> None:
    """Check a configuration file. Exit 2 names what is wrong."""
    read_config(config_path, {})
    click.echo(f"{config_path} is right")


@cleaved.command()
@click.argument("path")
@click.option("--verify-data", is_flag=True, help="read every data block too, and compare its checksum")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="json has stable keys")
def check(path: str, verify_data: bool, output: str) -> None:
    """Check a pool that is not served; nothing is changed. Exit 1 when something is wrong."""
    from daemon.admin.output import print_json, print_record  # noqa: PLC0415 -- serve needs none of this
    from storage.check import check_path  # noqa: PLC0415

    report = check_path(path, verify_data=verify_data).as_dict()
    if output == "json":
        print_json(report)
    else:
        errors = report.pop("errors")
        print_record(report)
        for error in errors:
            click.echo(error)
    if not report["ok"]:
        sys.exit(EXIT_FAILED)


def read_config(path: str | None, options: dict[str, Any]) -> Config:
    """The file, if any, with the command line laid over it. Raises ConfigError."""
    tables: dict[str, Any] = {} if path is None else load_file(path)
    places = {
        "pool": ("pool", "path"),
        "pool_size": ("pool", "size"),
        "iscsi": ("iscsi", "listen"),
        "open_access": ("iscsi", "open_access"),
        "control": ("control", "path"),
        "log_level": ("log", "level"),
        "log_format": ("log", "format"),
    }
    if path is None and options.get("pool") is None:
        raise ConfigError("--pool is missing; give --pool PATH, or --config FILE")
    for option, (section, key) in places.items():
        value = options.get(option)
        if value is not None and value != ():
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
    except PoolLocked as error:
        fail(str(error), EXIT_CONFLICT)
    except StorageError as error:
        fail(str(error), EXIT_FAILED)
