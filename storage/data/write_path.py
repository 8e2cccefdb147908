"""Writing: whole blocks go to newly allocated VBNs first, and their pointers are installed
afterwards, all of a write in one step.

A write that is refused has changed nothing: the pointer blocks are planned first, and made writable
only when data and all are there. On a full pool a write that only replaces blocks of its own
*borrows* its new ones (storage.allocation.write_allocator).

Data that is all zeros is stored as zero pointers. A field's old block is given up in the same step:
known to be free if it was born after the image was last shared, else left to the share map.
"""

from collections.abc import Iterable, Sequence

from storage.checksum import crc32c
from storage.epoch.epoch import Epoch
from storage.errors import OutOfRange, PoolFull, StorageError, VolumeClosed
from storage.fields import BIRTH_SHIFT, field_at
from storage.images.image import Image
from storage.layout import (
    BLOCK_BYTES,
    FIELDS_MASK,
    FIELDS_SHIFT,
    HOLE,
    KIND_VDISK,
    ZERO_BLOCK,
    ZERO_BLOCK_CRC,
    ZERO_POINTER,
)
from storage.tree.attempt import when_possible
from storage.tree.editor import Plan
from storage.tree.node import Node

Buffer = bytes | bytearray | memoryview
Extents = list[tuple[int, int]]
# FBN and CRC32C of a block to install; the CRC32C is ZERO_CRC for one that becomes a zero pointer.
Target = tuple[int, int]
ZERO_CRC = -1


def is_zeros(block: Buffer) -> bool:
    """Whether a block with the CRC32C of zeros is one. A memoryview compares item by item (30 us);
    its copy compares in 0.3 us.
    """
    return bytes(block) == ZERO_BLOCK


def split_blocks(fbn: int, data: Buffer, targets: list[Target], buffers: list[Buffer]) -> None:
    """Take whole blocks of data apart: a target for each block, and the buffers that have to be
    written, zeros left out.
    """
    if len(data) == BLOCK_BYTES:
        crc = crc32c(data)
        if crc == ZERO_BLOCK_CRC and is_zeros(data):
            targets.append((fbn, ZERO_CRC))
        else:
            targets.append((fbn, crc))
            buffers.append(data)
        return
    view = memoryview(data)
    start = 0
    for at in range(0, len(view), BLOCK_BYTES):
        block = view[at : at + BLOCK_BYTES]
        crc = crc32c(block)
        if crc == ZERO_BLOCK_CRC and is_zeros(block):
            crc = ZERO_CRC
            if start < at:
                buffers.append(view[start:at])
            start = at + BLOCK_BYTES
        targets.append((fbn, crc))
        fbn += 1
    if start < len(view):
        buffers.append(view[start:])


def slices_by_extent(
    buffers: list[Buffer], extents: Extents
) -> list[tuple[list[Buffer], int, int]]:
    """(buffers, byte offset on the device, bytes) of each write that fills the extents one after
    the other.
    """
    if len(extents) == 1:
        first, length = extents[0]
        return [(buffers, first * BLOCK_BYTES, length * BLOCK_BYTES)]
    writes = []
    waiting = [memoryview(buffer) for buffer in reversed(buffers)]
    for first, length in extents:
        left = length * BLOCK_BYTES
        part: list[Buffer] = []
        while left:
            view = waiting.pop()
            if len(view) > left:
                waiting.append(view[left:])
                view = view[:left]
            part.append(view)
            left -= len(view)
        writes.append((part, first * BLOCK_BYTES, length * BLOCK_BYTES))
    return writes


