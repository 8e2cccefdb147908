"""The open volumes: one for each image that somebody reads or writes, for as long as anybody refers
to it.
"""

from collections.abc import Callable
from functools import partial
from weakref import WeakValueDictionary

from storage.images.catalogue import Catalogue
from storage.images.image import Image
from storage.layout import KIND_SNAPSHOT, KIND_VDISK
from storage.log.intent_log import IntentLog
from storage.state.host_room import HostRoom
from storage.vdisks.counters import Counters
from storage.vdisks.volume import Volume


class OpenVolumes:
    """By image number. ``closing``: the pool is closing, and so is every volume."""

    __slots__ = ("_catalogue", "_counters", "_host_room", "_log", "_volumes", "closing")

    def __init__(self, catalogue: Catalogue, host_room: HostRoom, log: IntentLog) -> None:
        self._catalogue = catalogue
        self._host_room = host_room
        self._log = log
        # By image number: those of images that had a volume since the pool was opened.
        self._counters: dict[int, Counters] = {}
        self._volumes: WeakValueDictionary[int, Volume] = WeakValueDictionary()
        self.closing = False

    def find(self, image: Image) -> Volume | None:
        """The volume of an image, if anybody refers to it. One of that number may also be left of
        an image that is no more.
        """
        volume = self._volumes.get(image.number)
        return volume if volume is not None and volume.image is image else None

    def open(self, image: Image, name: str, unused: Callable[[Image], None]) -> Volume:
        """The volume of an image. ``unused`` is called when the last session has left one of a
        snapshot.
        """
        volume = self.find(image)
        if volume is None:
            counters = self._counters.setdefault(image.number, Counters())
            volume = Volume(
                image, name, self._host_room, self._log, counters, partial(unused, image)
            )
            self._volumes[image.number] = volume
        if self.closing:
            volume.close()
        return volume

    def forget_counters(self, number: int) -> None:
        """The image of that number is no more."""
        self._counters.pop(number, None)

    def all(self) -> list[Volume]:
        """Those that there are now."""
        return list(self._volumes.values())

    def rename(self, numbers: list[int]) -> None:
        """The names of these images changed: their volumes follow."""
        for number in numbers:
            volume = self._volumes.get(number)
            if volume is not None:
                volume.name = self._catalogue.full_name_of(number)

    async def close(self) -> None:
        """The pool is closing: end what is under way on every volume, and refuse what comes, on
        later ones too.
        """
        self.closing = True
        for volume in self.all():
            volume.close()
            await volume.drain()

    def reverted(self) -> None:
        """The catalogue went back to the last durable consistency point: so do the volumes."""
        for number, volume in list(self._volumes.items()):
            image = volume.image
            if self._catalogue.find(number) is not image:
                volume.close()
            elif image.kind in (KIND_VDISK, KIND_SNAPSHOT):
                volume.name = self._catalogue.full_name(image)
                if not self.closing:
                    volume.reopen()
