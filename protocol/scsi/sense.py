"""Sense data (SPC-4 4.5), in the fixed and in the descriptor format."""

from dataclasses import dataclass
from struct import Struct
from typing import Final

NO_SENSE: Final = 0x0
NOT_READY: Final = 0x2
MEDIUM_ERROR: Final = 0x3
HARDWARE_ERROR: Final = 0x4
ILLEGAL_REQUEST: Final = 0x5
UNIT_ATTENTION: Final = 0x6
DATA_PROTECT: Final = 0x7
COPY_ABORTED: Final = 0xA
ABORTED_COMMAND: Final = 0xB
MISCOMPARE: Final = 0xE

FIXED_BYTES: Final = 18
_CURRENT_FIXED: Final = 0x70
_CURRENT_DESCRIPTOR: Final = 0x72
_VALID: Final = 0x80
_FIXED: Final = Struct(">BBBIBIBBB3s")
_DESCRIPTOR_HEAD: Final = Struct(">BBBB3xB")
_INFORMATION: Final = Struct(">BBBxQ")
_KEY_SPECIFIC: Final = Struct(">BB2x3sx")
_INFORMATION_MAX_FIXED: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Sense:
    """One sense key with its additional code and qualifier, and what the two formats have room for
    beside them.
    """

    key: int
    asc: int
    ascq: int
    information: int | None = None
    key_specific: bytes = b"\0\0\0"

    def fixed(self) -> bytes:
        """18 bytes of fixed format (SPC-4 4.5.3). Information that does not fit four bytes is left
        out, as the standard wants.
        """
        fits = self.information is not None and self.information <= _INFORMATION_MAX_FIXED
        information = self.information if fits and self.information is not None else 0
        first = _CURRENT_FIXED | (_VALID if fits else 0)
        return _FIXED.pack(
            first,
            0,
            self.key,
            information,
            FIXED_BYTES - 8,
            0,
            self.asc,
            self.ascq,
            0,
            self.key_specific,
        )

    def descriptor(self) -> bytes:
        """Descriptor format (SPC-4 4.5.2) with an information and a sense-key-specific descriptor
        where there is something to say.
        """
        tail = b""
        if self.information is not None:
            tail += _INFORMATION.pack(0, 10, _VALID, self.information)
        if self.key_specific[0] & 0x80:
            tail += _KEY_SPECIFIC.pack(2, 6, self.key_specific)
        return (
            _DESCRIPTOR_HEAD.pack(_CURRENT_DESCRIPTOR, self.key, self.asc, self.ascq, len(tail))
            + tail
        )

    def encode(self, descriptor_format: bool) -> bytes:
        """The bytes in the format that the control mode page (D_SENSE) asks for."""
        return self.descriptor() if descriptor_format else self.fixed()


def _pointer(in_cdb: bool, byte: int, bit: int | None) -> bytes:
    first = 0x80 | (0x40 if in_cdb else 0) | (0 if bit is None else 0x08 | bit)
    return bytes((first, byte >> 8, byte & 0xFF))


def invalid_field_in_cdb(byte: int, bit: int | None = None) -> Sense:
    """INVALID FIELD IN CDB, pointing at the byte (and the highest bit of the field)
    that is wrong.
    """
    return Sense(ILLEGAL_REQUEST, 0x24, 0x00, key_specific=_pointer(True, byte, bit))


def invalid_field_in_parameter_list(byte: int, bit: int | None = None) -> Sense:
    """INVALID FIELD IN PARAMETER LIST, pointing into the data-out buffer."""
    return Sense(ILLEGAL_REQUEST, 0x26, 0x00, key_specific=_pointer(False, byte, bit))


def sanitize_in_progress(progress: float) -> Sense:
    """SANITIZE IN PROGRESS with the progress indication, in 65536ths (SPC-4 4.5.2.4.4)."""
    return Sense(
        NOT_READY,
        0x04,
        0x1B,
        key_specific=b"\x80" + min(0xFFFF, int(progress * 0x10000)).to_bytes(2, "big"),
    )


def copy_segment_fault(byte: int) -> Sense:
    """COPY ABORTED without an additional code, pointing at a byte of the segment descriptor (SPC-4
    4.5.2.4.5).
    """
    return Sense(COPY_ABORTED, 0x00, 0x00, key_specific=bytes((0xA0, byte >> 8, byte & 0xFF)))


