"""Long writes: many whole blocks one after the other, installed by slices of pointer blocks instead
of field by field.

They go to the device in pieces of at most PIECE_BYTES, each allocated, written and installed in one
step: what is not possible now (``write_long`` says how far it came) is left to the asynchronous
way. The same rules hold as for ``storage.data.write_path``.
"""

from array import array
from itertools import repeat

from storage.checksum import crc32c
from storage.data.write_path import (
    Buffer,
    Extents,
    Target,
    plan_for,
    split_blocks,
    take_now,
    write_now,
    write_out,
)
from storage.epoch.epoch import Epoch
from storage.epoch.ledger import AllocationLedger
from storage.fields import BIRTH_SHIFT
from storage.images.image import Image
from storage.layout import (
    BLOCK_BYTES,
    FIELDS_MASK,
    FIELDS_PER_BLOCK,
    FIELDS_SHIFT,
    HOLE,
    ZERO_BLOCK_CRC,
    ZERO_POINTER,
)

# What a device writes at once without handing it to its threads
# (storage.device.descriptor.INLINE_WRITE_BYTES_MAX).
PIECE_BYTES = 256 * 1024
# From here on slices are faster than a loop over the fields.
LONG_BYTES_MIN = 32 * 1024


def write_long(image: Image, offset_bytes: int, data: Buffer) -> int:
    """Write whole blocks, as far as nothing has to be waited for; returns how many bytes. Raises
    PoolFull, DeviceFailed, BlockDamaged.
    """
    view = memoryview(data)
    at = 0
    while at < len(view):
        piece = view[at : at + PIECE_BYTES]
        if not _write_piece(image, (offset_bytes + at) // BLOCK_BYTES, piece):
            break
        at += len(piece)
    return at


def _write_piece(image: Image, fbn: int, piece: memoryview) -> bool:
    crcs = [crc32c(piece[at : at + BLOCK_BYTES]) for at in range(0, len(piece), BLOCK_BYTES)]
    if ZERO_BLOCK_CRC in crcs:  # block by block: some of them may become zero pointers
        targets: list[Target] = []
        buffers: list[Buffer] = []
        split_blocks(fbn, piece, targets, buffers)
        return write_now(image, targets, buffers)
    epoch = image.state.epoch
    count = len(crcs)
    plan = plan_for(image, epoch, range(fbn >> FIELDS_SHIFT, (fbn + count - 1 >> FIELDS_SHIFT) + 1))
    if plan is None:
        return False
    extents = take_now(image, plan, range(fbn, fbn + count), count)
    if extents is None or not write_out(image, [piece], extents):
        return False
    image.editor.carry_out(plan)
    install_run(image, epoch, fbn, crcs, extents)
    return True


def install_run(image: Image, epoch: Epoch, fbn: int, crcs: list[int], extents: Extents) -> None:
    """Point the fields from ``fbn`` on at the new blocks; the level-1 blocks above are writable in
    ``epoch``. Nothing here waits.
    """
    image.touch()
    image.used_blocks += len(crcs)
    epoch.ledger.allocated.extend(extents)
    done = 0
    for first, length in extents:
        vbn = first
        while vbn < first + length:
            count = min(first + length - vbn, FIELDS_PER_BLOCK - (fbn & FIELDS_MASK))
            _install_slice(image, epoch, fbn, vbn, crcs[done : done + count])
            vbn += count
            fbn += count
            done += count


def _install_slice(image: Image, epoch: Epoch, fbn: int, vbn: int, crcs: list[int]) -> None:
    """The part of a run that lies within one pointer block and one extent."""
    count = len(crcs)
    fields = image.tree.leaves[fbn >> FIELDS_SHIFT].q
    at = (fbn & FIELDS_MASK) * 2  # from here on inlines set_field of storage.fields
    old = fields[at : at + 2 * count].tolist()
    if any(old) or image.watcher is not None:
        _give_up(image, epoch.ledger, fbn, old)
    birth = epoch.number << BIRTH_SHIFT
    new = [0] * (2 * count)
    new[::2] = range(vbn, vbn + count)
    new[1::2] = [crc | birth for crc in crcs]
    fields[at : at + 2 * count] = memoryview(array("Q", new))
    epoch.unlogged.entries.extend(
        zip(repeat(image.number), crcs, range(fbn, fbn + count), range(vbn, vbn + count), repeat(1))
    )


def _give_up(image: Image, ledger: AllocationLedger, fbn: int, old: list[int]) -> None:
    """What the fields pointed at before loses this reference."""
    vbns, tails = old[::2], old[1::2]
    shared_cp, watcher = image.tree.shared_cp, image.watcher
    if min(vbns) > ZERO_POINTER and min(tails) >> BIRTH_SHIFT > shared_cp:
        ledger.freed.extend(vbns)
        image.used_blocks -= len(vbns)
        return
    for index, (vbn, tail) in enumerate(zip(vbns, tails, strict=True)):
        if vbn > ZERO_POINTER:
            image.used_blocks -= 1
            (ledger.freed if tail >> BIRTH_SHIFT > shared_cp else ledger.dropped).append(vbn)
        elif watcher is not None and vbn == HOLE:
            watcher.hole_filled(fbn + index)
