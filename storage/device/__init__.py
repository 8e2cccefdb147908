"""The device under a pool: one narrow interface, an ordinary file and a raw block device behind it, and the I/O threads.

Everything above uses only ``Device`` and ``open_device`` / ``create_file``; which kind of device it is shows nowhere else.
"""

from storage.device.file import create_file
from storage.device.interface import Buffer, Device, WritableBuffer
from storage.device.opening import open_device
from storage.device.reading import read_all

__all__ = ["Buffer", "Device", "WritableBuffer", "create_file", "open_device", "read_all"]
