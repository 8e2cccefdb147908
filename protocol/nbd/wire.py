"""Magic numbers, values and layouts of the protocol document ("Values", "Request message" and
following). Everything is big-endian.
"""

from struct import Struct
from typing import Final

# --- Handshake ------------------------------------------------------------------------------------

MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

GREETING: Final = Struct(">QQH")  # MAGIC, OPTION_MAGIC, handshake flags
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")  # OPTION_MAGIC, option, length of its data
OPTION_REPLY: Final = Struct(">QIII")  # OPTION_REPLY_MAGIC, option, reply type, length
EXPORT_NAME_REPLY: Final = Struct(">QH")  # size, transmission flags
EXPORT_NAME_PADDING: Final = bytes(124)

FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
_REP_ERR: Final = 1 << 31
REP_ERR_UNSUP: Final = _REP_ERR + 1
REP_ERR_POLICY: Final = _REP_ERR + 2
REP_ERR_INVALID: Final = _REP_ERR + 3
REP_ERR_TLS_REQD: Final = _REP_ERR + 5
REP_ERR_UNKNOWN: Final = _REP_ERR + 6
REP_ERR_SHUTDOWN: Final = _REP_ERR + 7
REP_ERR_TOO_BIG: Final = _REP_ERR + 9
REP_ERR_EXT_HEADER_REQD: Final = _REP_ERR + 10

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3
INFO_EXPORT_REPLY: Final = Struct(">HQH")  # INFO_EXPORT, size, transmission flags
INFO_BLOCK_SIZE_REPLY: Final = Struct(">HIII")  # INFO_BLOCK_SIZE, minimum, preferred, maximum
INFO_TYPE: Final = Struct(">H")
LENGTH: Final = Struct(">I")
CONTEXT_ID: Final = Struct(">I")

# --- Transmission flags ---------------------------------------------------------------------------

FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8
FLAG_SEND_CACHE: Final = 1 << 10
FLAG_SEND_FAST_ZERO: Final = 1 << 11
FLAG_BLOCK_STATUS_PAYLOAD: Final = 1 << 12

# --- Transmission ---------------------------------------------------------------------------------

REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

REQUEST: Final = Struct(">IHHQQI")  # magic, command flags, type, cookie, offset, length
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic, error, cookie
STRUCTURED_REPLY: Final = Struct(">IHHQI")  # magic, reply flags, type, cookie, payload length
# magic, reply flags, type, cookie, offset of the request, payload length
EXTENDED_REPLY: Final = Struct(">IHHQQQ")

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4
CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

REPLY_FLAG_DONE: Final = 1 << 0
REPLY_TYPE_NONE: Final = 0
REPLY_TYPE_OFFSET_DATA: Final = 1
REPLY_TYPE_OFFSET_HOLE: Final = 2
REPLY_TYPE_BLOCK_STATUS: Final = 5
REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
REPLY_TYPE_ERROR: Final = (1 << 15) + 1
REPLY_TYPE_ERROR_OFFSET: Final = (1 << 15) + 2

OFFSET: Final = Struct(">Q")
HOLE: Final = Struct(">QI")  # offset, length
ERROR: Final = Struct(">IH")  # error, length of the message
EXTENT: Final = Struct(">II")  # length, status
EXTENDED_EXTENT: Final = Struct(">QQ")
EXTENDED_STATUS: Final = Struct(">II")  # context, number of descriptors
EFFECT_LENGTH: Final = Struct(">Q")

STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1

# "Error values".
EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108
