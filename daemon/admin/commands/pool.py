"""`cleavectl pool`."""

import sys
import time
from typing import Final

import click

from daemon.admin.command import Settings, command, plain_commands
from daemon.admin.parameters import RATE
from protocol.control import methods
from protocol.control.errors import EXIT_FAILED

SCRUB_POLL_SECONDS: Final = 0.5


@click.group()
def pool() -> None:
    """The pool that the daemon serves."""


plain_commands(pool, methods.PoolShow)


@command(pool, methods.PoolCheck)
@click.option(
    "--verify-data", is_flag=True, help="read every data block too, and compare its checksum"
)
def pool_check(settings: Settings, verify_data: bool) -> None:
    """Check the whole pool while it serves. Exit 1 when something is wrong."""
    report = settings.call(methods.PoolCheck(verify_data=verify_data))
    settings.show(methods.PoolCheck, report)
    if not report.ok:
        sys.exit(EXIT_FAILED)


@command(pool, methods.PoolScrub)
@click.option(
    "--max-rate", type=RATE, metavar="SIZE/s", help="ceiling of the reading  [default: 64MiB/s]"
)
@click.option("--wait", is_flag=True, help="wait for its end; exit 1 when it found damage")
@click.option(
    "--show",
    "instead",
    flag_value="show",
    help="show the last one instead: progress, and what it found",
)
@click.option("--cancel", "instead", flag_value="cancel", help="end it instead")
def pool_scrub(settings: Settings, max_rate: int | None, wait: bool, instead: str | None) -> None:
    """Read and verify every block in use, in the background; damage is named by vdisk or snapshot,
    and offset.
    """
    if instead is not None:
        settings.run(methods.PoolScrubShow() if instead == "show" else methods.PoolScrubCancel())
        return
    with settings.client() as client:
        scrub = client.call(methods.PoolScrub(rate_max_bytes=max_rate))
        while wait and scrub.state == "running":
            time.sleep(SCRUB_POLL_SECONDS)
            scrub = client.call(methods.PoolScrubShow())
    settings.show(methods.PoolScrub, scrub)
    if scrub.damages_total or scrub.state == "failed":
        sys.exit(EXIT_FAILED)
