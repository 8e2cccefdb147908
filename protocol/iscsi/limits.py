"""Limits of the iSCSI target, each with its reason."""

from typing import Final

# A command's data travel in PDUs of up to this size; one PDU always fits the receive buffer.
RECEIVE_DATA_SEGMENT_BYTES: Final = 256 * 1024
# Header, additional header segments (255 words), both digests, and padding around the largest data
# segment.
PDU_OVERHEAD_BYTES: Final = 48 + 255 * 4 + 4 + 4 + 3
# Two of the largest PDUs: one wake-up drains many small ones, and the tail of one is moved seldom.
RECEIVE_BUFFER_BYTES: Final = 2 * (RECEIVE_DATA_SEGMENT_BYTES + PDU_OVERHEAD_BYTES)
# RFC 7143 13.12: no PDU may carry more before negotiation ends, so that an unauthenticated peer
# costs little memory.
LOGIN_DATA_SEGMENT_BYTES: Final = 8192
LOGIN_BUFFER_BYTES: Final = 16384
# All text of one login request, continued over several PDUs. CHAP values are 1 KiB, so that real
# logins stay far below.
LOGIN_TEXT_BYTES_MAX: Final = 16384
# A login needs two to six exchanges.
LOGIN_EXCHANGES_MAX: Final = 16
# RFC 7143 leaves the time open; open-iscsi gives up after 15 s.
LOGIN_SECONDS_MAX: Final = 15.0
# RFC 7143 6.1: a key name has at most 63 bytes, and a value 255 unless the key says otherwise; CHAP
# and lists are longer.
KEY_NAME_BYTES_MAX: Final = 63
KEY_VALUE_BYTES_MAX: Final = 8192
# An initiator offers about 25 keys; each unknown one is answered, so that their number bounds the
# answer.
KEYS_MAX: Final = 128

# The CmdSN window. 128 is open-iscsi's default queue depth; it bounds the tasks of a session.
COMMAND_WINDOW: Final = 128
# Immediate commands stand outside the window (RFC 7143 4.2.2.1); more than a few at once are
# refused.
IMMEDIATE_COMMANDS_MAX: Final = 32
# Task management functions of a session whose answers wait for a volume. An initiator has one or
# two under way at a time.
TASK_MANAGEMENT_WAITING_MAX: Final = 32
# Of one data segment, so that a write of this size comes whole with its command and goes to the
# volume from the receive buffer: half the processor time of an R2T, a second PDU and a copy.
# Unsolicited data need memory before the target said yes: COMMAND_WINDOW times this a session, 32
# MiB.
FIRST_BURST_BYTES: Final = RECEIVE_DATA_SEGMENT_BYTES
# One R2T brings up to this much.
MAX_BURST_BYTES: Final = 1024 * 1024
# Buffers for the solicited data of one session; further R2Ts wait, so that memory does not grow
# with the queue.
WRITE_BUFFER_BYTES: Final = 64 * 1024 * 1024
# A read is taken from the volume in pieces of this size, and the next waits while the client does
# not drain.
READ_PIECE_BYTES: Final = 256 * 1024
# Replies are handed to the socket when this much has gathered, even in the middle of a wake-up.
OUTPUT_BYTES_HIGH: Final = 1024 * 1024
# One text response carries at most this, even if the initiator accepts more: the names of some
# 3,000 targets, which take a millisecond. Some initiators cannot ask for a second piece, and accept
# this much.
TEXT_PIECE_BYTES: Final = 256 * 1024
TEXT_REQUEST_BYTES_MAX: Final = 16384

# A silent peer is asked (NOP-In) after this time.
KEEP_ALIVE_SECONDS: Final = 15.0
# It is dropped when the answer takes longer than this. Hosts that stand still for a while
# (migrated, suspended, a client program that sleeps for a minute) keep their session; a host that
# died and comes back reinstates its own at once.
KEEP_ALIVE_ANSWER_SECONDS: Final = 60.0
# An initiator whose access was removed is asked to log out (asynchronous message) and has this
# long.
LOGOUT_SECONDS: Final = 5
# A discovery session asks its questions and logs out. As anyone may open one, it must not occupy a
# connection forever.
DISCOVERY_SECONDS_MAX: Final = 60.0
# The latest challenges of all connections: sending one back to us as a challenge must not yield the
# response to it.
CHALLENGES_REMEMBERED: Final = 4096
CHALLENGE_BYTES: Final = 32
# RFC 7143 12.1.3: at most 1024 bytes in binary.
CHALLENGE_BYTES_MAX: Final = 1024