def install(
    image: Image, epoch: Epoch, nodes: dict[int, Node], targets: list[Target], extents: Extents
) -> None:
    """Point the fields at the new blocks. ``nodes`` holds every level-1 block concerned, writable
    in ``epoch``; nothing here waits.
    """
    image.touch()
    shared_cp = image.tree.shared_cp
    number = image.number
    birth = epoch.number << BIRTH_SHIFT
    ledger, unlogged = epoch.ledger, epoch.unlogged.entries
    freed, dropped = ledger.freed, ledger.dropped
    vbns = iter(
        [extents[0][0]]
        if len(targets) == 1 and extents
        else [vbn for first, length in extents for vbn in range(first, first + length)]
    )
    used = 0
    watcher = image.watcher
    for fbn, crc in targets:  # inlines field_at and set_field of storage.fields
        q = nodes[fbn >> FIELDS_SHIFT].q
        slot = (fbn & FIELDS_MASK) * 2
        old = q[slot]
        if old > ZERO_POINTER:
            used -= 1
            if q[slot + 1] >> BIRTH_SHIFT > shared_cp:
                freed.append(old)
            else:
                dropped.append(old)
        elif watcher is not None and old == HOLE:
            watcher.hole_filled(fbn)
        if crc == ZERO_CRC:
            q[slot], q[slot + 1] = ZERO_POINTER, 0
            unlogged.append((number, 0, fbn, ZERO_POINTER, 1))
        else:
            used += 1
            vbn = next(vbns)
            q[slot], q[slot + 1] = vbn, crc | birth
            unlogged.append((number, crc, fbn, vbn, 1))
    image.used_blocks += used
    ledger.allocated.extend(extents)


def plan_for(image: Image, epoch: Epoch, indexes: Iterable[int]) -> Plan | None:
    """What makes these level-1 blocks writable, with everything it needs at hand; None when
    something has to be waited for.
    """
    editor, leaves, number = image.editor, image.tree.leaves, epoch.number
    plan = Plan(epoch)
    for index in indexes:
        node = leaves.get(index)
        if node is None or node.epoch != number:
            if not editor.plan(plan, index):
                return None
        else:
            node.referenced = True
    return plan if editor.at_hand(plan) else None


def indexes_of(targets: list[Target]) -> list[int]:
    """The level-1 blocks that the targets lie in."""
    if len(targets) == 1:
        return [targets[0][0] >> FIELDS_SHIFT]
    return list(dict.fromkeys([fbn >> FIELDS_SHIFT for fbn, _ in targets]))


def nodes_of(image: Image, indexes: list[int]) -> dict[int, Node]:
    """The level-1 blocks themselves, that a plan has made writable."""
    leaves = image.tree.leaves
    return {index: leaves[index] for index in indexes}


def replaces_own(image: Image, fbns: Iterable[int]) -> bool | None:
    """Whether every one of these blocks has a VBN that nobody else refers to, so that as much comes
    free as a write of them takes.

    Of level-1 blocks that are in memory: False where one is not. None: a share count has to be
    waited for. For full pools only.
    """
    leaves, shared_cp = image.tree.leaves, image.tree.shared_cp
    maybe_shared: list[int] = []
    for fbn in fbns:
        node = leaves.get(fbn >> FIELDS_SHIFT)
        if node is None:
            return False
        vbn, _, birth = field_at(node.q, fbn)
        if vbn <= ZERO_POINTER:
            return False
        if birth <= shared_cp:
            maybe_shared.append(vbn)
    return not maybe_shared or image.share_map.try_unshared(maybe_shared)


async def only_replaces(image: Image, fbn: int, count: int) -> bool:
    """Whether a write of these blocks takes no more than it gives back. For full pools only. Raises
    BlockDamaged, DeviceFailed.
    """
    return await when_possible(image.state, lambda: _only_replaces_now(image, fbn, count))


def _only_replaces_now(image: Image, fbn: int, count: int) -> bool | None:
    plan = Plan(image.state.epoch)
    indexes = range(fbn >> FIELDS_SHIFT, (fbn + count - 1 >> FIELDS_SHIFT) + 1)
    if not all(image.editor.plan(plan, index) for index in indexes):
        return None
    return not plan.grows and replaces_own(image, range(fbn, fbn + count))


def write_now(image: Image, targets: list[Target], buffers: list[Buffer]) -> bool:
    """Allocate, write and install without waiting. False: nothing was changed. Raises DeviceFailed,
    BlockDamaged.
    """
    epoch = image.state.epoch
    indexes = indexes_of(targets)
    plan = plan_for(image, epoch, indexes)
    if plan is None:
        return False
    count = sum(map(len, buffers)) // BLOCK_BYTES
    extents = (
        take_now(image, plan, [fbn for fbn, crc in targets if crc != ZERO_CRC], count)
        if count
        else []
    )
    if extents is None or not write_out(image, buffers, extents):
        return False
    image.editor.carry_out(plan)
    install(image, epoch, nodes_of(image, indexes), targets, extents)
    return True


