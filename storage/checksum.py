"""CRC32C, which every pointer to a block carries. This module is the only one that imports it."""

from crc32c import crc32c

__all__ = ["crc32c"]
