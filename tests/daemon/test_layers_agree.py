"""What `storage` and `protocol` each define, since neither knows the other, is the same."""

from collections.abc import AsyncIterator
from typing import Any, get_args

import pytest
import pytest_asyncio

from protocol import names
from protocol import volume as wire
from protocol.control import calls, limits, rows
from protocol.control.errors import ControlError
from protocol.control.parameters import SplitMode
from storage.errors import RequestError
from storage.layout import BLOCK_BYTES, NAME_BYTES_MAX, SPLIT_MODES, SPLIT_STATES
from storage.pool import Pool
from storage.vdisks import open_image as store
from tests.storage.devices import MemoryDevice

MIB = 1 << 20
NAMES = [
    "a", "A", "0", "a.b", "a_b", "a-b", "a:b", "a" * NAME_BYTES_MAX, "a" * (NAME_BYTES_MAX + 1),
    "", ".", ".a", "_a", "-a", ":a", "a b", "a@b", "a/b", "a\n", "\n", "a\0", "\xe4", "a\xdf",
    "\u0661",
]  # fmt: skip


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[Pool]:
    device = MemoryDevice(64 * MIB)
    await Pool.format(device)
    found = await Pool.open_on(device)
    yield found
    await found.close()


def keys_of(interface: type) -> set[str]:
    return {key for key, value in vars(interface).items() if isinstance(value, property)}


@pytest.mark.parametrize(
    ("interface", "kind"),
    [(wire.VolumeUsage, store.VolumeUsage), (wire.SplitState, store.SplitState)],
)
def test_a_volume_tells_what_the_wire_asks_for(interface: type, kind: Any) -> None:
    assert keys_of(interface) == set(kind._fields)


async def test_a_volume_has_what_it_may_have_in_addition(pool: Pool) -> None:
    await pool.vdisk_create("a", MIB)
    volume = pool.volume("a")
    assert isinstance(volume, wire.ReportsUsage)
    assert isinstance(volume, wire.ReportsSplit)
    assert isinstance(volume, wire.CopiesByReference)


@pytest.mark.parametrize("name", NAMES)
async def test_what_is_a_name_for_a_client_is_one_for_the_pool(pool: Pool, name: str) -> None:
    try:
        calls.validate("vdisk.create", {"name": name, "size_bytes": MIB})
        allowed = True
    except ControlError:
        allowed = False
    try:
        await pool.vdisk_create(name, MIB)
        taken = True
    except RequestError:
        taken = False
    assert allowed == taken


def test_sizes_and_words() -> None:
    assert limits.BLOCK_BYTES == BLOCK_BYTES
    assert limits.NAME_CHARACTERS_MAX == NAME_BYTES_MAX
    assert get_args(SplitMode) == SPLIT_MODES
    assert ("none", *get_args(rows.SplitStateName)) == SPLIT_STATES


def test_a_vdisks_name_ends_an_iscsi_name() -> None:
    assert names.NAME in names.ISCSI_NAME
