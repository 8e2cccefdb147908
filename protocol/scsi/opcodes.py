"""Operation codes (SPC-4 annex E, SBC-3 clause 5), and the service actions of those that more than
one module has commands of. Other service actions stand with the commands that have them.
"""

from typing import Final

TEST_UNIT_READY: Final = 0x00
REQUEST_SENSE: Final = 0x03
READ_6: Final = 0x08
WRITE_6: Final = 0x0A
INQUIRY: Final = 0x12
MODE_SELECT_6: Final = 0x15
RESERVE_6: Final = 0x16
RELEASE_6: Final = 0x17
MODE_SENSE_6: Final = 0x1A
START_STOP_UNIT: Final = 0x1B
PREVENT_ALLOW_MEDIUM_REMOVAL: Final = 0x1E
READ_CAPACITY_10: Final = 0x25
READ_10: Final = 0x28
WRITE_10: Final = 0x2A
WRITE_AND_VERIFY_10: Final = 0x2E
VERIFY_10: Final = 0x2F
PRE_FETCH_10: Final = 0x34
SYNCHRONIZE_CACHE_10: Final = 0x35
READ_DEFECT_DATA_10: Final = 0x37
WRITE_SAME_10: Final = 0x41
UNMAP: Final = 0x42
SANITIZE: Final = 0x48
LOG_SENSE: Final = 0x4D
MODE_SELECT_10: Final = 0x55
MODE_SENSE_10: Final = 0x5A
PERSISTENT_RESERVE_IN: Final = 0x5E
PERSISTENT_RESERVE_OUT: Final = 0x5F
EXTENDED_COPY: Final = 0x83
RECEIVE_COPY_RESULTS: Final = 0x84
READ_16: Final = 0x88
COMPARE_AND_WRITE: Final = 0x89
WRITE_16: Final = 0x8A
ORWRITE_16: Final = 0x8B
WRITE_AND_VERIFY_16: Final = 0x8E
VERIFY_16: Final = 0x8F
PRE_FETCH_16: Final = 0x90
SYNCHRONIZE_CACHE_16: Final = 0x91
WRITE_SAME_16: Final = 0x93
WRITE_ATOMIC_16: Final = 0x9C
SERVICE_ACTION_IN_16: Final = 0x9E
REPORT_LUNS: Final = 0xA0
MAINTENANCE_IN: Final = 0xA3
READ_12: Final = 0xA8
WRITE_12: Final = 0xAA
WRITE_AND_VERIFY_12: Final = 0xAE
VERIFY_12: Final = 0xAF
READ_DEFECT_DATA_12: Final = 0xB7

# Of SERVICE ACTION IN(16).
READ_CAPACITY_16: Final = 0x10
GET_LBA_STATUS: Final = 0x12
