"""Which targets there are, who uses them, and what they must prove."""

import pytest

from daemon.process.config import Chap
from daemon.targets.administration import TARGET, VDISK, TargetAdministration
from daemon.targets.directory import Targets
from protocol.control.errors import ControlError
from protocol.control.rows import COUNTERS
from storage.errors import Conflict
from storage.vdisks.counters import Counters
from tests.daemon.fakes import MemoryPool, RecordedWire, call, control_service

PREFIX = "iqn.2026-01.io.cleaved:"


class Session:
    def __init__(self, target_name: str, initiator_name: str = "iqn.2026-01.test:i") -> None:
        self.target_name = target_name
        self.initiator_name = initiator_name
        self.peer_address = "127.0.0.1:50000"

    def describe(self) -> dict[str, object]:
        return {
            "initiator": self.initiator_name,
            "target": self.target_name,
            "address": self.peer_address,
            "portal": "127.0.0.1:3260",
            "tsih": 1,
            "state": "active",
            "header_digest": False,
            "data_digest": False,
            "commands_in_flight": 0,
            "commands": 0,
            "read_bytes": 0,
            "write_bytes": 0,
        }


def test_every_vdisk_is_a_target_with_itself_as_lun_0() -> None:
    pool = MemoryPool(b=4096, a=8192)
    targets = Targets(pool, None)
    assert targets.names_for("i", "p") == [f"{PREFIX}a", f"{PREFIX}b"]
    definition = targets.open_target(f"{PREFIX}a", "i")
    assert definition is not None
    assert definition.luns == {0: pool.volumes["a"]}
    assert definition.chap is None


@pytest.mark.parametrize(
    "name", ["", "a", PREFIX, f"{PREFIX}none", f"{PREFIX}a@s", "iqn.2026-01.io.other:a"]
)
def test_what_is_no_target(name: str) -> None:
    pool = MemoryPool(a=4096)
    pool.volumes["a@s"] = pool.volumes["a"]
    assert Targets(pool, None).open_target(name, "i") is None


def test_chap_is_asked_of_sessions_and_of_discovery() -> None:
    targets = Targets(MemoryPool(a=4096), Chap("u", "s" * 12, "m", "t" * 12))
    definition = targets.open_target(f"{PREFIX}a", "i")
    assert definition is not None
    for secrets in (definition.chap, targets.discovery_chap("i")):
        assert secrets is not None
        assert (secrets.user, secrets.secret, secrets.target_user, secrets.target_secret) == (
            "u",
            b"s" * 12,
            "m",
            b"t" * 12,
        )


def test_sessions_attach_their_volume_until_they_close() -> None:
    pool = MemoryPool(a=4096)
    targets = Targets(pool, None)
    first, second, discovery = (
        Session(f"{PREFIX}a"),
        Session(f"{PREFIX}a", "iqn.2026-01.test:j"),
        Session(""),
    )
    for session in (first, second, discovery):
        targets.session_opened(session)
    assert len(set(pool.volumes["a"].labels)) == 2
    assert [row.initiator for row in targets.sessions.rows()] == [
        "iqn.2026-01.test:i",
        "iqn.2026-01.test:i",
        "iqn.2026-01.test:j",
    ]
    assert targets.sessions.count_using("a") == 2
    for session in (first, second, discovery):
        targets.session_closed(session)
    assert pool.volumes["a"].labels == []
    assert targets.sessions.rows() == []


@pytest.mark.parametrize("kind", [VDISK, TARGET])
def test_a_name_that_open_sessions_came_by_is_not_given_to_another_disk(kind: str) -> None:
    pool = MemoryPool(Prod=4096, other=4096)
    targets = Targets(pool, None)
    administration = TargetAdministration(targets)
    session = Session(f"{PREFIX}Prod")
    targets.session_opened(session)
    renamed = pool.volumes["old"] = pool.volumes.pop("Prod")
    renamed.name = "old"
    for taken in ("Prod", "prod"):  # iSCSI names are compared in lower case
        with (
            pytest.raises(Conflict, match=r"test:i \(session 1\) came by the name"),
            administration.claim(kind, taken),
        ):
            pass
    with pytest.raises(Conflict), administration.claim(kind, "Prod", pool.volumes["other"]):
        pass
    with administration.claim(kind, "Prod", renamed), administration.claim(kind, "new"):
        pass  # its own name may come back
    targets.session_closed(session)
    with administration.claim(kind, "prod"):
        pass


def test_a_vdisk_that_goes_while_somebody_logs_in_is_no_error() -> None:
    targets = Targets(MemoryPool(), None)
    session = Session(f"{PREFIX}gone")
    targets.session_opened(session)
    assert len(targets.sessions.rows()) == 1
    targets.session_closed(session)


async def test_stats_are_the_volumes_counters() -> None:
    pool = MemoryPool(a=4096)
    service = control_service(pool, Targets(pool, None), RecordedWire())
    pool.volumes["a"].counters.reads = 5
    assert (await call(service, "stats", name="a")).reads == 5
    with pytest.raises(ControlError, match="there is no vdisk none"):
        await call(service, "stats", name="none")


def test_every_counter_of_a_volume_is_shown() -> None:
    assert set(COUNTERS) == set(Counters.__slots__)
