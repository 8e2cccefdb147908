"""Which single bit of a block was flipped, from what that did to its CRC32C.

A CRC is linear: a flipped bit changes it by a value that depends only on how far the bit lies from
the end. Within a block all these values differ, and two flipped bits never look like one.
"""

from storage.checksum import crc32c

# What a byte changes the CRC32C by when it is the last of all.
OF_LAST_BYTE = [crc32c(bytes([byte])) ^ crc32c(b"\0") for byte in range(256)]


def flipped_bit(length_bytes: int, difference: int) -> tuple[int, int] | None:
    """(byte, mask) of the bit whose flip changes the CRC32C of so many bytes by ``difference``;
    None when no single one does.
    """
    changes = [OF_LAST_BYTE[1 << bit] for bit in range(8)]
    for at in range(length_bytes - 1, -1, -1):
        if difference in changes:
            return at, 1 << changes.index(difference)
        changes = [OF_LAST_BYTE[change & 0xFF] ^ change >> 8 for change in changes]
    return None
