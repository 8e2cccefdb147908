"""What the commands take: sizes, rates and durations as people write them, and
snapshots by name.
"""

from collections.abc import Callable
from typing import Any, Final

import click

from daemon.process.units import UnitError, parse_duration, parse_rate, parse_size


class Quantity(click.ParamType[float]):
    """A size, rate or duration; the usage error says what would be right."""

    def __init__(self, name: str, parse: Callable[[str], float]) -> None:
        self.name = name
        self._parse = parse

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Bytes, bytes a second, or seconds."""
        if not isinstance(value, str):
            return float(value)
        try:
            return self._parse(value)
        except UnitError as error:
            self.fail(str(error), param, ctx)


class SnapshotReference(click.ParamType[str]):
    """``VDISK@SNAPSHOT``."""

    name = "VDISK@SNAPSHOT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself, when it has one ``@`` inside."""
        vdisk, _, snapshot = str(value).partition("@")
        if not vdisk or not snapshot or "@" in snapshot:
            self.fail(
                f"{value!r} is not a snapshot; write VDISK@SNAPSHOT, as in golden@v1", param, ctx
            )
        return str(value)


def _vdisk_size(text: str) -> int:
    size_bytes = parse_size(text)
    if size_bytes == 0:
        raise UnitError(f"{text!r} is no size of a vdisk; write a size above zero, as in 10GiB")
    return size_bytes


SIZE: Final = Quantity("SIZE", _vdisk_size)
RATE: Final = Quantity("SIZE/s", parse_rate)
DURATION: Final = Quantity("DURATION", parse_duration)
SNAPSHOT: Final = SnapshotReference()
