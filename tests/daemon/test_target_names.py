"""ISCSI names have no case: what is announced, what is reached, what is refused, and what becomes
of pools that hold such names.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from daemon.iscsi.initiator import Initiator
from daemon.iscsi.listener import IscsiListener
from daemon.process.addresses import Address
from daemon.targets.access import Credentials
from daemon.targets.administration import TARGET, VDISK, TargetAdministration
from daemon.targets.directory import Targets
from daemon.targets.names import TARGET_PREFIX
from protocol.iscsi.chap import ChapSecrets
from protocol.iscsi.initiator.login import InitiatorSettings
from storage.errors import Conflict, NotFound
from tests.daemon.fakes import MemoryPool
from tests.daemon.programs import Daemon
from tests.daemon.test_targets import Session

ANNA = "iqn.2026-01.test:anna"


def reached(targets: Targets, spelled: str) -> tuple[str, list[str]] | None:
    """The name of the session's target and its disks."""
    opened = targets.open_target(spelled, ANNA)
    return (
        None if opened is None else (opened.name, [volume.name for volume in opened.luns.values()])
    )


def with_names(pool: MemoryPool, *names: str) -> MemoryPool:
    """A pool of an earlier version: nothing kept such names out."""
    for name in names:
        pool.volumes[name] = MemoryPool(**{name: 4096}).volumes[name]
    return pool


@pytest.mark.parametrize("spelled", ["web1", "Web1", "WEB1"])
def test_a_vdisk_is_announced_in_lower_case_and_reached_in_any(spelled: str) -> None:
    targets = Targets(MemoryPool(Web1=4096, other=4096), None)
    assert targets.names_for(ANNA, "p") == [f"{TARGET_PREFIX}other", f"{TARGET_PREFIX}web1"]
    for prefix in (TARGET_PREFIX, TARGET_PREFIX.upper()):
        assert reached(targets, prefix + spelled) == (f"{TARGET_PREFIX}web1", ["Web1"])
    assert targets.names.announced("Web1") == f"{TARGET_PREFIX}web1"
    assert targets.named(spelled).luns[0].name == "Web1"


async def test_a_vdisk_and_a_target_cannot_differ_in_case_alone() -> None:
    administration = TargetAdministration(Targets(MemoryPool(TT=4096), None))
    for name in ("tt", "TT", "Tt"):
        with pytest.raises(Conflict, match="target of vdisk TT"):
            await administration.create(name)
    await administration.create("Cluster")
    for name in ("cluster", "CLUSTER"):
        with (
            pytest.raises(Conflict, match=f"target {name.lower()}"),
            administration.claim(VDISK, name),
        ):
            pytest.fail("a vdisk of the name of a target")
    with administration.claim(VDISK, "New"), pytest.raises(Conflict, match="vdisk new"):
        await administration.create("NEW")
    with (
        administration.claim(TARGET, "new"),
        pytest.raises(Conflict),
        administration.claim(VDISK, "New"),
    ):
        pytest.fail("both were made at the same time")


@pytest.mark.logs("names_collide")
async def test_old_names_that_collide_are_reached_as_they_are_spelled_and_no_other_way(
    capsys: Any,
) -> None:
    pool = with_names(MemoryPool(), "Web1", "web1", "WEB2", "Web2", "alone")
    targets = Targets(pool, None)
    targets.load()
    assert capsys.readouterr().out.count("target.names_collide") == 2
    announced = [TARGET_PREFIX + name for name in ("WEB2", "Web1", "Web2", "alone", "web1")]
    assert targets.names_for(ANNA, "p") == announced
    for name in announced:
        assert reached(targets, name) == (name, [name.removeprefix(TARGET_PREFIX)])
        assert reached(targets, name.replace(TARGET_PREFIX, TARGET_PREFIX.upper())) == reached(
            targets, name
        )
    for name in ("WEB1", "web2"):
        assert reached(targets, TARGET_PREFIX + name) is None
        with pytest.raises(Conflict, match="rename one"):
            targets.named(name)
    with pytest.raises(NotFound):
        targets.named("none")
    pool.volumes["other"] = pool.volumes.pop("web1")
    assert reached(targets, f"{TARGET_PREFIX}WEB1") == (f"{TARGET_PREFIX}web1", ["Web1"])


