"""What is shown about targets and the access to them."""

from typing import NamedTuple

from daemon.pool.volumes import AttachableVolume
from daemon.targets.directory import Targets
from protocol.control import rows


class Access(NamedTuple):
    """Who may use a vdisk's own target, and what must be proved there.

    ``initiators``: the list, None where there is none; ``initiator``: the one asked for, else the
    only one that may; ``allowed`` is false where its login, or any, would be refused; ``chap_user``
    is None where there is none, or not the same for all.
    """

    initiators: list[str] | None
    initiator: str | None
    allowed: bool
    chap: bool
    chap_user: str | None


def access_to(targets: Targets, volume: AttachableVolume, initiator: str | None) -> Access:
    """For ``initiator``, or for anybody."""
    access = targets.access
    keys = targets.lists_of_vdisk(volume.uuid.hex)
    listed = access.listed(keys)
    if initiator is None and listed is not None and len(listed) == 1:
        (initiator,) = listed
    if initiator is not None:
        allowed = access.allows(keys, initiator)
        secrets = [access.secrets_for(initiator)]
    elif listed is None:
        allowed = access.open_access
        secrets = [access.secrets_of_others()]
    else:
        allowed = bool(listed)
        secrets = [access.secrets_for(name) for name in listed]
    users = {None if found is None else found.user for found in secrets}
    return Access(
        initiators=listed,
        initiator=initiator,
        allowed=allowed,
        chap=any(found is not None for found in secrets),
        chap_user=users.pop() if len(users) == 1 else None,
    )


def created_target(targets: Targets, name: str) -> rows.Target:
    """A created target: its LUNs, its list, and how many sessions use it."""
    vdisks = targets.mapped.names()
    return rows.Target(
        target=name,
        luns=[
            rows.MappedLun(lun=lun, vdisk=vdisks.get(uuid), uuid=uuid)
            for lun, uuid in targets.table.targets[name].luns.items()
        ],
        initiators=targets.access.acls.get(name),
        sessions=len(targets.sessions.of(name)),
    )


def access_lists(targets: Targets) -> list[rows.AccessList]:
    """Of every target that has a list of initiators, sorted by name."""
    names = {uuid: targets.names.announced(name) for uuid, name in targets.with_lists().items()}
    names |= {name: name for name in targets.table.targets}
    found = [
        rows.AccessList(target=names[key], initiators=initiators)
        for key, initiators in targets.access.acls.items()
        if key in names
    ]
    return sorted(found, key=lambda row: row.target)
