"""Limits of the SCSI device server, each with its reason. The Block Limits page tells clients the
same numbers.
"""

from typing import Final

from protocol.volume import ATOMIC_WRITE_BYTES_MAX

SECTOR_BYTES: Final = 512
SECTOR_SHIFT: Final = 9
# 4096-byte physical blocks: two to this power of sectors (READ CAPACITY(16), LOGICAL BLOCKS PER
# PHYSICAL BLOCK EXPONENT).
PHYSICAL_BLOCK_EXPONENT: Final = 3
PHYSICAL_BLOCK_SECTORS: Final = 1 << PHYSICAL_BLOCK_EXPONENT

# The largest length of READ(10) and WRITE(10) always fits; only the 12- and 16-byte forms can ask
# for more.
TRANSFER_SECTORS_MAX: Final = 65536
# 1 MiB: beyond it a larger transfer gains nothing, since the target moves data in pieces of this
# order.
TRANSFER_SECTORS_OPTIMAL: Final = 2048
# 512 MiB a descriptor list: deallocation is a walk over pointer blocks, and a command must not hold
# the loop for long. libiscsi's suite considers more than this insane.
UNMAP_SECTORS_MAX: Final = 1 << 20
# The whole parameter list stays below one page.
UNMAP_DESCRIPTORS_MAX: Final = 255
# The largest that the one-byte field can say.
COMPARE_AND_WRITE_SECTORS_MAX: Final = 255
# 32 MiB, as a transfer: a pattern that is not zeros is really written.
WRITE_SAME_SECTORS_MAX: Final = 65536
# EXTENDED COPY: a copy between two disks needs two descriptors; some copies go round a few disks of
# a cluster.
COPY_TARGET_DESCRIPTORS_MAX: Final = 16
# 64 segments of 32 MiB are 2 GiB a command: as many as are copied in a few seconds where blocks
# cannot be shared, so that a client's timeout (30 s mostly) is far.
COPY_SEGMENT_DESCRIPTORS_MAX: Final = 64
# As many at once as one session may have commands under way.
COPIES_CONCURRENT_MAX: Final = 128
# SANITIZE goes through the disk in steps of this size, makes each durable, and returns to the event
# loop between them.
SANITIZE_STEP_BYTES: Final = 1024 * 1024
# Deallocation touches pointer blocks only, 1 MiB a block of them.
SANITIZE_ERASE_STEP_BYTES: Final = 256 * 1024 * 1024
# WRITE ATOMIC works on whole blocks.
ATOMIC_SECTORS_MAX: Final = ATOMIC_WRITE_BYTES_MAX // SECTOR_BYTES
# Unit of the counts in the logical block provisioning log page: 2 to this power of sectors, 1 MiB
# (SBC-3 6.6.7, THRESHOLD EXPONENT).
THRESHOLD_EXPONENT: Final = 11
# GET LBA STATUS looks at this much at a time; a client goes on from where the answer ends.
LBA_STATUS_SECTORS_MAX: Final = 1 << 21
LBA_STATUS_DESCRIPTORS_MAX: Final = 255
# One piece of a command that takes long, and has a turn of the event loop for each
# (`protocol.turns`).
PIECE_BYTES: Final = 256 * 1024
# Up to this no turn is taken: COMMAND_WINDOW such commands take a few milliseconds, and a COMPARE
# AND WRITE, which clusters wait for, is answered in the wake-up that received it.
AT_ONCE_BYTES_MAX: Final = 16 * 1024
# Bounds the queue of a nexus that never fetches its unit attentions (SAM-5 5.14: the oldest may be
# dropped).
UNIT_ATTENTIONS_MAX: Final = 16
# Relative port identifiers begin with 1 (SPC-4 7.8.6.8). Each target has one port, and a unit that
# is mapped into several targets several.
FIRST_TARGET_PORT: Final = 1
TARGET_PORT_MAX: Final = 0xFFFF