@pytest.mark.logs("names_collide")
async def test_an_old_vdisk_beside_a_target_of_its_name(capsys: Any) -> None:
    pool = MemoryPool(other=4096)
    earlier = TargetAdministration(Targets(pool, None))
    await earlier.create("tt")
    await earlier.map("tt", pool.volumes["other"], None)
    targets = Targets(with_names(pool, "TT"), None)
    targets.load()
    assert f"{TARGET_PREFIX}TT" in capsys.readouterr().out
    assert reached(targets, f"{TARGET_PREFIX}TT") == (f"{TARGET_PREFIX}TT", ["TT"])
    assert reached(targets, f"{TARGET_PREFIX}tt") == (f"{TARGET_PREFIX}tt", ["other"])
    assert reached(targets, f"{TARGET_PREFIX}Tt") is None


@pytest.mark.logs("names_collide")
async def test_a_rename_does_not_send_hosts_to_the_other_disk() -> None:
    pool = with_names(MemoryPool(), "Web1", "web1")
    targets = Targets(pool, None)
    administration = TargetAdministration(targets)
    session = Session(f"{TARGET_PREFIX}Web1")
    targets.session_opened(session)
    with (
        pytest.raises(Conflict, match=f"find {TARGET_PREFIX}web1 instead of Web1"),
        administration.claim(VDISK, "new", pool.volumes["Web1"]),
    ):
        pytest.fail("the host would find the other disk when it connects again")
    with administration.claim(VDISK, "new", pool.volumes["web1"]):
        pass
    targets.session_closed(session)
    with administration.claim(VDISK, "new", pool.volumes["Web1"]):
        pass


@pytest.mark.parametrize("user", [None, "Somebody"])
async def test_a_chap_user_that_is_the_initiators_name_has_no_case(user: str | None) -> None:
    pool = MemoryPool(disk=1 << 20)
    targets = Targets(pool, None)
    await TargetAdministration(targets).allow("DISK", [ANNA.upper()])
    await targets.access.set_chap(
        ANNA.title(), Credentials(user=user or ANNA.title(), secret="s" * 12)
    )
    listener = IscsiListener(targets, connections_max=3)
    await listener.listen(Address("127.0.0.1", 0))
    host, port = listener.addresses[0]
    for name in (ANNA, ANNA.upper()):
        settings = InitiatorSettings(
            name, f"{TARGET_PREFIX}Disk", chap=ChapSecrets(user or name, b"s" * 12)
        )
        session = await Initiator.connect(host, port, f"{TARGET_PREFIX}Disk", settings)
        assert [row.initiator for row in targets.sessions.rows()] == [ANNA]
        await session.close()
    await listener.stop(1)


async def test_names_without_case_end_to_end(tmp_path: Path) -> None:
    async with Daemon(tmp_path) as daemon:
        await daemon.ctl("vdisk", "create", "Web1", "--size", "1MiB")
        for command in (
            ("vdisk", "create", "web1", "--size", "1MiB"),
            ("target", "create", "WEB1"),
        ):
            refused = await daemon.try_ctl(*command)
            assert refused.status == 4 and "Web1" in refused.messages
        assert (await daemon.ctl("connect", "Web1", "--client", "qemu"))[
            "target"
        ] == f"{TARGET_PREFIX}web1"
        host, _, port = daemon.portal.rpartition(":")
        for name in ("web1", "WEB1"):
            session = await Initiator.connect(host, int(port), TARGET_PREFIX + name)
            await session.write(0, name.encode() * 128)
            await session.close()
        while await daemon.ctl("session", "ls"):
            await asyncio.sleep(0.01)
        missing = await daemon.try_ctl("vdisk", "show", "web1")
        assert missing.status == 3 and "but Web1" in missing.messages
        assert (await daemon.ctl("vdisk", "rename", "Web1", "web1"))["name"] == "web1"
