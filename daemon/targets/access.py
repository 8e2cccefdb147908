"""Who may use which target, and what each initiator must prove. Kept in the pool's configuration,
section ``access``.

A target is named by a *key* here: the iSCSI name of a created target, or the UUID (32 hex digits)
of a vdisk for the vdisk's own target, so that renaming a vdisk changes nothing. A key without a
list of initiators is for everybody where access is open, and for nobody where it is not; a list
that is empty is for nobody. Initiator names are compared in lower case (RFC 7143 4.2.7.1).
"""

from typing import Any, Final

import msgspec

from daemon.pool.sections import Configurable, Section, Versioned
from daemon.process.config import Chap
from protocol.control.limits import ACL_INITIATORS_MAX
from protocol.iscsi.chap import ChapSecrets
from protocol.names import fold
from storage.errors import Conflict, NotFound

SECTION: Final = "access"


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """CHAP of one initiator; with the ``mutual`` pair the target proves itself too."""

    user: str
    secret: str
    mutual_user: str | None = None
    mutual_secret: str | None = None

    def __repr__(self) -> str:
        return f"Credentials(user={self.user!r}, mutual={self.mutual_user is not None})"

    def as_secrets(self, initiator: str | None = None) -> ChapSecrets:
        """As the wire takes them. Where the user is the name of the initiator that they are of (the
        default), it has no case.
        """
        mutual = None if self.mutual_secret is None else self.mutual_secret.encode()
        is_name = initiator is not None and fold(self.user) == fold(initiator)
        return ChapSecrets(self.user, self.secret.encode(), self.mutual_user, mutual, is_name)


class StoredAccess(Versioned, frozen=True, kw_only=True):
    """The section: initiators by key, and CHAP by initiator."""

    acls: dict[str, list[str]] = {}
    chap: dict[str, Credentials] = {}


class AccessControl:
    """``chap``: what initiators without credentials of their own must prove; ``open_access``: a
    target without a list is for everybody.
    """

    def __init__(self, pool: Configurable, chap: Chap | None, open_access: bool) -> None:
        self.open_access = open_access
        self._chap = None if chap is None else Credentials(**chap._asdict()).as_secrets()
        self._section = Section(pool, SECTION, StoredAccess())

    # --- Questions --------------------------------------------------------------------------------

    @property
    def acls(self) -> dict[str, list[str]]:
        """All lists, by key."""
        return self._section.value.acls

    @property
    def chap(self) -> dict[str, Credentials]:
        """Credentials by initiator."""
        return self._section.value.chap

    def allows(self, keys: list[str], initiator: str) -> bool:
        """Whether one of the lists of ``keys`` names the initiator; where none of them has a list,
        whether access is open.
        """
        lists = [self.acls[key] for key in keys if key in self.acls]
        if not lists:
            return self.open_access
        return any(fold(initiator) in found for found in lists)

    def secrets_for(self, initiator: str) -> ChapSecrets | None:
        """What this initiator must prove, for discovery too: its own credentials, else those of the
        configuration file.
        """
        own = self.chap.get(fold(initiator))
        return self._chap if own is None else own.as_secrets(initiator)

    def listed(self, keys: list[str]) -> list[str] | None:
        """The initiators on the lists of ``keys``, sorted; None where none of them has a list."""
        lists = [self.acls[key] for key in keys if key in self.acls]
        return sorted({initiator for found in lists for initiator in found}) if lists else None

    def secrets_of_others(self) -> ChapSecrets | None:
        """What initiators without credentials of their own must prove."""
        return self._chap

    # --- Changes ----------------------------------------------------------------------------------

    async def add(self, key: str, initiators: list[str]) -> None:
        """Put initiators on a target's list. From the first one on, it is for nobody else. Raises
        Conflict, and what the pool raises.
        """
        wanted = {fold(initiator) for initiator in initiators}

        def change(stored: StoredAccess) -> StoredAccess:
            found = sorted(wanted.union(stored.acls.get(key, ())))
            if len(found) > ACL_INITIATORS_MAX:
                raise Conflict(
                    f"a target's list has at most {ACL_INITIATORS_MAX} initiators: remove some"
                    " first"
                )
            return msgspec.structs.replace(stored, acls={**stored.acls, key: found})

        await self._section.change(change)

    async def remove(self, key: str, initiator: str) -> None:
        """Take an initiator off the list; an empty list stays, and lets nobody in.
        Raises NotFound.
        """

        def change(stored: StoredAccess) -> StoredAccess:
            found = stored.acls.get(key, [])
            if fold(initiator) not in found:
                raise NotFound(f"{initiator} is not on that list; cleavectl acl ls shows who is")
            left = [name for name in found if name != fold(initiator)]
            return msgspec.structs.replace(stored, acls={**stored.acls, key: left})

        await self._section.change(change)

    async def clear(self, key: str) -> None:
        """Remove the list of a target, if it has one."""

        def change(stored: StoredAccess) -> StoredAccess:
            return msgspec.structs.replace(
                stored, acls={name: found for name, found in stored.acls.items() if name != key}
            )

        await self._section.change(change)

    async def set_chap(self, initiator: str, credentials: Credentials) -> None:
        """Credentials of an initiator, in the place of those that it may have. Sessions that are
        open go on.
        """
        await self._section.change(
            lambda stored: msgspec.structs.replace(
                stored, chap={**stored.chap, fold(initiator): credentials}
            )
        )

    async def remove_chap(self, initiator: str) -> None:
        """No credentials of its own any more. Raises NotFound."""

        def change(stored: StoredAccess) -> StoredAccess:
            if fold(initiator) not in stored.chap:
                raise NotFound(
                    f"{initiator} has no CHAP credentials; cleavectl chap ls shows who has"
                )
            left: dict[str, Any] = {
                name: found for name, found in stored.chap.items() if name != fold(initiator)
            }
            return msgspec.structs.replace(stored, chap=left)

        await self._section.change(change)
