"""The device under a pool: one narrow interface, an ordinary file and a raw block device behind it,
and the I/O threads.

Everything above uses only ``Device`` and ``open_device`` / ``new_device``; which kind of device it
is shows nowhere else.
"""

from storage.device.creation import is_block_device, is_vacant, new_device, remove_leftover
from storage.device.interface import Buffer, Device, WritableBuffer
from storage.device.opening import open_device
from storage.device.reading import read_all
from storage.device.signatures import contents_of

__all__ = [
    "Buffer",
    "Device",
    "WritableBuffer",
    "contents_of",
    "is_block_device",
    "is_vacant",
    "new_device",
    "open_device",
    "read_all",
    "remove_leftover",
]
