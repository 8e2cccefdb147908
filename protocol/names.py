"""ISCSI names have no case: they are stored, compared and announced in lower case (RFC 7143
4.2.7.1; RFC 3722, table B.2).
"""


def fold(name: str) -> str:
    """An iSCSI name as everybody compares it.

    Lower case is all of RFC 3722 that a name can need which somebody configured here: those are
    ASCII (`control.methods.ISCSI_NAME`). What an initiator claims may have other characters; such a
    name is on no list, and only has to be the same each time.
    """
    return name.lower()
