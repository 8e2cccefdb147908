"""Changes of metadata that take blocks: they are made in the freeze of a consistency point, as soon
as there is room for them.
"""

from storage.allocation.write_allocator import WriteAllocator
from storage.errors import PoolFull
from storage.state.point_requests import AtFreeze, PointRequests


async def request_with_room(
    requests: PointRequests, allocator: WriteAllocator, at_freeze: AtFreeze
) -> None:
    """Carry out a change that needs new blocks for metadata, as soon as there are some. Raises
    PoolFull, HostFull: there are none. Also what the change raises.
    """
    while True:
        try:
            return await requests.request(at_freeze)
        except PoolFull as full:
            if not await allocator.make_room(full):
                raise
