"""Finding where given VBNs stand. Only a pool with differences pays for this: it reads the pointer
blocks once more.
"""

from collections.abc import Mapping

import numpy as np

from storage import layout
from storage.check.fields import Fields, Label, field_table, place_words
from storage.check.steps import POINTER_BATCH_BLOCKS, Steps
from storage.check.walk import unpack_place

Places = Mapping[int, int]


def locate(
    wanted: set[int], places: Places, roots: list[tuple[int, Fields]], label: Label
) -> Steps[dict[int, str]]:
    """Words for each of the wanted VBNs that a field names: the first place found. ``roots`` are
    (level, fields) of the trees.
    """
    found: dict[int, str] = {}
    for level, fields in roots:
        _match(wanted, found, fields, level, label)
    targets = np.array(sorted(wanted), np.int64)
    parents = sorted(places)
    for first in range(0, len(parents), POINTER_BATCH_BLOCKS):
        batch = parents[first : first + POINTER_BATCH_BLOCKS]
        blocks = yield batch
        for vbn, block in zip(batch, blocks, strict=True):
            if block is not None:
                owner, level, index = unpack_place(places[vbn])
                _match(wanted, found, _children(block, owner, index, targets), level - 1, label)
    return found


def _children(
    block: memoryview, owner: int, index: int, targets: "np.ndarray[tuple[int], np.dtype[np.int64]]"
) -> Fields:
    row = field_table([block])[0]
    vbns = row["vbn"].astype(np.int64)
    slots = np.flatnonzero(np.isin(vbns, targets))
    owners = np.full(len(slots), owner, np.int64)
    return Fields(
        owners,
        (index << layout.FIELDS_SHIFT) + slots,
        vbns[slots],
        row["crc"][slots],
        row["birth"][slots],
    )


def _match(
    wanted: set[int], found: dict[int, str], fields: Fields, level: int, label: Label
) -> None:
    for owner, index, vbn in zip(
        fields.owners.tolist(), fields.indexes.tolist(), fields.vbns.tolist(), strict=True
    ):
        if vbn in wanted and vbn not in found:
            found[vbn] = place_words(label(owner), level, index, vbn)
