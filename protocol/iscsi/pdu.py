"""PDU headers (RFC 7143 clause 11). Every basic header segment is 48 bytes, big-endian, of one
shape:

    0 opcode (bit 6: immediate)   1 flags   2, 3 by type   4 TotalAHSLength
    5-7 DataSegmentLength   8-15 LUN or by type
    16 Initiator Task Tag         20, 24, 28, 32, 36, 40, 44: seven words, named by the type

so that one Struct packs and unpacks them all; the properties of `Pdu` name the words.
"""

from struct import Struct
from typing import Final

HEADER_BYTES: Final = 48
HEADER: Final = Struct(">BBBBIQIIIIIIII")
IMMEDIATE: Final = 0x40
OPCODE_MASK: Final = 0x3F
RESERVED_TAG: Final = 0xFFFFFFFF
SERIAL_MASK: Final = 0xFFFFFFFF
SERIAL_HALF: Final = 0x80000000

NOP_OUT: Final = 0x00
SCSI_COMMAND: Final = 0x01
TASK_MANAGEMENT_REQUEST: Final = 0x02
LOGIN_REQUEST: Final = 0x03
TEXT_REQUEST: Final = 0x04
DATA_OUT: Final = 0x05
LOGOUT_REQUEST: Final = 0x06
SNACK_REQUEST: Final = 0x10
NOP_IN: Final = 0x20
SCSI_RESPONSE: Final = 0x21
TASK_MANAGEMENT_RESPONSE: Final = 0x22
LOGIN_RESPONSE: Final = 0x23
TEXT_RESPONSE: Final = 0x24
DATA_IN: Final = 0x25
LOGOUT_RESPONSE: Final = 0x26
R2T: Final = 0x31
ASYNC_MESSAGE: Final = 0x32
REJECT: Final = 0x3F

FINAL: Final = 0x80
# SCSI Command flags (11.3.1).
READ: Final = 0x40
WRITE: Final = 0x20
TASK_ATTRIBUTE: Final = 0x07
SIMPLE: Final = 1
# SCSI Response and Data-In flags (11.4.1, 11.7.1).
OVERFLOW: Final = 0x04
UNDERFLOW: Final = 0x02
STATUS_PRESENT: Final = 0x01
# Login and text flags (11.10, 11.12).
TRANSIT: Final = 0x80
CONTINUE: Final = 0x40

# Login stages (11.12.3).
SECURITY_STAGE: Final = 0
OPERATIONAL_STAGE: Final = 1
FULL_FEATURE: Final = 3

# Reject reasons (11.17.1).
REJECT_DATA_DIGEST: Final = 0x02
REJECT_SNACK: Final = 0x03
REJECT_PROTOCOL_ERROR: Final = 0x04
REJECT_NOT_SUPPORTED: Final = 0x05
REJECT_IMMEDIATE: Final = 0x06
REJECT_TASK_IN_PROGRESS: Final = 0x07
REJECT_INVALID_FIELD: Final = 0x09

# Asynchronous events (11.9.1).
ASYNC_LOGOUT_REQUESTED: Final = 1


class Pdu:
    """One received PDU. ``data`` is a view into the receive buffer, valid only while the PDU is
    handled.
    """

    __slots__ = (
        "ahs",
        "byte2",
        "byte3",
        "data",
        "data_intact",
        "flags",
        "header",
        "immediate",
        "itt",
        "lun",
        "opcode",
        "word20",
        "word24",
        "word28",
        "word32",
        "word36",
        "word40",
        "word44",
    )

    flags: int
    byte2: int
    byte3: int
    lun: int
    itt: int
    word20: int
    word24: int
    word28: int
    word32: int
    word36: int
    word40: int
    word44: int

    def __init__(
        self, header: bytes, ahs: bytes, data: memoryview, data_intact: bool = True
    ) -> None:
        self.header = header
        self.ahs = ahs
        self.data = data
        self.data_intact = data_intact
        (
            first,
            self.flags,
            self.byte2,
            self.byte3,
            _,  # lengths
            self.lun,
            self.itt,
            self.word20,
            self.word24,
            self.word28,
            self.word32,
            self.word36,
            self.word40,
            self.word44,
        ) = HEADER.unpack(header)
        self.opcode = first & OPCODE_MASK
        self.immediate = bool(first & IMMEDIATE)

    @property
    def ttt(self) -> int:
        """Target Transfer Tag."""
        return self.word20

    @property
    def expected_length(self) -> int:
        """Expected Data Transfer Length of a SCSI Command, in bytes."""
        return self.word20

    @property
    def cmd_sn(self) -> int:
        """CmdSN of a request."""
        return self.word24

    @property
    def stat_sn(self) -> int:
        """StatSN of a response."""
        return self.word24

    @property
    def exp_stat_sn(self) -> int:
        """ExpStatSN of a request."""
        return self.word28

    @property
    def exp_cmd_sn(self) -> int:
        """ExpCmdSN of a response."""
        return self.word28

    @property
    def max_cmd_sn(self) -> int:
        """MaxCmdSN of a response."""
        return self.word32

    @property
    def data_sn(self) -> int:
        """DataSN of Data-In and Data-Out, R2TSN of R2T."""
        return self.word36

    @property
    def buffer_offset(self) -> int:
        """Buffer Offset of Data-In, Data-Out and R2T, in bytes."""
        return self.word40

    @property
    def residual(self) -> int:
        """Residual Count of a response or Data-In; Desired Data Transfer Length of R2T."""
        return self.word44

    @property
    def cdb(self) -> bytes:
        """CDB of a SCSI Command, with what an extended-CDB header segment adds to its 16 bytes."""
        ahs = self.ahs
        if len(ahs) >= 4 and ahs[2] == 0x01:
            return self.header[32:48] + ahs[4 : 3 + int.from_bytes(ahs[:2], "big")]
        return self.header[32:48]


def pack(
    opcode: int,
    flags: int,
    itt: int,
    *,
    byte2: int = 0,
    byte3: int = 0,
    length: int = 0,
    lun: int = 0,
    words: tuple[int, int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0, 0),
) -> bytes:
    """A header. ``words`` are the seven words from byte 20 on."""
    return HEADER.pack(opcode, flags, byte2, byte3, length, lun, itt, *words)


def serial_after(left: int, right: int) -> bool:
    """True when ``left`` is later than ``right`` in 32-bit serial arithmetic (RFC 1982)."""
    return 0 < (left - right) & SERIAL_MASK < SERIAL_HALF