NOTHING: Final = Sense(NO_SENSE, 0x00, 0x00)
INVALID_OPCODE: Final = Sense(ILLEGAL_REQUEST, 0x20, 0x00)
INVALID_FIELD_IN_CDB: Final = Sense(ILLEGAL_REQUEST, 0x24, 0x00)
INVALID_RELEASE: Final = Sense(ILLEGAL_REQUEST, 0x26, 0x04)
INSUFFICIENT_REGISTRATION_RESOURCES: Final = Sense(ILLEGAL_REQUEST, 0x55, 0x04)
LBA_OUT_OF_RANGE: Final = Sense(ILLEGAL_REQUEST, 0x21, 0x00)
LOGICAL_UNIT_NOT_SUPPORTED: Final = Sense(ILLEGAL_REQUEST, 0x25, 0x00)
PARAMETER_LIST_LENGTH_ERROR: Final = Sense(ILLEGAL_REQUEST, 0x1A, 0x00)
WRITE_PROTECTED: Final = Sense(DATA_PROTECT, 0x27, 0x00)
SPACE_ALLOCATION_FAILED: Final = Sense(DATA_PROTECT, 0x27, 0x07)
UNRECOVERED_READ_ERROR: Final = Sense(MEDIUM_ERROR, 0x11, 0x00)
WRITE_ERROR: Final = Sense(MEDIUM_ERROR, 0x0C, 0x00)
MISCOMPARE_DURING_VERIFY: Final = Sense(MISCOMPARE, 0x1D, 0x00)
NOT_READY_CAUSE_NOT_REPORTABLE: Final = Sense(NOT_READY, 0x04, 0x00)
INITIALIZING_COMMAND_REQUIRED: Final = Sense(NOT_READY, 0x04, 0x02)
SANITIZE_FAILED: Final = Sense(MEDIUM_ERROR, 0x31, 0x03)
# EXTENDED COPY (SPC-4 6.4, 5.17.7).
OPERATION_IN_PROGRESS: Final = Sense(ILLEGAL_REQUEST, 0x00, 0x16)
TOO_MANY_TARGET_DESCRIPTORS: Final = Sense(ILLEGAL_REQUEST, 0x26, 0x06)
UNSUPPORTED_TARGET_DESCRIPTOR: Final = Sense(ILLEGAL_REQUEST, 0x26, 0x07)
TOO_MANY_SEGMENT_DESCRIPTORS: Final = Sense(ILLEGAL_REQUEST, 0x26, 0x08)
UNSUPPORTED_SEGMENT_DESCRIPTOR: Final = Sense(ILLEGAL_REQUEST, 0x26, 0x09)
INLINE_DATA_LENGTH_EXCEEDED: Final = Sense(ILLEGAL_REQUEST, 0x26, 0x0B)
COPY_TARGET_NOT_REACHABLE: Final = Sense(COPY_ABORTED, 0x0D, 0x02)
THIRD_PARTY_DEVICE_FAILURE: Final = Sense(COPY_ABORTED, 0x0D, 0x01)
INTERNAL_TARGET_FAILURE: Final = Sense(HARDWARE_ERROR, 0x44, 0x00)
# For errors in the data phase (RFC 7143 11.4.7.2).
UNEXPECTED_UNSOLICITED_DATA: Final = Sense(ABORTED_COMMAND, 0x0C, 0x0C)
INCORRECT_AMOUNT_OF_DATA: Final = Sense(ABORTED_COMMAND, 0x0C, 0x0D)
PROTOCOL_SERVICE_CRC_ERROR: Final = Sense(ABORTED_COMMAND, 0x47, 0x05)

# The general code: clients (libiscsi among them) look for 29/00 and not for its refinements.
POWER_ON_OCCURRED: Final = Sense(UNIT_ATTENTION, 0x29, 0x00)
BUS_DEVICE_RESET: Final = Sense(UNIT_ATTENTION, 0x29, 0x03)
CAPACITY_DATA_CHANGED: Final = Sense(UNIT_ATTENTION, 0x2A, 0x09)
MODE_PARAMETERS_CHANGED: Final = Sense(UNIT_ATTENTION, 0x2A, 0x01)
RESERVATIONS_PREEMPTED: Final = Sense(UNIT_ATTENTION, 0x2A, 0x03)
RESERVATIONS_RELEASED: Final = Sense(UNIT_ATTENTION, 0x2A, 0x04)
REGISTRATIONS_PREEMPTED: Final = Sense(UNIT_ATTENTION, 0x2A, 0x05)
SOFT_THRESHOLD_REACHED: Final = Sense(UNIT_ATTENTION, 0x38, 0x07)
COMMANDS_CLEARED_BY_ANOTHER: Final = Sense(UNIT_ATTENTION, 0x2F, 0x00)
REPORTED_LUNS_CHANGED: Final = Sense(UNIT_ATTENTION, 0x3F, 0x0E)
