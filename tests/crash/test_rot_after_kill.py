"""Rot after the process was killed: each block that was written since the last consistency point,
of the log and of data, in turn.

What a flush had acknowledged is there, or reads as an error and is named; nothing else is lost by
the rot of one block of data. What was not flushed may be older, and only where the rot is: a write
of several blocks goes as a whole.
"""

from copy import deepcopy
from random import Random
from typing import Any, NamedTuple

import pytest

from storage.errors import StorageError
from storage.layout import BLOCK_BYTES, LOG_FIRST_VBN, log_blocks
from storage.pool import Pool
from tests.crash.determinism import repeatable
from tests.crash.oracle import SECTORS_PER_BLOCK, Model, after_kill, flushed, places_named
from tests.crash.recording import ZERO_PAGE, PageDevice, Pages
from tests.crash.session import CACHE_BYTES, Session, abandon, open_steady, read_block
from tests.crash.test_bit_rot import flipped, in_virtual_time
from tests.crash.workloads import POOL_BYTES, make_base

FIRST_FREE = LOG_FIRST_VBN + log_blocks(POOL_BYTES // BLOCK_BYTES)
Place = tuple[str, int]


class Killed(NamedTuple):
    """What was on the device, what it must hold, and which blocks were written since the last
    consistency point.
    """

    pages: Pages
    model: Model
    written: list[int]

    def vbns(self, of_log: bool) -> list[int]:
        return [vbn for vbn in self.written if (vbn < FIRST_FREE) == of_log]


async def killed_after_a_flush(base: Pages, model: Model, tail: bool) -> Killed:
    """Writes of all kinds, an answered flush, with ``tail`` some more writes; then the process
    dies.
    """
    device = PageDevice(POOL_BYTES, dict(base))
    session = Session(await open_steady(device), deepcopy(model))
    await session.write("a", 10 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    await session.write_atomic("c", 20, 8)
    await session.write("c", 22 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    await session.write("a", 2 * SECTORS_PER_BLOCK + 1, 3)
    await session.unmap("a", 255 * SECTORS_PER_BLOCK, 2 * SECTORS_PER_BLOCK)
    for fbn in range(100, 250):  # more than one record holds
        await session.write("a", fbn * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    await session.flush("a")
    session.model.all_durable()
    if tail:
        await session.write("a", 10 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
        await session.write_atomic("c", 40, 8)
        await session.write("c", 48 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    pages = dict(device.pages)
    await abandon(session.pool)
    return Killed(
        pages,
        session.model,
        sorted(vbn for vbn, content in pages.items() if content != base.get(vbn, ZERO_PAGE)),
    )


@pytest.fixture(scope="module", params=[False, True], ids=["all flushed", "more since"])
def killed(request: pytest.FixtureRequest) -> Killed:
    with repeatable():
        base, model = in_virtual_time(make_base())
        made: Killed = in_virtual_time(killed_after_a_flush(base, model, request.param))
    assert len(made.vbns(of_log=True)) >= 3 and len(made.vbns(of_log=False)) > 150
    return made


class Found:
    """The pool after its start: which blocks read as errors, which as older, and what it said."""

    def __init__(self) -> None:
        self.errors: set[Place] = set()
        self.older: set[Place] = set()
        self.read_only: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []

    def named(self, event: str) -> set[Place]:
        """Blocks that events of that name give."""
        places = [fields for name, fields in self.events if name == event]
        return {
            (fields["image"].removeprefix("vdisk "), (fields["offset_bytes"] + at) // BLOCK_BYTES)
            for fields in places
            for at in range(0, fields["length_bytes"], BLOCK_BYTES)
        }

    def event_names(self) -> set[str]:
        return {name for name, _ in self.events} - {"pool.opened"}


async def look(killed: Killed, pages: Pages) -> Found:
    found = Found()
    pool = await Pool.open_on(
        PageDevice(POOL_BYTES, pages),
        CACHE_BYTES,
        lambda name, **fields: found.events.append((name, fields)),
    )
    found.read_only = pool._state.read_only_reason
    said = list(found.events)  # before reads add to it
    for name, disk in killed.model.disks.items():
        for fbn in sorted({lba // SECTORS_PER_BLOCK for lba in disk.sectors}):
            try:
                content = await read_block(pool.volume(name), fbn)
            except StorageError:
                found.errors.add((name, fbn))
                continue
            what = after_kill(disk, fbn, content)
            assert what != "wrong", (name, fbn)
            if what == "older":
                assert not flushed(disk, fbn)
                found.older.add((name, fbn))
    found.events = said
    await abandon(pool)
    return found


def test_a_kill_alone_loses_nothing(killed: Killed) -> None:
    found = in_virtual_time(look(killed, dict(killed.pages)))
    assert (
        not found.errors and not found.older and not found.event_names() and found.read_only is None
    )


def with_rot(killed: Killed, vbn: int, how: str) -> Pages:
    content, random = killed.pages[vbn], Random(vbn)
    if how == "one bit":
        return {
            **killed.pages,
            vbn: flipped(content, random.randrange(BLOCK_BYTES), 1 << random.randrange(8)),
        }
    return {**killed.pages, vbn: random.randbytes(BLOCK_BYTES) if how == "garbage" else ZERO_PAGE}


@pytest.mark.parametrize("how", ["one bit", "garbage", "zeros"])
def test_rot_of_a_block_of_data_costs_what_it_held_and_no_more(killed: Killed, how: str) -> None:
    outcomes = set()
    for vbn in killed.vbns(of_log=False):
        held = places_named(killed.pages[vbn])
        found = in_virtual_time(look(killed, with_rot(killed, vbn, how)))
        assert found.read_only is None
        ((name, fbn),) = {(name, fbn) for name, fbn, _ in held}
        disk = killed.model.disks[name]
        if disk.read(fbn) != killed.pages[vbn]:
            # It was written over since. If that was flushed, the rot is no matter; and if not, the
            # later write is there all the same.
            assert not found.errors and not found.older and not found.event_names()
            outcomes.add("written over")
        elif flushed(disk, fbn):
            assert found.errors == found.named("block.damaged") == {(name, fbn)}
            assert not found.older and found.event_names() == {"block.damaged"}
            outcomes.add("damaged")
        else:
            same_write = {(name, at) for at in range(40, 48)} if 40 <= fbn < 48 else {(name, fbn)}
            assert (
                found.older == same_write
                and not found.errors
                and found.event_names() == {"log.torn_tail"}
            )
            outcomes.add("older")
    expected = {"written over", "damaged"}
    assert outcomes >= expected and outcomes <= expected | {"older"}


@pytest.mark.parametrize("how", ["one bit", "garbage", "zeros"])
def test_rot_of_a_block_of_the_log_is_mended_or_told(killed: Killed, how: str) -> None:
    """``look`` holds the rest: no block that was flushed reads as older, unless the pool says which
    record is lost, and takes no writes.
    """
    outcomes = set()
    for vbn in killed.vbns(of_log=True):
        try:
            found = in_virtual_time(look(killed, with_rot(killed, vbn, how)))
        except AssertionError:
            found = in_virtual_time(told(killed, with_rot(killed, vbn, how)))
            assert (
                how != "one bit"
                and found.read_only is not None
                and "log.record_damaged" in found.event_names()
            )
            outcomes.add("read-only")
            continue
        if found.read_only is None:
            assert not found.errors
            outcomes.add("whole" if not found.older else "older")
        else:
            assert how != "one bit"
            outcomes.add("read-only")
    assert "whole" in outcomes if how == "one bit" else "read-only" in outcomes


async def told(killed: Killed, pages: Pages) -> Found:
    """What the pool says when it is opened; nothing is read."""
    found = Found()
    pool = await Pool.open_on(
        PageDevice(POOL_BYTES, pages),
        CACHE_BYTES,
        lambda name, **fields: found.events.append((name, fields)),
    )
    found.read_only = pool._state.read_only_reason
    await abandon(pool)
    return found
