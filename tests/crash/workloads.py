"""The workloads: every short sequence of twelve operations, and seeded long ones.

All begin with the same small pool: vdisk ``a`` of two level-1 blocks, its snapshots ``base`` and
``spare``, and a clone ``c`` of ``base``.
"""

import itertools
from collections.abc import Awaitable, Callable, Iterator

from storage.pool import Pool
from tests.crash.oracle import SECTORS_PER_BLOCK, Model
from tests.crash.recording import PageDevice, Pages
from tests.crash.session import CACHE_BYTES, Session

POOL_BYTES = 8 << 20
SIZE_BLOCKS = 300
# First and last blocks, both sides of a level-1 border.
SET_BLOCKS = (0, 1, 2, 3, 255, 256, 299)
LENGTH_MAX = 3


async def make_base() -> tuple[Pages, Model]:
    """The device and the model that every workload begins with."""
    device = PageDevice(POOL_BYTES)
    await Pool.format(device)
    session = Session(await Pool.open_on(device, CACHE_BYTES), Model())
    await session.create("a", SIZE_BLOCKS)
    for fbn in SET_BLOCKS:
        await session.write("a", fbn * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    await session.snapshot_create("a", "base")
    await session.write("a", 2 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    await session.snapshot_create("a", "spare")
    await session.clone_create("a", "base", "c")
    await session.write("c", 1 * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
    await session.pool.close()
    session.model.all_durable()
    return device.pages, session.model


# --- Twelve operations. ``turn`` says how often the operation was done before in this sequence. ---


async def write(session: Session, turn: int) -> None:
    """4 KiB where nothing was."""
    await session.write("a", (10 + turn) * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)


async def write_part(session: Session, turn: int) -> None:
    """Three sectors in the middle of a block that is there, and of one of the clone's that is
    behind it.
    """
    await session.write(("a", "c")[turn & 1], 2 * SECTORS_PER_BLOCK + 1 + turn, 3)


async def overwrite_shared(session: Session, turn: int) -> None:
    await session.write("a", (0, 255, 1)[turn % 3] * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)


async def unmap(session: Session, turn: int) -> None:
    """Of the clone: holes with something behind them, and a block of its own. Then of the vdisk."""
    name, fbn, count = (("c", 0, 3), ("a", 1, 3), ("c", 254, 3))[turn % 3]
    await session.unmap(name, fbn * SECTORS_PER_BLOCK, count * SECTORS_PER_BLOCK)


async def write_fua(session: Session, turn: int) -> None:
    await session.write(
        "c", (3, 255, 20)[turn % 3] * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK, fua=True
    )


async def flush(session: Session, turn: int) -> None:
    await session.flush("a")
    await session.flush("c")


async def consistency_point(session: Session, turn: int) -> None:
    await session.consistency_point()


async def snapshot_create(session: Session, turn: int) -> None:
    await session.snapshot_create("a", f"s{turn}")


async def snapshot_delete(session: Session, turn: int) -> None:
    """The spare one, then new ones, then the one that the clone stands on (which is refused until
    it was split).
    """
    snapshots = [name for name in session.model.disks if name.startswith("a@")]
    name = next(
        (name for name in ("a@spare", *sorted(snapshots, reverse=True)) if name in snapshots), None
    )
    if name is not None:
        await session.snapshot_delete(*name.split("@"))
        await session.step()


async def clone_create(session: Session, turn: int) -> None:
    snapshots = sorted(name for name in session.model.disks if name.startswith("a@"))
    if snapshots:
        vdisk, snapshot = snapshots[-1 if turn & 1 else 0].split("@")
        await session.clone_create(vdisk, snapshot, f"k{turn}")


async def split_step(session: Session, turn: int) -> None:
    """Begin to split the clone, then go on with it: counting and a first level-1 block, the rest,
    the release.
    """
    if not session.splitting("c") and session.pool._catalogue.vdisk("c").backing is not None:
        await session.split_start("c")
    for _ in range(2):
        await session.step()


async def resize(session: Session, turn: int) -> None:
    await session.resize("a", (257, 320, 200)[turn % 3])


Operation = Callable[[Session, int], Awaitable[None]]
OPERATIONS: dict[str, Operation] = {
    "write": write,
    "write_part": write_part,
    "overwrite_shared": overwrite_shared,
    "unmap": unmap,
    "write_fua": write_fua,
    "flush": flush,
    "consistency_point": consistency_point,
    "snapshot_create": snapshot_create,
    "snapshot_delete": snapshot_delete,
    "clone_create": clone_create,
    "split_step": split_step,
    "resize": resize,
}
Sequence = tuple[str, ...]


def sequences(length_max: int = LENGTH_MAX) -> Iterator[Sequence]:
    """Every sequence of 1 to ``length_max`` operations: 12 + 144 + 1728 = 1,884 of them."""
    for length in range(1, length_max + 1):
        yield from itertools.product(OPERATIONS, repeat=length)
