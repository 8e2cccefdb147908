"""The pool and the model side by side: what clients do to vdisks, and how it is compared. The rules
for the table, splits and power losses follow in tests.storage.test_model.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
)

from tests.storage.crash_device import Fuse, Loss
from tests.storage.model import BLOCK_BYTES, SECTOR_BYTES, SECTORS_PER_BLOCK, Image, PoolModel
from tests.storage.running_pool import RunningPool

POOL_BYTES = 64 << 20
# Few enough names that the same ones come again: over deleted ones, and in conflicts.
NAMES = ("a", "b", "c", "d", "e")
SNAPSHOTS = ("s", "t", "u")
# One block, both sides of what one, two and three levels of pointer blocks cover, and four levels.
SIZES_BLOCKS = (1, 7, 255, 256, 257, 600, 65536, 65537, 70000, (1 << 24) + 3)
# Where writes go: the begin, the borders of level-1, level-2 and level-3 pointer blocks.
ANCHORS = (0, 1, 128, 250, 255, 256, 257, 511, 512, 65534, 65535, 65536, 65791, 69999, 1 << 24)
# More would make every comparison slow, and no bug needs them.
IMAGES_MAX = 8
# Where the first vdisk and its clones have data: a dozen level-1 pointer blocks, in two level-2
# ones, so that a split has some work.
POPULATED = (0, 254, 300, 511, 1000, 1300, 2000, 30000, 65530, 65600, 65800, 69996)
LOSSES = st.sampled_from(Loss)
# Where power fails in the middle of something: at any of its writes, or in one of its syncs, which
# is where most is at risk.
FUSES = st.builds(Fuse, st.integers(0, 30), st.just(False)) | st.builds(
    Fuse, st.integers(0, 3), st.just(True)
)
SEEDS = st.integers(0, 1 << 32)
DATA = st.data()
# Rate at which the background may be met in the middle: mostly few turns, sometimes many.
TURNS = st.one_of(st.integers(0, 10), st.integers(0, 300))


class ClientRules(RuleBasedStateMachine):
    """Rules are what may happen; each changes the pool and the model, and reads compare them."""

    pool: RunningPool

    def __init__(self) -> None:
        super().__init__()
        self.model = PoolModel()
        # Clones in mid-split: running, or paused.
        self.splits: dict[str, str] = {}

    def write_now(self, name: str, lba: int, count: int, fua: bool = False) -> None:
        content = self.model.data(name, lba, count)
        self.pool.run(self.pool.write(name, lba * SECTOR_BYTES, content, fua))
        self.wrote(name, lba, content, fua)

    def draw_vdisk(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(self.model.vdisks()), "vdisk")

    def draw_range(
        self, data: st.DataObject, image: Image, sectors_max: int = 40
    ) -> tuple[int, int]:
        """(LBA, count) of a short range, near a border of the tree."""
        anchors = [
            fbn
            for fbn in (*ANCHORS, image.size_blocks - 1, image.size_blocks - 3)
            if 0 <= fbn < image.size_blocks
        ]
        fbn = data.draw(st.sampled_from(sorted(set(anchors))), "block")
        lba = fbn * SECTORS_PER_BLOCK + data.draw(st.sampled_from([0, 0, 0, 1, 7]), "sector")
        most = min(sectors_max, image.size_sectors - lba)
        return lba, data.draw(
            st.one_of(
                st.sampled_from([n for n in (8, 16, 1, 9) if n <= most]), st.integers(1, most)
            ),
            "count",
        )

    # --- Clients ---

    @precondition(lambda self: self.model.vdisks())
    @rule(data=DATA, fua=st.sampled_from([False, False, False, True]))
    def write(self, data: st.DataObject, fua: bool) -> None:
        name = self.draw_vdisk(data)
        lba, count = self.draw_range(data, self.model.images[name])
        self.write_now(name, lba, count, fua)

    def wrote(self, name: str, lba: int, content: bytes, fua: bool = False) -> None:
        image = self.model.images[name]
        image.write(lba, content)
        if fua:
            image.durable_range(lba, len(content) // SECTOR_BYTES)

    @precondition(lambda self: self.model.vdisks())
    @rule(data=DATA, zeros=st.booleans())
    def write_many_blocks(self, data: st.DataObject, zeros: bool) -> None:
        """Over the border of a pointer block, or over a whole one; zeros in data become zero
        pointers.
        """
        name = self.draw_vdisk(data)
        image = self.model.images[name]
        first = data.draw(
            st.sampled_from([fbn for fbn in (0, 200, 256, 65500) if fbn < image.size_blocks]),
            "first",
        )
        count = data.draw(st.integers(1, min(300, image.size_blocks - first)), "blocks")
        content = self.model.data(name, first * SECTORS_PER_BLOCK, count * SECTORS_PER_BLOCK)
        if zeros:
            half = count // 2 * BLOCK_BYTES
            content = bytes(half) + content[half:]
        self.pool.run(self.pool.write(name, first * BLOCK_BYTES, content))
        self.wrote(name, first * SECTORS_PER_BLOCK, content)

    @precondition(lambda self: self.model.vdisks())
    @rule(data=DATA, unmap=st.booleans(), fua=st.booleans(), huge=st.booleans())
    def zero(self, data: st.DataObject, unmap: bool, fua: bool, huge: bool) -> None:
        name = self.draw_vdisk(data)
        image = self.model.images[name]
        lba, count = self.draw_range(data, image)
        if huge:
            count = data.draw(st.integers(count, image.size_sectors - lba), "huge count")
        self.pool.run(self.pool.zero(name, lba * SECTOR_BYTES, count * SECTOR_BYTES, unmap, fua))
        image.zero(lba, count)
        if fua and not unmap:
            image.durable_range(lba, count)

    @precondition(lambda self: self.model.vdisks())
    @rule(data=DATA)
    def flush(self, data: st.DataObject) -> None:
        name = self.draw_vdisk(data)
        self.pool.run(self.pool.flush(name))
        self.model.images[name].durable()

    @precondition(lambda self: self.model.images)
    @rule(data=DATA)
    def read(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.images)), "image")
        image = self.model.images[name]
        lba, count = self.draw_range(data, image, 3000)
        found = self.pool.run(self.pool.read(name, lba * SECTOR_BYTES, count * SECTOR_BYTES))
        assert found == image.read(lba, count), f"{name}: {count} sectors from {lba}"

    @precondition(lambda self: self.model.vdisks())
    @rule(data=DATA)
    def at_once(self, data: st.DataObject) -> None:
        """Commands that are under way together, on ranges that do not overlap, with a consistency
        point among them.
        """
        name = self.draw_vdisk(data)
        image = self.model.images[name]
        taken: set[int] = set()
        writes: list[tuple[int, bytes]] = []
        for _ in range(data.draw(st.integers(2, 6), "commands")):
            lba, count = self.draw_range(data, image)
            # Commands on different sectors of one block are welcome: each must leave the other's
            # alone.
            sectors = set(range(lba, lba + count))
            if sectors & taken:
                continue
            taken |= sectors
            unmap = data.draw(st.sampled_from([False, False, True]), "unmap")
            writes.append(
                (lba, bytes(count * SECTOR_BYTES) if unmap else self.model.data(name, lba, count))
            )
        self.pool.run(self.together(name, writes))
        for lba, content in writes:
            self.wrote(name, lba, content)

    async def together(self, name: str, writes: list[tuple[int, bytes]]) -> None:
        pool = self.pool
        commands: list[Coroutine[Any, Any, None]] = [pool.pool.consistency_point()]
        for lba, content in writes:
            if any(content):
                commands.append(pool.write(name, lba * SECTOR_BYTES, content))
            else:
                commands.append(pool.zero(name, lba * SECTOR_BYTES, len(content), unmap=True))
        # The consistency point goes somewhere among them.
        commands.insert(len(commands) // 2, commands.pop(0))
        await asyncio.gather(*commands)
