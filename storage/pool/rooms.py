"""The rooms of one pool: each is built from those before it, in the order in which they need each
other.

Where two need each other, a third one stands between them, built before both: ``requests`` between
what asks for consistency points and what takes them, ``retired`` and ``freed`` between the write
allocator and what brings freed blocks back to it.
"""

from storage.allocation.active_map import ActiveMap
from storage.allocation.host_probe import HostProbe
from storage.allocation.map_changes import MapChanges
from storage.allocation.share_map import ShareMap
from storage.allocation.write_allocator import WriteAllocator
from storage.backdoor.freed_blocks import FreedBlocks
from storage.backdoor.handler import BackdoorMessageHandler
from storage.backdoor.reclaim import Reclaims
from storage.consistency.configuration import Configuration
from storage.consistency.consistency_point import ConsistencyPoints, Written
from storage.consistency.retirement import Retired, Retirement
from storage.device import Device
from storage.images.catalogue import Catalogue
from storage.layout import (
    ACTIVE_MAP,
    CONFIGURATION,
    METAFILE_NAMES,
    REGION_SUMMARY,
    SHARE_MAP,
    VDISK_TABLE,
)
from storage.log.intent_log import IntentLog
from storage.split.service import SplitService
from storage.state.host_room import HostRoom
from storage.state.point_requests import PointRequests
from storage.state.pool_state import EventSink, PoolState
from storage.superblock.superblock import Superblock
from storage.tree.buffer_tree import BufferTree
from storage.tree.editor import TreeEditor
from storage.tree.interfaces import NOTHING_SHARED
from storage.vdisks.deletion import Deletion
from storage.vdisks.lifecycle import Lifecycle
from storage.vdisks.listing import Listing
from storage.vdisks.open_volumes import OpenVolumes


class Rooms:
    """What a pool is made of. Nothing here runs yet (storage.pool.opening)."""

    def __init__(
        self, device: Device, superblock: Superblock, cache_bytes: int, on_event: EventSink
    ) -> None:
        self.device = device
        self.superblock = superblock
        state = self.state = PoolState(device, superblock.cp_number, cache_bytes, on_event)
        self.host_room = HostRoom(state)
        self.requests = PointRequests()
        self.retired = Retired()
        self.handler = BackdoorMessageHandler(state)
        self._build_maps()
        self._build_table()
        self._build_points()
        self._build_vdisks()

    def _build_maps(self) -> None:
        """The metafiles, and the allocator that reads and feeds them."""
        state, superblock = self.state, self.superblock
        self.metafiles = [
            BufferTree(state, name, root.levels, (root.vbn, root.crc, root.birth), 0)
            for name, root in zip(METAFILE_NAMES, superblock.roots, strict=True)
        ]
        self.table = self.metafiles[VDISK_TABLE]
        self.active_map = ActiveMap(
            self.metafiles[ACTIVE_MAP], self.metafiles[REGION_SUMMARY], superblock.used_blocks
        )
        freed = FreedBlocks(state, self.requests, self.retired, self.handler)
        self.allocator = WriteAllocator(
            state, self.host_room, self.active_map, freed, superblock.size_blocks
        )
        self.host_probe = HostProbe(
            self.host_room, self.allocator.stock if self.device.thin else None
        )
        # Metafiles share nothing, and what names their roots is the superblock.
        editors = self.editors = [
            TreeEditor(state, tree, self.allocator, NOTHING_SHARED, None) for tree in self.metafiles
        ]
        self.map_changes = MapChanges(
            state, self.active_map, editors[ACTIVE_MAP], editors[REGION_SUMMARY], self.allocator
        )
        self.share_map = ShareMap(state, editors[SHARE_MAP])

    def _build_table(self) -> None:
        """What images there are, and what the log and the daemon add to that."""
        superblock = self.superblock
        self.catalogue = Catalogue(self.state, self.allocator, self.share_map)
        self.log = IntentLog(
            self.state,
            self.host_room,
            self.requests,
            superblock.uuid,
            superblock.log_blocks,
            superblock.log_head_block,
            superblock.log_head_sequence,
        )
        self.configuration = Configuration(self.state, self.editors[CONFIGURATION], self.allocator)
        self.volumes = OpenVolumes(self.catalogue, self.host_room, self.log)

    def _build_points(self) -> None:
        """What makes all of it durable."""
        self.retirement = Retirement(self.state, self.host_room, self.allocator, self.retired)
        written = Written(
            self.superblock,
            self.catalogue,
            self.log,
            self.configuration,
            self.active_map,
            self.map_changes,
            self.share_map,
            self.editors,
        )
        self.points = ConsistencyPoints(
            self.state,
            self.host_room,
            self.requests,
            self.allocator,
            self.retired,
            self.retirement,
            written,
            self.volumes,
        )

    def _build_vdisks(self) -> None:
        """What administrators do with disks."""
        state, requests, catalogue = self.state, self.requests, self.catalogue
        self.reclaims = Reclaims(state, requests, catalogue, self.handler)
        self.deletion = Deletion(state, requests, catalogue, self.volumes, self.reclaims)
        self.lifecycle = Lifecycle(
            state,
            requests,
            self.allocator,
            self.share_map,
            catalogue,
            self.volumes,
            self.deletion,
        )
        self.splits = SplitService(
            state,
            self.host_room,
            requests,
            self.share_map,
            catalogue,
            self.handler,
            self.deletion,
        )
        self.listing = Listing(state, requests, catalogue)
