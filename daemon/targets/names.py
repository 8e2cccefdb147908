"""Which vdisk, or which created target, an iSCSI name stands for.

ISCSI names have no case (`protocol.names`): a vdisk Web1 is announced as ...:web1, and reached by
any spelling. No new name can be like another but for its case. Pools of earlier versions may hold
such names: two vdisks, or a vdisk and a created target. Each of them is announced and reached as it
is spelled, as it was then; any other spelling, which could mean either, reaches neither. So no host
finds another disk than before. They are logged at each start (``target.names_collide``), and one of
them has to be renamed.
"""

from collections.abc import Collection
from typing import Final, NamedTuple

from daemon.pool.volumes import Volumes
from daemon.process.logs import get_log
from daemon.targets.table import TargetTable
from protocol.names import fold

TARGET_PREFIX: Final = "iqn.2026-01.io.cleaved:"
_NEXT_STEP: Final = (
    "iSCSI names have no case, and each of these is reached by this spelling only: log out the"
    " hosts of one, let them forget its name, give it another with cleavectl vdisk rename, and"
    " discover again"
)


class Named(NamedTuple):
    """A target by the name that it is announced by. ``vdisk`` is the name of its vdisk; None for a
    created target.
    """

    name: str
    vdisk: str | None


class TargetNames:
    """Everything is looked up in the pool and in the table, which change."""

    def __init__(self, pool: Volumes, table: TargetTable) -> None:
        self._pool = pool
        self._table = table

    def alike(self, target_name: str) -> list[Named]:
        """All that have this name in any case, each with the name as it is spelled."""
        folded = fold(target_name)
        vdisk = folded.removeprefix(TARGET_PREFIX)
        found = (
            []
            if vdisk == folded or "@" in vdisk
            else [Named(TARGET_PREFIX + name, name) for name in self._pool.names_alike(vdisk)]
        )
        return [*found, Named(folded, None)] if folded in self._table.targets else found

    def find(self, target_name: str) -> Named | None:
        """What an initiator means by this name; None for nothing, and where it could
        mean several.
        """
        found = self.alike(target_name)
        if len(found) == 1:
            return Named(fold(target_name), found[0].vdisk)
        if fold(target_name).startswith(
            TARGET_PREFIX
        ):  # of that prefix nobody knows another spelling
            target_name = TARGET_PREFIX + target_name[len(TARGET_PREFIX) :]
        return next((named for named in found if named.name == target_name), None)

    def announced(self, vdisk: str) -> str:
        """The name of a vdisk's own target."""
        spelled = TARGET_PREFIX + vdisk
        return fold(spelled) if len(self.alike(spelled)) == 1 else spelled

    def announced_all(self, vdisks: Collection[str]) -> list[str]:
        """Those of many vdisks: mostly no name has upper-case letters, and each is announced as it
        is.
        """
        with_case = self._pool.names_with_case()
        return [
            self.announced(name) if with_case and fold(name) in with_case else TARGET_PREFIX + name
            for name in vdisks
        ]

    def log_collisions(self) -> None:
        """Warn of names that are alike but for their case."""
        for folded in sorted(self._pool.names_with_case()):
            names = [named.name for named in self.alike(TARGET_PREFIX + folded)]
            if len(names) > 1:
                get_log().warning("target.names_collide", names=names, next_step=_NEXT_STEP)
