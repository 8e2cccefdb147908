"""Names: which characters they have, and how iSCSI names are compared.

ISCSI names have no case: they are stored, compared and announced in lower case (RFC 7143 4.2.7.1;
RFC 3722, table B.2).
"""

from typing import Final

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
