"""Limits of the NBD server, each with its reason."""

from typing import Final

# "Size constraints". Vdisks are made of sectors of 512 bytes, as iSCSI shows them.
MINIMUM_BLOCK_BYTES: Final = 512
# Blocks of the store: an aligned write of this size replaces a block and reads nothing.
PREFERRED_BLOCK_BYTES: Final = 4096
# The largest payload that every client may count on.
PAYLOAD_BYTES_MAX: Final = 32 * 1024 * 1024

# "Conventions": no string may be longer.
STRING_BYTES_MAX: Final = 4096
# Data of one option. The longest that a client needs is a name and the queries of its contexts.
OPTION_BYTES_MAX: Final = 16 * 1024
OPTION_HEADER_BYTES: Final = 16
# An option of the largest size is always whole in it; a stranger costs this little memory.
HANDSHAKE_BUFFER_BYTES: Final = OPTION_BYTES_MAX + OPTION_HEADER_BYTES
# A client that lists exports asks three options about each of them: enough for 20,000 exports.
OPTIONS_MAX: Final = 65536
# The same client sends about 100 bytes an option.
HANDSHAKE_BYTES_MAX: Final = 16 * 1024 * 1024
# Between two options; a person who types them into nbdsh has that long.
OPTION_SECONDS_MAX: Final = 30.0
HANDSHAKE_SECONDS_MAX: Final = 300.0
# Exports named in one turn of the event loop by NBD_OPT_LIST: some tenths of a millisecond.
LIST_PIECE: Final = 256
# Queries of one meta context option, each answered by a look-up.
QUERIES_MAX: Final = 128
# Each selected context is asked for every block status request.
CONTEXTS_MAX: Final = 16

# Data move between socket and volume in pieces of this size.
PIECE_BYTES: Final = 256 * 1024
REQUEST_HEADER_BYTES_MAX: Final = 32
# Two of the largest pieces: one wake-up drains many small requests, and a tail is moved seldom.
RECEIVE_BUFFER_BYTES: Final = 2 * (PIECE_BYTES + REQUEST_HEADER_BYTES_MAX)
# Pieces that a connection may have at its volume, each of at most PIECE_BYTES, so 64 MiB. A request
# has at least one, so that this bounds requests in flight too; the kernel's client sends up to 128,
# fio as many as it is told. What comes beyond it is not read until some have ended: the document
# has no error for a client that is merely fast.
PIECES_MAX: Final = 256
# Requests of one connection that are carried out in one wake-up; the next ones wait for a turn of
# the event loop of their own. A receive buffer holds 18,000 requests without data, 100 ms for
# everybody else; what clients keep in flight is below this.
REQUESTS_A_TURN: Final = 512
# Replies are handed to the socket when this much has gathered, even in the middle of a wake-up.
OUTPUT_BYTES_HIGH: Final = 1024 * 1024
# TRIM and WRITE_ZEROES touch pointer blocks only; after each step of this size a client that went
# away is noticed.
SWEEP_STEP_BYTES: Final = 1024 * 1024 * 1024
# Runs of zeros of this length, aligned to it within a piece, are sent as holes (OFFSET_HOLE); what
# is shorter costs a chunk more than it saves.
HOLE_BYTES_MIN: Final = 64 * 1024
# Descriptors of one block status chunk: 32 KiB of reply, and as much as a volume looks at in a
# millisecond. A client asks again from where they end.
EXTENTS_MAX: Final = 4096
# Error messages for people are cut to this.
MESSAGE_BYTES_MAX: Final = 512
# How long a connection whose export went answers requests with NBD_ESHUTDOWN before it is closed: a
# client learns of the end only by the reply to a request of its own.
SHUTDOWN_SECONDS: Final = 5.0
