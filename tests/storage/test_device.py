"""The conformance suite of devices: what holds for every implementation."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.device import Device
from storage.errors import DeviceFailed, OutOfRange
from tests.storage.device_makers import KINDS, LARGER_BYTES, MAKERS, SIZE_BYTES

SECTOR = 512
BLOCK = 4096


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Device]:
    with MAKERS[request.param](tmp_path) as made:
        yield made


async def write(device: Device, data: bytes, offset: int) -> None:
    if not device.try_writev([data], offset, len(data)):
        await device.writev([data], offset)


async def read(device: Device, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    if not device.try_readv([buffer], offset):
        await device.readv([buffer], offset)
    return bytes(buffer)


async def test_a_new_device_reads_as_zeros(device: Device) -> None:
    assert device.size_bytes == SIZE_BYTES
    assert await read(device, 0, BLOCK) == bytes(BLOCK)
    assert await read(device, SIZE_BYTES - BLOCK, BLOCK) == bytes(BLOCK)


async def test_the_path_is_told(device: Device) -> None:
    assert device.path


@pytest.mark.parametrize("offset", [0, SECTOR, BLOCK, SIZE_BYTES - 3 * SECTOR])
async def test_what_was_written_is_read(device: Device, offset: int) -> None:
    data = os.urandom(3 * SECTOR)
    await write(device, data, offset)
    assert await read(device, offset, len(data)) == data


async def test_inline_and_threads_see_the_same_bytes(device: Device) -> None:
    first, second = os.urandom(BLOCK), os.urandom(BLOCK)
    await write(device, first, 0)
    await device.writev([second], BLOCK)
    buffer = bytearray(2 * BLOCK)
    await device.readv([buffer], 0)
    assert buffer == first + second
    assert await read(device, 0, 2 * BLOCK) == first + second


async def test_vectors_are_one_range(device: Device) -> None:
    parts = [os.urandom(length) for length in (SECTOR, BLOCK, 5 * SECTOR)]
    await device.writev([parts[0], bytearray(parts[1]), memoryview(parts[2])], BLOCK)
    assert await read(device, BLOCK, sum(map(len, parts))) == b"".join(parts)
    into: list[bytearray | memoryview] = [
        bytearray(2 * SECTOR),
        memoryview(bytearray(BLOCK)),
        bytearray(4 * SECTOR),
    ]
    await device.readv(into, BLOCK)
    assert b"".join(into) == b"".join(parts)


async def test_a_view_into_a_larger_buffer_is_filled_and_nothing_beside_it(device: Device) -> None:
    await write(device, b"\x11" * BLOCK, 0)
    whole = bytearray(b"\xff" * 3 * BLOCK)
    await device.readv([memoryview(whole)[BLOCK : 2 * BLOCK]], 0)
    assert whole == b"\xff" * BLOCK + b"\x11" * BLOCK + b"\xff" * BLOCK


@pytest.mark.parametrize("count", [1023, 1024, 1025, 2500])
async def test_more_buffers_than_one_call_takes(device: Device, count: int) -> None:
    data = os.urandom(count * SECTOR)
    await device.writev(
        [data[start : start + SECTOR] for start in range(0, len(data), SECTOR)], BLOCK
    )
    into = [bytearray(SECTOR) for _ in range(count)]
    await device.readv(into, BLOCK)
    assert b"".join(into) == data


async def test_more_buffers_than_one_call_takes_inline(device: Device) -> None:
    """It may succeed or answer False, but neither do a part of it nor fail."""
    data = [os.urandom(SECTOR) for _ in range(400)] * 3
    if not device.try_writev(data, 0, len(data) * SECTOR):
        await device.writev(data, 0)
    into = [bytearray(SECTOR) for _ in data]
    if not device.try_readv(into, 0):
        await device.readv(into, 0)
    assert into == data


async def test_a_large_write(device: Device) -> None:
    data = os.urandom(5 * 1024 * 1024)
    await write(device, data, SECTOR)
    assert await read(device, SECTOR, len(data)) == data


async def test_the_job_is_submitted_at_the_call(device: Device) -> None:
    future = device.writev([b"\x22" * BLOCK], 0)
    assert isinstance(future, asyncio.Future)
    done, _ = await asyncio.wait([future])
    assert done == {future}
    assert await read(device, 0, BLOCK) == b"\x22" * BLOCK


async def test_many_jobs_at_once_keep_apart(device: Device) -> None:
    blocks = [os.urandom(BLOCK) for _ in range(300)]
    order = list(range(len(blocks)))
    Random(3).shuffle(order)
    await asyncio.gather(
        *(device.writev([blocks[index]], index * BLOCK) for index in order), device.sync()
    )
    into = [bytearray(BLOCK) for _ in blocks]
    await asyncio.gather(
        *(device.readv([into[index]], index * BLOCK) for index in reversed(order)), device.sync()
    )
    assert into == blocks


async def test_overlapping_writes_leave_whole_sectors(device: Device) -> None:
    await asyncio.gather(
        *(
            device.writev([bytes([value]) * 4 * SECTOR], value % 4 * SECTOR)
            for value in range(1, 60)
        )
    )
    data = await read(device, 0, 7 * SECTOR)
    assert all(len(set(data[start : start + SECTOR])) == 1 for start in range(0, len(data), SECTOR))


async def test_sync_ends_whatever_is_in_flight(device: Device) -> None:
    await device.sync()
    await write(device, os.urandom(BLOCK), 0)
    await asyncio.gather(*(device.sync() for _ in range(20)))


async def test_discard_leaves_the_neighbours(device: Device) -> None:
    before, after = os.urandom(BLOCK), os.urandom(BLOCK)
    await write(device, before + os.urandom(14 * BLOCK) + after, 0)
    await device.discard(BLOCK, 14 * BLOCK)
    assert await read(device, 0, BLOCK) == before
    assert await read(device, 15 * BLOCK, BLOCK) == after
    fresh = os.urandom(14 * BLOCK)
    await write(device, fresh, BLOCK)
    assert await read(device, 0, 16 * BLOCK) == before + fresh + after


async def test_discard_of_single_sectors(device: Device) -> None:
    data = os.urandom(BLOCK)
    await write(device, data, 0)
    await device.discard(3 * SECTOR, SECTOR)
    found = await read(device, 0, BLOCK)
    assert found[: 3 * SECTOR] == data[: 3 * SECTOR]
    assert found[4 * SECTOR :] == data[4 * SECTOR :]


async def test_it_does_not_shrink(device: Device) -> None:
    with pytest.raises(OutOfRange):
        await device.grow(SIZE_BYTES - BLOCK)
    assert device.size_bytes == SIZE_BYTES


async def test_growing_to_its_own_size_is_nothing(device: Device) -> None:
    await device.grow(SIZE_BYTES)
    assert device.size_bytes == SIZE_BYTES


@pytest.mark.parametrize(
    "device", [param for param in KINDS if param.values != ("block",)], indirect=True
)
async def test_it_grows(device: Device) -> None:
    data = os.urandom(BLOCK)
    await write(device, data, SIZE_BYTES - BLOCK)
    await asyncio.gather(device.grow(LARGER_BYTES - BLOCK), device.grow(LARGER_BYTES))
    assert device.size_bytes == LARGER_BYTES
    assert await read(device, SIZE_BYTES - BLOCK, 2 * BLOCK) == data + bytes(BLOCK)
    await write(device, data, LARGER_BYTES - BLOCK)
    assert await read(device, LARGER_BYTES - BLOCK, BLOCK) == data


async def test_a_cancelled_job_disturbs_no_other(device: Device) -> None:
    data = os.urandom(BLOCK)
    await write(device, data, 0)
    buffers = [bytearray(BLOCK) for _ in range(40)]
    futures = [device.readv([buffer], 0) for buffer in buffers]
    for future in futures[::2]:
        future.cancel()
    await asyncio.gather(*futures[1::2])
    assert buffers[1::2] == [data] * 20


async def test_close_carries_out_what_is_in_flight(device: Device) -> None:
    writes = [device.writev([b"\x33" * BLOCK], index * BLOCK) for index in range(50)]
    device.close()
    await asyncio.gather(*writes)


async def test_a_closed_device_fails_everything(device: Device) -> None:
    await device.sync()
    device.close()
    device.close()
    with pytest.raises(DeviceFailed, match="closed"):
        await read(device, 0, BLOCK)
    with pytest.raises(DeviceFailed, match="closed"):
        await write(device, bytes(BLOCK), 0)
    for future in (
        device.readv([bytearray(BLOCK)], 0),
        device.writev([bytes(BLOCK)], 0),
        device.sync(),
        device.discard(0, BLOCK),
    ):
        with pytest.raises(DeviceFailed, match="closed"):
            await future


# --- Round trips against a model ---


class Step(NamedTuple):
    """One operation on ``lengths`` (in sectors) buffers from ``sector`` on."""

    operation: str
    sector: int
    lengths: list[int]
    value: int


MODEL_SECTORS = 256
STEPS = st.lists(
    st.builds(
        Step,
        operation=st.sampled_from(
            ["try_writev", "writev", "try_readv", "readv", "discard", "sync"]
        ),
        sector=st.integers(0, MODEL_SECTORS - 1),
        lengths=st.lists(st.integers(1, 24), min_size=1, max_size=5),
        value=st.integers(1, 255),
    ),
    max_size=30,
)


class Model:
    """What a device must hold: the bytes, and which sectors a discard left open."""

    def __init__(self) -> None:
        self.data = bytearray(MODEL_SECTORS * SECTOR)
        self.open = set[int]()

    def wrote(self, sector: int, data: bytes) -> None:
        self.data[sector * SECTOR : sector * SECTOR + len(data)] = data
        self.open -= set(range(sector, sector + len(data) // SECTOR))

    def check(self, sector: int, data: bytes) -> None:
        for index in range(len(data) // SECTOR):
            if sector + index not in self.open:
                start = (sector + index) * SECTOR
                assert data[index * SECTOR :][:SECTOR] == self.data[start : start + SECTOR], (
                    f"sector {sector + index}"
                )


async def apply(device: Device, model: Model, step: Step) -> None:
    lengths = [length * SECTOR for length in step.lengths]
    total = min(sum(lengths), (MODEL_SECTORS - step.sector) * SECTOR)
    while sum(lengths) > total:
        lengths = lengths[1:] or [total]
    total, offset = sum(lengths), step.sector * SECTOR
    if step.operation == "sync":
        await device.sync()
    elif step.operation == "discard":
        await device.discard(offset, total)
        model.open |= set(range(step.sector, step.sector + total // SECTOR))
    elif step.operation.endswith("writev"):
        data = [bytes([step.value ^ index]) * length for index, length in enumerate(lengths)]
        if step.operation == "writev" or not device.try_writev(data, offset, total):
            await device.writev(data, offset)
        model.wrote(step.sector, b"".join(data))
    else:
        into = [bytearray(length) for length in lengths]
        if step.operation == "readv" or not device.try_readv(into, offset):
            await device.readv(into, offset)
        model.check(step.sector, b"".join(into))


async def follow(device: Device, steps: list[Step]) -> None:
    model = Model()
    # Whatever the example before left behind: a device is reused, as making one takes longer than
    # the example.
    await device.writev([bytes(MODEL_SECTORS * SECTOR)], 0)
    for step in steps:
        await apply(device, model, step)
    model.check(0, await read(device, 0, MODEL_SECTORS * SECTOR))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(steps=STEPS)
def test_a_device_holds_what_a_model_holds(device: Device, steps: list[Step]) -> None:
    """Each example has an event loop of its own: a device follows its user from one to the next."""
    asyncio.run(follow(device, steps))


@pytest.mark.parametrize("kind", KINDS)
def test_it_works_on_uvloop(kind: str, tmp_path: Path) -> None:
    async def main() -> None:
        with MAKERS[kind](tmp_path) as device:
            await test_many_jobs_at_once_keep_apart(device)
            await test_a_cancelled_job_disturbs_no_other(device)
            await test_close_carries_out_what_is_in_flight(device)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
