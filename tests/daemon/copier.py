"""A client that has one vdisk copied to another by EXTENDED COPY."""

from daemon.iscsi.initiator import Initiator
from protocol.volume import Buffer
from tests.daemon.programs import Daemon

TARGET = "copying"
SOURCE, DESTINATION = 0, 1
# A segment descriptor counts up to 65535 sectors; as many whole blocks of 4096 bytes as that has.
SEGMENT_SECTORS = 65535 // 8 * 8
SEGMENTS_MAX = 64


class Copier(Initiator):
    """An initiator that sends any command to any LUN of a target."""

    async def command(
        self, cdb: bytes, *, lun: int = 0, data: bytes = b"", read_bytes: int = 0
    ) -> Buffer:
        return await self._command(
            lambda done: self._connection.submit(lun, cdb, done, data=data, read_bytes=read_bytes)
        )

    async def naa(self, lun: int) -> bytes:
        """The unit's own designator, as EXTENDED COPY names it."""
        return bytes(await self.command(bytes((0x12, 1, 0x83, 1, 0, 0)), lun=lun, read_bytes=256))[
            8:24
        ]

    async def copy(
        self, size_bytes: int, source_bytes: int = 0, destination_bytes: int = 0
    ) -> None:
        """EXTENDED COPY of a range from LUN SOURCE to LUN DESTINATION, as many commands as it
        needs.
        """
        targets = b"".join([_target(await self.naa(lun)) for lun in (SOURCE, DESTINATION)])
        segments = segments_of(size_bytes >> 9, source_bytes >> 9, destination_bytes >> 9)
        for first in range(0, len(segments), SEGMENTS_MAX):
            listed = b"".join(segments[first : first + SEGMENTS_MAX])
            head = (
                bytes((1, 0))
                + len(targets).to_bytes(2, "big")
                + bytes(4)
                + len(listed).to_bytes(4, "big")
                + bytes(4)
            )
            data = head + targets + listed
            await self.command(
                bytes((0x83,)) + bytes(9) + len(data).to_bytes(4, "big") + bytes(2), data=data
            )


def _target(naa: bytes) -> bytes:
    return (
        bytes((0xE4, 0, 0, 0, 1, 3, 0, len(naa)))
        + naa.ljust(20, b"\0")
        + b"\0"
        + (512).to_bytes(3, "big")
    )


def segments_of(sectors: int, source: int, destination: int) -> list[bytes]:
    """Block to block descriptors over a range."""
    found = []
    for at in range(0, sectors, SEGMENT_SECTORS):
        count = min(SEGMENT_SECTORS, sectors - at)
        numbers = (
            count.to_bytes(2, "big")
            + (source + at).to_bytes(8, "big")
            + (destination + at).to_bytes(8, "big")
        )
        found.append(
            bytes((2, 0, 0, 24))
            + SOURCE.to_bytes(2, "big")
            + DESTINATION.to_bytes(2, "big")
            + bytes(2)
            + numbers
        )
    return found


async def two_disks(daemon: Daemon, size_bytes: int) -> Copier:
    """A target with two vdisks as its LUNs, and a session with it."""
    await daemon.ctl("target", "create", TARGET)
    for name in ("source", "destination"):
        await daemon.ctl("vdisk", "create", name, "--size", str(size_bytes))
        await daemon.ctl("target", "map", TARGET, name)
    host, _, port = daemon.portal.rpartition(":")
    return await Copier.connect(host, int(port), daemon.url(TARGET).split("/")[3])


async def used_bytes(daemon: Daemon) -> int:
    """Of the whole pool, when nothing waits to be freed."""
    await daemon.ctl("pool", "check")  # takes a consistency point
    shown = await daemon.ctl("pool", "show")
    used: int = shown["used_bytes"]
    return used
