"""Closing a pool: what is under way ends, what can be durable becomes so, the device goes."""

from contextlib import suppress

from storage.errors import DeviceFull, StorageError
from storage.pool.operations import Operations
from storage.pool.rooms import Rooms
from storage.superblock.copies import write_copies

# How long a pool that closes waits for room on the host. An orderly stop of the daemon takes at
# most 10 s in all.
CLOSE_SECONDS = 2.0


def close_soon(rooms: Rooms) -> None:
    """The pool will be closed: what waits for room on the host gets an answer within
    CLOSE_SECONDS.
    """
    rooms.host_room.close_within(CLOSE_SECONDS)


async def close_rooms(rooms: Rooms, operations: Operations) -> None:
    """Finish what is under way, take a consistency point, release the device.

    On a full host that consistency point is given up after CLOSE_SECONDS. What was acknowledged is
    then durable in the log.
    """
    state = rooms.state
    close_soon(rooms)
    await rooms.handler.stop()
    await rooms.volumes.close()
    await rooms.log.drain()
    await rooms.points.stop()
    await operations.end()
    await rooms.retirement.finish()
    await rooms.host_probe.stop()
    await rooms.allocator.stock.stop()
    if state.read_only_reason is None:
        try:
            await _release_owner(rooms)
        except StorageError as error:
            # The device is released all the same.
            state.fail(f"the last sync failed: {error}")
    if state.frozen is not None and state.read_only_reason is None:
        state.on_event(
            "pool.closed_on_full_host",
            cp_number=rooms.superblock.cp_number,
            log_records=rooms.log.records,
        )
    state.on_event(
        "pool.closed", cp_number=rooms.superblock.cp_number, log_records=rooms.log.records
    )
    rooms.device.close()


async def _release_owner(rooms: Rooms) -> None:
    """Make everything durable, the second copy of the superblock too, and clear the owner in both.
    Raises DeviceFailed.
    """
    superblock = rooms.superblock
    await rooms.device.sync()  # first of all: what was acknowledged may be in the log only
    if superblock.owner is None or rooms.state.frozen is not None:
        return  # what was given up for want of room must not become durable after all
    superblock.owner = None
    with suppress(DeviceFull):  # an owner that is dead is in nobody's way
        await write_copies(rooms.device, superblock, superblock.cp_number & 1)
