"""Every limit of the control protocol, with its reason."""

from typing import Final

# The largest request is a group snapshot of a few thousand names; 1 MiB holds 5,000 of the longest.
REQUEST_BYTES_MAX: Final = 1 << 20
# The largest response is the list of all vdisks: 100,000 entries of about 300 bytes are 30 MB.
RESPONSE_BYTES_MAX: Final = 1 << 28
# Items of one array or map. The decoder allocates by the count that the peer claims, before the
# items have come.
REQUEST_ITEMS_MAX: Final = 2048
RESPONSE_ITEMS_MAX: Final = 1 << 22
# Requests of one connection that wait for their answers. A client that pipelines more gets an error
# for those above.
REQUESTS_PENDING_MAX: Final = 64
# Items of a list encoded in one part: about half a millisecond of the event loop (design invariant
# 8).
ITEMS_PER_PART: Final = 256
# What rows count in blocks.
BLOCK_BYTES: Final = 4096
# Vdisk, snapshot and target names are at most 200 bytes each; VDISK@SNAPSHOT has two and the sign
# between.
NAME_CHARACTERS_MAX: Final = 200
REFERENCE_CHARACTERS_MAX: Final = 2 * NAME_CHARACTERS_MAX + 1
# Snapshots of one atomic group: all are made within one consistency point, on the event loop.
GROUP_SNAPSHOTS_MAX: Final = 1024
# RFC 7143 4.2.7.1: an iSCSI name has at most 223 bytes.
ISCSI_NAME_CHARACTERS_MAX: Final = 223
# RFC 7143 6.1: a text value has at most 255 bytes unless its key says otherwise, and CHAP_N does
# not.
CHAP_CHARACTERS_MAX: Final = 255
# RFC 7143 9.2.1: a CHAP secret has at least 96 bits; 12 characters are the least that can hold
# them.
CHAP_SECRET_CHARACTERS_MIN: Final = 12
# Initiators of one target: a large cluster has a few hundred hosts. It bounds what each login and
# each listing looks through.
ACL_INITIATORS_MAX: Final = 1024
# One byte of the LUN structure's simplest form (SAM-5 4.7.5), which every initiator addresses;
# Linux scans 512, Windows 255.
LUN_MAX: Final = 255
# Request ids are the client's; msgpack-RPC says 32 bits.
REQUEST_ID_MAX: Final = (1 << 32) - 1
# Version of this protocol. It rises when a client written for the older one could misunderstand an
# answer.
PROTOCOL_VERSION: Final = 1
