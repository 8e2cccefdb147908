"""Reading the vdisk table at open: every entry once, neighbours on the device together."""

from storage.checksum import crc32c
from storage.errors import BlockDamaged, DeviceFailed, StorageError
from storage.images.catalogue import Catalogue
from storage.layout import BLOCK_BYTES, FIELDS_PER_BLOCK, FIELDS_SHIFT, ZERO_POINTER
from storage.slicer import Slicer
from storage.state.pool_state import PoolState
from storage.tree.buffer_tree import BufferTree

# VBN, CRC32C and number of one entry.
EntryField = tuple[int, int, int]
# One read of neighbouring entries is at most 1 MiB.
RUN_BLOCKS_MAX = 256


async def read_table(
    state: PoolState, table: BufferTree, catalogue: Catalogue, size_blocks: int
) -> None:
    """List all images in the catalogue. A damaged entry is reported, and the rest is served; a
    damaged pointer block leaves it read-only.

    Raises BlockDamaged, DeviceFailed when nothing of the table can be read.
    """
    slicer = Slicer()
    fields: list[EntryField] = []
    unreadable: list[StorageError] = []
    indexes = range(-(-size_blocks // FIELDS_PER_BLOCK))
    for index in indexes:
        try:
            node = await table.load(index)
        except (BlockDamaged, DeviceFailed) as error:
            _hide(state, catalogue, index, error)
            unreadable.append(error)
            continue
        rows = node.fields()
        slots = (rows["vbn"] > ZERO_POINTER).nonzero()[0].tolist()
        fields.extend(
            (int(rows["vbn"][slot]), int(rows["crc"][slot]), index << FIELDS_SHIFT | slot)
            for slot in slots
        )
        await slicer.breathe()
    if unreadable and len(unreadable) == len(indexes):
        raise unreadable[0]
    fields.sort()
    start = 0
    for at in range(1, len(fields) + 1):
        if (
            at == len(fields)
            or fields[at][0] != fields[at - 1][0] + 1
            or at - start == RUN_BLOCKS_MAX
        ):
            await _read_run(state, catalogue, fields[start:at])
            start = at
            await slicer.breathe()
    catalogue.numbers_known()


def _hide(state: PoolState, catalogue: Catalogue, index: int, error: StorageError) -> None:
    """None of these images can be read. What stands on which of the others nobody can tell then, so
    nothing may be deleted.
    """
    numbers = range(index << FIELDS_SHIFT, index + 1 << FIELDS_SHIFT)
    for number in numbers:
        catalogue.read_damaged(number)
    state.on_event("image.damaged", number=numbers[0], last_number=numbers[-1], error=str(error))
    state.fail(
        f"images {numbers[0]} to {numbers[-1]} cannot be read ({error}): copy the others, and"
        " restore these from a backup"
    )


async def _read_run(state: PoolState, catalogue: Catalogue, fields: list[EntryField]) -> None:
    data = bytearray(len(fields) * BLOCK_BYTES)
    offset = fields[0][0] * BLOCK_BYTES
    try:
        if not state.device.try_readv((data,), offset):
            await state.device.readv((data,), offset)
    except StorageError as error:
        if len(fields) > 1:  # one bad sector must not cost its neighbours
            for field in fields:
                await _read_run(state, catalogue, [field])
            return
        catalogue.read_damaged(fields[0][2])
        state.on_event("image.damaged", number=fields[0][2], error=str(error))
        return
    view = memoryview(data)
    for position, (vbn, crc, number) in enumerate(fields):
        block = view[position * BLOCK_BYTES : (position + 1) * BLOCK_BYTES]
        if crc32c(block) == crc:
            catalogue.read_entry(number, bytes(block))
        else:
            catalogue.read_damaged(number)
            state.on_event("image.damaged", number=number, vbn=vbn)
