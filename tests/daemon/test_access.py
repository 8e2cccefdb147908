"""Who may use which target: lists, created targets, discovery, sessions, and what survives a
restart.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from daemon.pool.sections import Section, SectionUnreadable, Versioned
from daemon.process.config import Chap
from daemon.targets import access
from daemon.targets import table as target_table
from daemon.targets.access import Credentials
from daemon.targets.administration import TARGET, VDISK, TargetAdministration
from daemon.targets.directory import Targets, full_name
from daemon.targets.reports import Access, access_lists, access_to, created_target
from protocol.control.limits import ACL_INITIATORS_MAX, ISCSI_NAME_CHARACTERS_MAX, LUN_MAX
from protocol.control.rows import AccessList
from protocol.scsi.limits import TARGET_PORT_MAX
from storage.errors import Conflict, NotFound, PoolReadOnly, RequestError
from tests.daemon.fakes import MemoryPool
from tests.daemon.test_targets import PREFIX, Session

ANNA, BERTA = "iqn.2026-01.test:anna", "iqn.2026-01.test:berta"


def may(targets: Targets, initiator: str, name: str = "a") -> bool:
    """The login and the discovery agree."""
    opened = targets.open_target(full_name(name), initiator) is not None
    assert opened == (full_name(name) in targets.names_for(initiator, "p"))
    return opened


@pytest.fixture
def pool() -> MemoryPool:
    return MemoryPool(a=4096, b=4096, c=4096)


@pytest.fixture
def targets(pool: MemoryPool) -> Targets:
    return Targets(pool, None)


@pytest.fixture
def administration(targets: Targets) -> TargetAdministration:
    return TargetAdministration(targets)


async def again(pool: MemoryPool, **settings: Any) -> Targets:
    """The next start of the daemon."""
    for volume in pool.volumes.values():
        volume.labels.clear()
    found = Targets(pool, None, **settings)
    found.load()
    return found


# --- Lists ----------------------------------------------------------------------------------------


async def test_a_target_without_a_list_is_as_open_as_the_configuration_says(
    pool: MemoryPool,
) -> None:
    assert may(Targets(pool, None, open_access=True), ANNA)
    assert not may(Targets(pool, None, open_access=False), ANNA)


@pytest.mark.parametrize("open_access", [True, False])
async def test_a_list_names_those_who_may_over_restarts_and_renames(
    pool: MemoryPool, open_access: bool
) -> None:
    targets = Targets(pool, None, open_access)
    administration = TargetAdministration(targets)
    await administration.allow("a", [ANNA.upper()])
    for found in (targets, await again(pool, open_access=open_access)):
        assert may(found, ANNA)
        assert may(found, ANNA.title())
        assert not may(found, BERTA)
        assert may(found, BERTA, "b") == open_access
    volume = pool.volumes["z"] = pool.volumes.pop("a")
    volume.name = "z"
    assert may(found, ANNA, "z")
    assert not may(found, BERTA, "z")
    assert access_lists(found) == [AccessList(target=f"{PREFIX}z", initiators=[ANNA])]


async def test_an_empty_list_lets_nobody_in_until_it_is_cleared(
    targets: Targets, administration: TargetAdministration
) -> None:
    found = await administration.allow("a", [ANNA])
    await targets.access.remove(found.key, ANNA.upper())
    assert not may(targets, ANNA)
    assert access_lists(targets) == [AccessList(target=f"{PREFIX}a", initiators=[])]
    await targets.access.clear(found.key)
    assert may(targets, ANNA)
    with pytest.raises(NotFound, match=BERTA):
        await targets.access.remove(found.key, BERTA)


async def test_a_list_has_an_end(targets: Targets, administration: TargetAdministration) -> None:
    await administration.allow("a", [f"{ANNA}{number}" for number in range(ACL_INITIATORS_MAX)])
    with pytest.raises(Conflict, match=str(ACL_INITIATORS_MAX)):
        await administration.allow("a", [BERTA])
    assert not may(targets, BERTA)


async def test_changes_at_the_same_time_all_count(
    targets: Targets, administration: TargetAdministration
) -> None:
    await asyncio.gather(*(administration.allow("a", [f"{ANNA}{number}"]) for number in range(20)))
    assert all(may(targets, f"{ANNA}{number}") for number in range(20))


async def test_what_the_pool_does_not_take_does_not_count(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    await administration.allow("a", [ANNA])
    pool.error = PoolReadOnly("the pool is read-only")
    for change in (
        administration.allow("a", [BERTA]),
        administration.create("t"),
        targets.access.set_chap(ANNA, Credentials(user="u", secret="s" * 12)),
    ):
        with pytest.raises(PoolReadOnly):
            await change
    assert not may(targets, BERTA)
    assert not targets.table.targets
    assert targets.discovery_chap(ANNA) is None


async def test_the_list_of_a_deleted_vdisk_goes(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    await administration.allow("a", [ANNA])
    await administration.forget(pool.volumes.pop("a"))
    assert targets.access.acls == {}
    stores = pool.stores
    await administration.forget(pool.volumes["b"])
    assert pool.stores == stores, "nothing changed, and yet the pool was asked to store it"


# --- CHAP -----------------------------------------------------------------------------------------


async def test_credentials_are_the_initiators_own_else_those_of_the_file(pool: MemoryPool) -> None:
    targets = Targets(pool, Chap("all", "a" * 12, None, None))
    await targets.access.set_chap(
        ANNA.upper(),
        Credentials(user="anna", secret="s" * 12, mutual_user="m", mutual_secret="t" * 12),
    )
    definition = targets.open_target(f"{PREFIX}a", ANNA)
    assert definition is not None
    for found in (
        definition.chap,
        targets.discovery_chap(ANNA),
        Targets(pool, None).discovery_chap(ANNA),
    ):
        assert found is not None
        assert (found.user, found.secret, found.target_user, found.target_secret) == (
            "anna",
            b"s" * 12,
            "m",
            b"t" * 12,
        )
    other = targets.discovery_chap(BERTA)
    assert other is not None
    assert other.user == "all"
    await targets.access.remove_chap(ANNA)
    assert targets.discovery_chap(ANNA) == other
    with pytest.raises(NotFound, match=ANNA):
        await targets.access.remove_chap(ANNA)


async def test_secrets_do_not_show(pool: MemoryPool, targets: Targets) -> None:
    await targets.access.set_chap(
        ANNA,
        Credentials(
            user="anna", secret="hunter2hunter2", mutual_user="m", mutual_secret="hunter3hunter3"
        ),
    )
    shown = (
        repr(targets.access.chap)
        + repr(targets.discovery_chap(ANNA))
        + repr(targets.open_target(f"{PREFIX}a", ANNA))
    )
    assert "anna" in shown
    assert "hunter" not in shown
    pool.sections[access.SECTION] = pool.sections[access.SECTION].replace(
        b"\xa6secret\xae", b"\xa6sacred\xae"
    )
    with pytest.raises(SectionUnreadable) as caught:
        Targets(pool, None)
    assert "hunter" not in str(caught.value) + repr(caught.value.__cause__)


async def test_connect_says_who_may_and_what_must_be_proved(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    a, b = pool.volumes["a"], pool.volumes["b"]
    everybody = Access(initiators=None, initiator=None, allowed=True, chap=False, chap_user=None)
    closed = Targets(pool, None, open_access=False)
    assert access_to(targets, a, None) == everybody
    assert access_to(targets, a, ANNA) == everybody._replace(initiator=ANNA)
    assert access_to(closed, a, None) == everybody._replace(allowed=False)
    assert not access_to(closed, a, ANNA).allowed
    await administration.allow("a", [ANNA])
    assert access_to(targets, a, None) == everybody._replace(
        initiators=[ANNA], initiator=ANNA
    )  # the only one that may
    assert not access_to(targets, a, BERTA).allowed
    await administration.allow("a", [BERTA])
    assert access_to(targets, a, None) == everybody._replace(initiators=[ANNA, BERTA])
    await targets.access.set_chap(BERTA, Credentials(user="u", secret="s" * 12))
    assert access_to(targets, a, None) == everybody._replace(initiators=[ANNA, BERTA], chap=True)
    assert access_to(targets, a, BERTA.upper()).chap_user == "u"
    assert not access_to(targets, a, ANNA).chap
    assert not access_to(targets, b, None).chap
    for_all = Targets(pool, Chap("all", "s" * 12, None, None))
    assert [access_to(for_all, b, who).chap_user for who in (None, ANNA, BERTA)] == [
        "all",
        "all",
        "u",
    ]
    for initiator in (ANNA, BERTA):
        await targets.access.remove(a.uuid.hex, initiator)
    assert access_to(targets, a, None) == everybody._replace(
        initiators=[], allowed=False
    )  # an empty list lets nobody in


async def test_connect_of_a_vdisk_in_targets_with_lists(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    await administration.create("t")
    await administration.map("t", pool.volumes["a"], None)
    await administration.allow("t", [ANNA])
    assert access_to(targets, pool.volumes["a"], None).initiators == [ANNA]
    assert may(targets, ANNA)
    assert not access_to(targets, pool.volumes["a"], BERTA).allowed


# --- Created targets ------------------------------------------------------------------------------


async def test_luns_over_restarts_and_renames(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    await administration.create("T")
    assert await administration.map("t", pool.volumes["b"], None) == (f"{PREFIX}t", 0)
    assert await administration.map(f"{PREFIX}t", pool.volumes["a"], 7) == (f"{PREFIX}t", 7)
    assert await administration.map("t", pool.volumes["c"], None) == (f"{PREFIX}t", 1)
    pool.volumes["z"] = pool.volumes.pop("a")
    pool.volumes["z"].name = "z"
    for found in (targets, await again(pool)):
        definition = found.open_target(f"{PREFIX}T", ANNA)
        assert definition is not None
        assert definition.name == f"{PREFIX}t"
        assert {lun: volume.name for lun, volume in definition.luns.items()} == {
            0: "b",
            1: "c",
            7: "z",
        }
        assert [(row.lun, row.vdisk) for row in created_target(found, f"{PREFIX}t").luns] == [
            (0, "b"),
            (1, "c"),
            (7, "z"),
        ]
        assert pool.volumes["z"].labels == [f"target {PREFIX}t"]
        with pytest.raises(Conflict, match=rf"vdisk z is LUN 7 of target {PREFIX}t"):
            TargetAdministration(found).check_deletable(pool.volumes["z"])
        assert f"{PREFIX}z" in found.names_for(ANNA, "p")


async def test_each_target_has_a_target_port_of_its_own_for_life(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    disk = pool.volumes["a"]
    for name in ("t", "s", "u"):
        await administration.create(name)
        await administration.map(name, disk, None)
    assert list(targets.target_ports(disk.uuid)) == [1, 2, 3, 4] and list(
        targets.target_ports(pool.volumes["b"].uuid)
    ) == [1]
    await administration.remove("u")
    await administration.create("v")  # a registration may name the port of the target that went
    await administration.map("v", disk, None)
    for found in (targets, await again(pool)):
        definitions = {
            name: found.open_target(PREFIX + name, ANNA) for name in ("a", "t", "s", "v")
        }
        assert [definition and definition.port for definition in definitions.values()] == [
            1,
            2,
            3,
            5,
        ]
        assert sorted(found.target_ports(disk.uuid)) == [1, 2, 3, 5]


async def test_targets_of_an_earlier_version_get_ports_and_keep_them(
    pool: MemoryPool,
) -> None:
    uuid = pool.volumes["a"].uuid.hex
    stored = {"version": 1, "targets": {PREFIX + name: {"luns": {0: uuid}} for name in ("t", "s")}}
    pool.sections[target_table.SECTION] = msgspec.msgpack.encode(stored)
    expected = {f"{PREFIX}s": 2, f"{PREFIX}t": 3}
    for _ in range(2):
        targets = await again(pool)
        assert {name: target.port for name, target in targets.table.targets.items()} == expected
    administration = TargetAdministration(targets)
    await administration.create("b2")
    await administration.remove("s")
    targets = await again(pool)
    assert {name: target.port for name, target in targets.table.targets.items()} == {
        f"{PREFIX}t": 3,
        f"{PREFIX}b2": 4,
    }


def test_ports_begin_anew_when_all_were_given() -> None:
    stored = target_table.StoredTargets(
        targets={"t": target_table.StoredTarget(port=2)}, last_port=TARGET_PORT_MAX
    )
    ports = target_table._free_ports(stored)
    assert [next(ports), next(ports)] == [3, 4]


async def test_mapping_mistakes_change_nothing(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    await administration.create("t")
    await administration.map("t", pool.volumes["a"], 3)
    before = targets.table.targets
    for mapping, words in (
        (administration.map("t", pool.volumes["a"], 4), "already"),
        (administration.map("t", pool.volumes["b"], 3), "LUN 3"),
        (administration.map("b", pool.volumes["a"], None), "own target"),
    ):
        with pytest.raises(Conflict, match=words):
            await mapping
    with pytest.raises(NotFound, match="there is no target none"):
        await administration.map("none", pool.volumes["a"], None)
    assert targets.table.targets == before
    assert (pool.volumes["a"].labels, pool.volumes["b"].labels) == ([f"target {PREFIX}t"], [])


async def test_a_target_can_be_full(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    await administration.create("t")
    for number in range(LUN_MAX + 1):
        await targets.table.map(f"{PREFIX}t", f"{number:032x}", None)
    with pytest.raises(Conflict, match="no LUN free"):
        await administration.map("t", pool.volumes["a"], None)


async def test_unmapping_by_name_and_by_number(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    await administration.create("t")
    for name in ("a", "b"):
        await administration.map("t", pool.volumes[name], None)
    assert await administration.unmap("t", "b", None) == (f"{PREFIX}t", 1, pool.volumes["b"])
    assert await administration.unmap("t", None, 0) == (f"{PREFIX}t", 0, pool.volumes["a"])
    assert created_target(targets, f"{PREFIX}t").luns == []
    assert pool.volumes["a"].labels == pool.volumes["b"].labels == []
    administration.check_deletable(pool.volumes["a"])
    for unmapping in (administration.unmap("t", "a", None), administration.unmap("t", None, 0)):
        with pytest.raises(NotFound):
            await unmapping


async def test_a_mapped_vdisk_that_is_missing_at_start_is_an_absent_lun(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration, capsys: Any
) -> None:
    await administration.create("t")
    for name in ("a", "b"):
        await administration.map("t", pool.volumes[name], None)
    del pool.volumes["a"]
    found = await again(pool)
    assert "target.lun_missing" in capsys.readouterr().out
    assert [row.vdisk for row in created_target(found, f"{PREFIX}t").luns] == [None, "b"]
    definition = found.open_target(f"{PREFIX}t", ANNA)
    assert definition is not None
    assert list(definition.luns) == [1]
    assert await TargetAdministration(found).unmap("t", None, 0) == (f"{PREFIX}t", 0, None)


async def test_vdisks_and_created_targets_share_one_space_of_names(
    targets: Targets, administration: TargetAdministration
) -> None:
    with pytest.raises(Conflict, match="vdisk"):
        await administration.create("a")
    await administration.create("t")
    with pytest.raises(Conflict, match="target t"), administration.claim(VDISK, "t"):
        pytest.fail("a vdisk of the name of a target")
    with pytest.raises(Conflict, match="exists"):
        await administration.create("t")
    with (
        administration.claim(VDISK, "u"),
        administration.claim(VDISK, "u"),
        pytest.raises(Conflict, match="vdisk u"),
    ):
        await administration.create("u")
    with (
        administration.claim(TARGET, "v"),
        pytest.raises(Conflict),
        administration.claim(VDISK, "v"),
    ):
        pytest.fail("both were made at the same time")
    await administration.create("u")


async def test_a_name_that_gets_too_long_with_the_prefix(
    targets: Targets, administration: TargetAdministration
) -> None:
    room = ISCSI_NAME_CHARACTERS_MAX - len(PREFIX)
    assert len((await administration.create("t" * room)).name) == ISCSI_NAME_CHARACTERS_MAX
    with pytest.raises(RequestError, match=str(ISCSI_NAME_CHARACTERS_MAX)):
        await administration.create("t" * (room + 1))


async def test_names_of_other_authorities(
    targets: Targets, administration: TargetAdministration
) -> None:
    for name in ("iqn.2003-01.org.Example:Old", "eui.02004567A425678D", "naa.52004567BA64678D"):
        created = await administration.create(name)
        assert created.name == created.key == name.lower()
        assert may(targets, ANNA, name.lower())
        await administration.allow(name, [ANNA])
        assert not may(targets, BERTA, name.lower())


async def test_a_vdisk_in_a_target_with_a_list_is_not_open_by_its_own_name(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    await administration.create("t")
    await administration.allow("t", [ANNA])
    await administration.map("t", pool.volumes["a"], None)
    assert may(targets, ANNA)
    assert not may(targets, BERTA)
    assert not may(targets, BERTA, "t")
    assert may(targets, BERTA, "b")
    await administration.create(
        "other"
    )  # mapped into an open target too: that one is open, the vdisk's own still is not
    await administration.map("other", pool.volumes["a"], None)
    assert not may(targets, BERTA)
    await administration.allow("a", [BERTA])
    assert may(targets, BERTA)
    assert not may(targets, ANNA)


async def test_removing_a_target(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    await administration.create("t")
    await administration.allow("t", [ANNA])
    await administration.map("t", pool.volumes["a"], None)
    session = Session(f"{PREFIX}t", ANNA)
    targets.session_opened(session)
    with pytest.raises(Conflict, match=ANNA):
        await administration.remove("t")
    targets.session_closed(session)
    assert await administration.remove("t") == f"{PREFIX}t"
    assert pool.volumes["a"].labels == []
    assert not may(targets, ANNA, "t")
    assert may(targets, BERTA)
    assert access_lists(targets) == []
    for name, error in (("t", NotFound), ("a", Conflict)):
        with pytest.raises(error):
            await administration.remove(name)


# --- Sessions -------------------------------------------------------------------------------------


async def test_sessions_hold_the_luns_that_come_and_go(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    await administration.create("t")
    await administration.map("t", pool.volumes["a"], None)
    session = Session(f"{PREFIX}t", ANNA)
    targets.session_opened(session)
    await administration.map("t", pool.volumes["b"], None)
    assert [len(pool.volumes[name].labels) for name in "abc"] == [2, 2, 0]
    assert targets.sessions.count_using("b") == 1
    await administration.unmap("t", "a", None)
    assert [len(pool.volumes[name].labels) for name in "abc"] == [0, 2, 0]
    targets.session_closed(session)
    assert pool.volumes["b"].labels == [f"target {PREFIX}t"]


async def test_sessions_that_a_change_shuts_out(
    pool: MemoryPool, targets: Targets, administration: TargetAdministration
) -> None:
    anna, berta, discovery, other = (
        Session(f"{PREFIX}a", ANNA),
        Session(f"{PREFIX}a", BERTA),
        Session("", BERTA),
        Session(f"{PREFIX}b", BERTA),
    )
    for session in (anna, berta, discovery, other):
        targets.session_opened(session)
    assert targets.no_longer_allowed() == []
    found = await administration.allow("a", [ANNA])
    assert targets.no_longer_allowed() == [berta]
    pool.volumes["b"].name = "renamed"  # a session goes on under the name it logged in to
    pool.volumes["renamed"] = pool.volumes.pop("b")
    assert targets.no_longer_allowed() == [berta]
    await targets.access.remove(found.key, ANNA)
    assert targets.no_longer_allowed() == [anna, berta]


async def test_a_session_of_a_target_that_went_is_shut_out_whatever_is_open(
    targets: Targets, administration: TargetAdministration
) -> None:
    await administration.create("t")
    session = Session(f"{PREFIX}t", ANNA)
    targets.session_opened(session)
    await targets.table.remove(f"{PREFIX}t")
    assert targets.no_longer_allowed() == [session]


# --- Sections -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [access.SECTION, target_table.SECTION])
@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored[:-1],
        lambda _: b"\xc1",
        lambda _: msgspec.msgpack.encode([1]),
        lambda _: msgspec.msgpack.encode({"version": 2}),
        lambda _: msgspec.msgpack.encode({"version": 1, "acls": 5, "targets": 5}),
    ],
)
async def test_what_cannot_be_read_stops_the_start_and_never_opens_anything(
    pool: MemoryPool,
    targets: Targets,
    administration: TargetAdministration,
    name: str,
    damage: Callable[[bytes], bytes],
) -> None:
    await administration.create("t")
    await administration.allow("t", [ANNA])
    pool.sections[name] = damage(pool.sections[name])
    with pytest.raises(SectionUnreadable, match=name):
        Targets(pool, None)


async def test_a_change_that_changes_nothing_is_not_stored(pool: MemoryPool) -> None:
    section = Section(pool, "x", Versioned())
    await section.change(lambda value: value)
    assert pool.stores == 0
