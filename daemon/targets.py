"""Which iSCSI targets there are, and who uses them: every vdisk is the target TARGET_PREFIX + NAME, with the vdisk as LUN 0.

Satisfies `protocol.iscsi.node.TargetDirectory`. Nothing is kept for a vdisk that nobody uses: the pool's names are the targets.
"""

import itertools
from typing import Any, Final

from daemon.config import Chap
from daemon.logs import get_log
from daemon.pool_interface import AttachableVolume, Row, Volumes
from protocol.iscsi.chap import ChapSecrets
from protocol.iscsi.node import SessionView, TargetDefinition
from storage.errors import NotFound

TARGET_PREFIX: Final = "iqn.2026-01.io.cleaved:"


class Targets:
    """The directory that the wire asks, and the record of its sessions. Sessions attach the volumes that they use."""

    def __init__(self, pool: Volumes, chap: Chap | None) -> None:
        self._pool = pool
        self._chap = None if chap is None else _secrets(chap)
        self._sessions: dict[SessionView, tuple[str, AttachableVolume | None]] = {}
        self._numbers = itertools.count(1)

    @property
    def chap_required(self) -> bool:
        """Initiators must authenticate."""
        return self._chap is not None

    # --- What the wire asks (TargetDirectory) ----------------------------------------------------------------------

    def names_for(self, initiator_name: str, portal: str) -> list[str]:
        """Every initiator may discover every vdisk, through every portal."""
        return [TARGET_PREFIX + name for name in self._pool.names()]

    def open_target(self, target_name: str, initiator_name: str) -> TargetDefinition | None:
        """The target of a vdisk that exists; snapshots are no targets."""
        volume = self._volume_of(target_name)
        return None if volume is None else TargetDefinition(target_name, {0: volume}, self._chap)

    def _volume_of(self, target_name: str) -> AttachableVolume | None:
        """None where there is no such vdisk: never was, or deleted or renamed while somebody logged in."""
        name = target_name.removeprefix(TARGET_PREFIX)
        if name == target_name or "@" in name:
            return None
        try:
            return self._pool.volume(name)
        except NotFound:
            return None

    def discovery_chap(self, initiator_name: str) -> ChapSecrets | None:
        """Names of vdisks are shown to those who may use them only."""
        return self._chap

    def session_opened(self, session: SessionView) -> None:
        """Attach the vdisk for as long as the session lives."""
        label = f"{session.initiator_name} (session {next(self._numbers)})"
        volume = self._volume_of(session.target_name) if session.target_name else None
        if volume is not None:
            volume.attach(label)
        self._sessions[session] = (label, volume)
        get_log().info("session.opened", initiator=session.initiator_name, target=session.target_name)

    def session_closed(self, session: SessionView) -> None:
        """Detach. No command of the session can touch the vdisk any more."""
        label, volume = self._sessions.pop(session)
        if volume is not None:
            volume.detach(label)
        get_log().info("session.closed", initiator=session.initiator_name, target=session.target_name)

    # --- What the control service asks -----------------------------------------------------------------------------

    @staticmethod
    def target_name(vdisk: str) -> str:
        """The iSCSI name of a vdisk's target."""
        return TARGET_PREFIX + vdisk

    def sessions(self) -> list[Row]:
        """One row a session, sorted by target and initiator."""
        rows: list[dict[str, Any]] = [dict(session.describe()) for session in self._sessions]
        return sorted(rows, key=lambda row: (str(row.get("target")), str(row.get("initiator"))))

    def stats(self, vdisk: str) -> Row:
        """Counters of one vdisk since the daemon started. Raises NotFound."""
        volume = self._pool.volume(vdisk)
        using = sum(1 for _, used in self._sessions.values() if used is not None and used.name == vdisk)
        return {"name": vdisk, **_counters(volume), "sessions": using}


def _counters(volume: AttachableVolume) -> Row:
    transfers = {"reads": volume.reads, "writes": volume.writes, "read_bytes": volume.read_bytes, "written_bytes": volume.written_bytes}
    return {**transfers, "trims": volume.trims, "flushes": volume.flushes}


def _secrets(chap: Chap) -> ChapSecrets:
    mutual = None if chap.mutual_secret is None else chap.mutual_secret.encode()
    return ChapSecrets(chap.user, chap.secret.encode(), chap.mutual_user, mutual)
