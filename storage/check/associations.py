"""What must hold between table entries: unique names and identities, origins, backing stores, and
chains that end.
"""

from collections.abc import Callable, Iterator

from storage import layout
from storage.check.images import KIND_NAMES, Image, entry_faults
from storage.check.report import CheckReport
from storage.check.steps import ENTRY_BATCH, Steps
from storage.check.walk import METAFILE_OWNER

Images = dict[int, Image]


def owner_label(images: Images, owner: int) -> str:
    """Words for the owner of a block: a metafile, or an image by kind and name."""
    if owner >= METAFILE_OWNER:
        return layout.METAFILE_NAMES[owner - METAFILE_OWNER]
    image = images.get(owner)
    if image is None:
        return f"image {owner}"
    if image.kind == layout.KIND_DELETED:
        return f"deleted image {owner}"
    if image.kind == layout.KIND_SNAPSHOT:
        origin = images.get(image.origin)
        return f"snapshot '{origin.name if origin else f'image {image.origin}'}@{image.name}'"
    return f"vdisk '{image.name}'"


def check_associations(images: Images, cp: int, report: CheckReport) -> Steps[None]:
    """Report what is wrong with the entries alone and with each other."""
    is_new_name = _first_of()
    is_new_uuid = _first_of()
    for position, image in enumerate(images.values()):
        for fault in (*entry_faults(image, cp), *_relation_faults(images, image)):
            report.error(f"{owner_label(images, image.number)} (image {image.number}) {fault}")
        if image.kind != layout.KIND_DELETED:
            label = owner_label(images, image.number)
            if (
                first := is_new_name(
                    (
                        image.kind,
                        image.origin if image.kind == layout.KIND_SNAPSHOT else 0,
                        image.name,
                    ),
                    image.number,
                )
            ) >= 0:
                report.error(f"{label}: images {first} and {image.number} have the same name")
            if (first := is_new_uuid(image.uuid, image.number)) >= 0:
                report.error(
                    f"{label}: images {first} and {image.number} have the same UUID {image.uuid}"
                )
        if position % ENTRY_BATCH == 0:
            yield ()


def _first_of() -> Callable[[object, int], int]:
    """A function that says which number used a key before (-1: none did)."""
    seen: dict[object, int] = {}

    def first_user(key: object, number: int) -> int:
        first = seen.setdefault(key, number)
        return -1 if first == number else first

    return first_user


def _relation_faults(images: Images, image: Image) -> Iterator[str]:
    if image.kind == layout.KIND_SNAPSHOT:
        yield from _must_be(images, image.origin, layout.KIND_VDISK, "origin")
    if image.kind == layout.KIND_DELETED or not image.backing:
        return
    yield from _must_be(images, image.backing, layout.KIND_SNAPSHOT, "backing store")
    backing = images.get(image.backing)
    if backing is not None and image.backing_blocks > backing.size_blocks:
        yield (
            f"sees {image.backing_blocks} blocks of its backing store, which has only"
            f" {backing.size_blocks}"
        )
    if chain_circles(images, image):
        yield "is, by way of its backing stores, its own backing store"


def _must_be(images: Images, number: int, kind: int, role: str) -> Iterator[str]:
    found = images.get(number)
    if found is None:
        yield f"names image {number} as its {role}, and there is none"
    elif found.kind != kind:
        yield (
            f"names {owner_label(images, number)} as its {role}, which must be a {KIND_NAMES[kind]}"
        )


def chain_circles(images: Images, image: Image) -> bool:
    """True when following backing stores from ``image`` comes back to one met before."""
    met = {image.number}
    while image.backing:
        if image.backing in met:
            return True
        met.add(image.backing)
        backing = images.get(image.backing)
        if backing is None:
            return False
        image = backing
    return False
