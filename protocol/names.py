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


def fold(name: str) -> str:
    """An iSCSI name in the form in which it is compared.

    Configured names are ASCII (`control.methods.ISCSI_NAME`), for which RFC 3722 is just lower
    case. An initiator may claim a name with other characters: that is on no access list, and only
    has to be the same each time.
    """
    return name.lower()


def initiator_port(node_name: str, isid: int) -> str:
    """Name of an initiator port."""
    return f"{node_name}{INITIATOR_PORT}{isid:0{ISID_DIGITS}x}"


def target_port(node_name: str, number: int) -> str:
    """Name of a target port, by its portal group tag."""
    return f"{node_name}{TARGET_PORT}{number:0{_TARGET_PORT_DIGITS}x}"
