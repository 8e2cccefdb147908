"""Copying whole blocks from one image to another by reference: the destination's fields take the
source's pointers, and the share map counts them. No data moves; either side that is written
afterwards gets blocks of its own.

Such a change is not in the intent log, whose records name blocks that are new: a flush that finds
one takes a consistency point instead (``LogQueue.by_reference``).
"""

import numpy as np
import numpy.typing as npt

from storage.epoch.epoch import Epoch
from storage.errors import NotByReference, OutOfRange, VolumeClosed
from storage.fields import FIELD_DTYPE
from storage.images.image import Image
from storage.layout import (
    BLOCK_BYTES,
    FIELDS_MASK,
    FIELDS_SHIFT,
    HOLE,
    KIND_SNAPSHOT,
    KIND_VDISK,
    ZERO_POINTER,
)
from storage.slicer import Slicer
from storage.tree.attempt import when_possible
from storage.tree.node import Node

# Fields of pointer blocks, FIELD_DTYPE.
Fields = npt.NDArray[np.void]


async def copy_blocks(source: Image, source_fbn: int, image: Image, fbn: int, count: int) -> None:
    """Make blocks [fbn, fbn + count) of ``image`` read as those of ``source``. Raises BlockDamaged,
    DeviceFailed, PoolFull.
    """
    slicer, end = Slicer(), fbn + count
    while fbn < end:
        stop = min(end, (fbn | FIELDS_MASK) + 1)
        await _copy_within_block(source, source_fbn, image, fbn, stop - fbn)
        source_fbn += stop - fbn
        fbn = stop
        await slicer.breathe()


async def _copy_within_block(
    source: Image, source_fbn: int, image: Image, fbn: int, count: int
) -> None:
    """The part that lies in one level-1 block of the destination."""
    await when_possible(image.state, lambda: _copy_now(source, source_fbn, image, fbn, count))


def _copy_now(source: Image, source_fbn: int, image: Image, fbn: int, count: int) -> bool | None:
    """Find the pointers and take them, in one step. None: nothing was changed; ``state.missing`` is
    what to wait for.
    """
    _check_both(source, image, fbn + count)
    image.share_map.check_room(NotByReference)
    pointers = _pointers(source, source_fbn, count)
    if pointers is None:
        return None
    epoch = image.state.epoch
    node = image.editor.writable(fbn >> FIELDS_SHIFT, epoch)
    if node is None:
        return None
    _mark_shared(source, epoch)
    _mark_shared(image, epoch)
    _give_up(image, epoch, node, fbn, count)
    _install(image, epoch, node, fbn, pointers)
    return True


def _check_both(source: Image, image: Image, end: int) -> None:
    """Raise VolumeClosed or OutOfRange if a deletion or a shrink has come meanwhile.

    Of a deleted source above all: reclaim frees what was its own without asking the share map.
    """
    for one in (source, image):
        if one.kind not in {KIND_VDISK, KIND_SNAPSHOT}:
            raise VolumeClosed(f"{one.label} was deleted while this copy was under way")
    if end * BLOCK_BYTES > image.limit_bytes:
        raise OutOfRange(
            f"{image.label} shrank to {image.limit_bytes} bytes while this copy was under way"
        )


def _pointers(source: Image, fbn: int, count: int) -> Fields | None:
    """What the source's blocks point at, through its backing stores; None when a pointer block must
    be loaded first.
    """
    found = np.zeros(count, dtype=FIELD_DTYPE)
    at, reach = source, count
    while True:
        if not _fill_holes(at, fbn, found[:reach]):
            return None
        reach = min(reach, at.backing_blocks - fbn)
        if at.backing is None or reach <= 0 or (found["vbn"][:reach] != HOLE).all():
            return found
        at = at.backing


def _fill_holes(image: Image, fbn: int, found: Fields) -> bool:
    """Give the holes of ``found`` the fields of one image; False when a pointer block must be
    loaded first.
    """
    done = 0
    while done < len(found):
        low = (fbn + done) & FIELDS_MASK
        part = found[done : done + FIELDS_MASK + 1 - low]
        holes = part["vbn"] == HOLE
        if holes.any():
            node = image.tree.peek((fbn + done) >> FIELDS_SHIFT)
            if node is None:
                return False
            part[holes] = node.fields()[low : low + len(part)][holes]
        done += len(part)
    return True


def _mark_shared(image: Image, epoch: Epoch) -> None:
    """Blocks as old as now may have other references from now on. A snapshot's are counted as
    shared anyway.
    """
    if image.kind == KIND_VDISK:
        image.touch()
        image.tree.shared_cp = epoch.number


def _give_up(image: Image, epoch: Epoch, node: Node, fbn: int, count: int) -> None:
    low = fbn & FIELDS_MASK
    fields = node.fields()[low : low + count]
    old = fields["vbn"][fields["vbn"] > ZERO_POINTER]
    epoch.ledger.dropped_arrays.append(old.copy())
    image.used_blocks -= len(old)
    if image.watcher is not None and (fields["vbn"] == HOLE).any():
        image.watcher.holes_hidden()


def _install(image: Image, epoch: Epoch, node: Node, fbn: int, pointers: Fields) -> None:
    """Point at the source's blocks; what reads as zeros there becomes a zero pointer, which hides
    whatever is behind.
    """
    zeros = pointers["vbn"] <= ZERO_POINTER
    pointers[zeros] = (ZERO_POINTER, 0, 0)
    low = fbn & FIELDS_MASK
    node.fields()[low : low + len(pointers)] = pointers
    vbns = pointers["vbn"][~zeros]
    epoch.ledger.added.append(vbns)
    epoch.unlogged.by_reference = True
    image.used_blocks += len(vbns)