def take_now(image: Image, plan: Plan, fbns: Sequence[int], count: int) -> Extents | None:
    """Blocks for data, and the plan's nodes still at hand beside them. None: nothing was taken;
    ``state.missing`` is what to wait for.
    """
    allocator = image.allocator
    borrowed = allocator.is_short(count) and not plan.grows and replaces_own(image, fbns)
    if borrowed is None:
        return None
    extents = allocator.take(count, borrowed)
    if extents is None:
        return None
    try:
        ready = image.editor.at_hand(plan)
    except StorageError:
        allocator.give_back(extents)
        raise
    if not ready:
        allocator.give_back(extents)
        return None
    return extents


def write_out(image: Image, buffers: list[Buffer], extents: Extents) -> bool:
    """Write the buffers to their blocks, at once. False: they were given back. Raises
    DeviceFailed.
    """
    device, allocator = image.state.device, image.allocator
    try:
        for part, offset, length in slices_by_extent(buffers, extents) if extents else ():
            if not device.try_writev(part, offset, length):
                allocator.give_back(extents)
                return False
    except StorageError:
        allocator.give_back(extents)
        raise
    return True


async def write_blocks(image: Image, targets: list[Target], buffers: list[Buffer]) -> None:
    """The same, waiting where it must. Raises PoolFull, DeviceFailed, BlockDamaged, OutOfRange (the
    image shrank meanwhile).
    """
    state = image.state
    count = sum(map(len, buffers)) // BLOCK_BYTES
    fbns = [fbn for fbn, crc in targets if crc != ZERO_CRC]
    extents, borrowed = (
        await when_possible(state, lambda: _take_for(image, targets, fbns, count))
        if count
        else ([], False)
    )
    lent = count if borrowed else 0
    image.allocator.lent_blocks += lent
    try:
        for part, offset, length in slices_by_extent(buffers, extents) if count else ():
            if not state.device.try_writev(part, offset, length):
                await state.device.writev(part, offset)
        await when_possible(
            state, lambda: _install_now(image, targets, fbns if borrowed else [], extents)
        )
    except Exception:
        # Not after a cancellation: the device may still be writing there, so those blocks stay
        # claimed until the pool is closed.
        image.allocator.give_back(extents)
        raise
    finally:
        image.allocator.lent_blocks -= lent


def _take_for(
    image: Image, targets: list[Target], fbns: list[int], count: int
) -> tuple[Extents, bool] | None:
    """Blocks for data, and whether they are borrowed: then the pointer blocks are looked at, to see
    that the write gives some back.
    """
    allocator = image.allocator
    plan = Plan(image.state.epoch)
    short = allocator.is_short(count)
    if short and not all(image.editor.plan(plan, index) for index in indexes_of(targets)):
        return None
    extents = take_now(image, plan, fbns, count)
    return None if extents is None else (extents, short)


def _install_now(
    image: Image, targets: list[Target], borrowed: list[int], extents: Extents
) -> bool | None:
    """Look whether the write is still possible, and install it, in one step. None: nothing was
    changed, and it has to be waited for.

    ``borrowed``: the blocks whose old ones must come free for it.
    """
    state = image.state
    epoch = state.epoch
    state.check_writable()
    if image.kind != KIND_VDISK:
        raise VolumeClosed(f"{image.label} was deleted while this write was under way")
    if targets[-1][0] * BLOCK_BYTES >= image.limit_bytes:
        raise OutOfRange(
            f"{image.label} shrank to {image.limit_bytes} bytes while this write was under way"
        )
    indexes = indexes_of(targets)
    plan = plan_for(image, epoch, indexes)
    if plan is None:
        return None
    own = not borrowed or (not plan.grows and replaces_own(image, borrowed))
    if own is None:
        return None
    if not own:
        raise PoolFull(
            f"{image.label}: the pool is full, and this write shares blocks with a snapshot by now:"
            " delete snapshots or vdisks"
        )
    image.editor.carry_out(plan)
    install(image, epoch, nodes_of(image, indexes), targets, extents)
    return True
