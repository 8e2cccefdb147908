"""ISCSI names, and the names of SCSI ports that are made of them (RFC 7143 4.2.7; SPC-4 table 508).

An iSCSI name has no case: it is stored, compared and announced in lower case (RFC 7143 4.2.7.1; RFC
3722, table B.2). A port's name is that of its node with the ISID or the target portal group tag.
"""

from typing import Final

# RFC 7143 4.2.7.1.
NAME_BYTES_MAX: Final = 223
# Between a node's name and the rest of a port's name.
INITIATOR_PORT: Final = ",i,0x"
TARGET_PORT: Final = ",t,0x"
ISID_DIGITS: Final = 12
# All addresses of the daemon are one portal group.
PORTAL_GROUP_TAG: Final = 1
_TARGET_PORT_DIGITS: Final = 4
# A vdisk's name ends an iSCSI name, where RFC 7143 4.2.7.1 allows letters, digits, dash, dot and
# colon; the underscore is an addition that initiators take too. Nothing else, so that names need no
# quoting in URLs and shells.
NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._:-]*"
# RFC 7143 4.2.7.2, in the characters that need no preparation (4.2.7.1), and the underscore, which
# initiators use too.
ISCSI_NAME: Final = (
    rf"(?:[iI][qQ][nN]\.[0-9]{{4}}-[0-9]{{2}}\.{NAME}"
    r"|[eE][uU][iI]\.[0-9A-Fa-f]{16}|[nN][aA][aA]\.[0-9A-Fa-f]{16}(?:[0-9A-Fa-f]{16})?)"
)


def fold(name: str) -> str:
    """An iSCSI name in the form in which it is compared.

    Lower case is all of RFC 3722 that a configured name can need, since those are ASCII
    (`ISCSI_NAME`). The name that an initiator claims may have other characters; such a name is on
    no list, and only has to be the same each time.
    """
    return name.lower()


def initiator_port(node_name: str, isid: int) -> str:
    """Name of an initiator port."""
    return f"{node_name}{INITIATOR_PORT}{isid:0{ISID_DIGITS}x}"


def target_port(node_name: str, number: int) -> str:
    """Name of a target port, by its portal group tag."""
    return f"{node_name}{TARGET_PORT}{number:0{_TARGET_PORT_DIGITS}x}"
