"""Names of vdisks become parts of iSCSI names, which have no case: no two new ones are alike but
for theirs; old ones stay.
"""

from collections.abc import Iterator
from unittest import mock

import pytest

from storage.errors import Conflict, NotFound
from storage.images.catalogue import Catalogue
from tests.storage.pools import OpenPool, data, new_pool, opened


@pytest.fixture
def as_earlier() -> Iterator[None]:
    """Names as earlier versions took them."""

    def check_free(self: Catalogue, name: str, renamed: str | None = None) -> None:
        assert name not in self.vdisks

    with mock.patch.object(Catalogue, "check_free", check_free):
        yield


async def test_a_name_that_differs_in_case_alone_is_taken() -> None:
    async with new_pool() as running:
        pool = running.pool
        await pool.vdisk_create("Web1", 1 << 20)
        await pool.vdisk_create("other", 1 << 20)
        await pool.snapshot_create(
            [("Web1", "s"), ("Web1", "S")]
        )  # those of snapshots are no iSCSI names
        for taken in ("web1", "WEB1"):
            with pytest.raises(
                Conflict, match="a vdisk Web1 exists already, and iSCSI names have no case"
            ):
                await pool.vdisk_create(taken, 1 << 20)
            with pytest.raises(Conflict, match="Web1 exists"):
                await pool.clone_create("Web1", "s", taken)
            with pytest.raises(Conflict, match="Web1 exists"):
                await pool.vdisk_rename("other", taken)
            with pytest.raises(NotFound, match=f"no vdisk {taken}, but Web1"):
                pool.volume(taken)
        with pytest.raises(Conflict, match="OTHER would be the same target"):
            await pool.vdisk_create("OTHER", 1 << 20)
        for name in ("web1", "WEB1", "Web1"):  # of the vdisk itself the case may change
            await pool.vdisk_rename(pool.names_alike("web1")[0], name)
            assert pool.names_alike("wEB1") == [name] and pool.names() == sorted([name, "other"])
        await pool.snapshot_delete("Web1", "s")
        await pool.snapshot_delete("Web1", "S")
        await pool.vdisk_delete("Web1")
        assert not pool.names_with_case()
        await pool.vdisk_create("web1", 1 << 20)


async def old_names(running: OpenPool) -> None:
    for seed, name in enumerate(("Web1", "web1", "WEB1"), 1):
        await running.pool.vdisk_create(name, 1 << 20)
        await running.write(name, 0, data(seed))


@pytest.mark.usefixtures("as_earlier")
async def test_an_old_pool_whose_names_differ_in_case_keeps_every_disk() -> None:
    async with new_pool() as running:
        await old_names(running)
        memory = running.memory
    async with opened(memory.copy()) as running:
        assert running.pool.names_alike("web1") == running.pool.names() == ["WEB1", "Web1", "web1"]
        assert list(running.pool.names_with_case()) == ["web1"]
        for seed, name in enumerate(("Web1", "web1", "WEB1"), 1):
            assert (await running.pool.vdisk_show(name))["name"] == name
            assert await running.read(name, 0, 4096) == data(seed)
        await running.pool.vdisk_rename("Web1", "a")
        await running.pool.vdisk_delete("WEB1")
        assert running.pool.names() == ["a", "web1"] and not running.pool.names_with_case()
        assert await running.read("a", 0, 4096) == data(1)
