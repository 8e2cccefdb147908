"""target, acl and chap. A change that shuts out open sessions ends them."""

from daemon.control.answering import answers
from daemon.control.context import Context
from daemon.targets.access import Credentials
from daemon.targets.directory import Found
from daemon.targets.reports import access_lists, created_target
from protocol.control import methods, rows
from protocol.names import fold
from storage.errors import RequestError


def _end_sessions(context: Context) -> int:
    """End those that a change has shut out; how many there were."""
    sessions = context.targets.no_longer_allowed()
    context.iscsi.end_sessions(sessions)
    return len(sessions) + context.nbd.end_shut_out()


# --- Targets --------------------------------------------------------------------------------------


@answers(methods.TargetCreate)
async def target_create(context: Context, call: methods.TargetCreate) -> rows.Target:
    """Its name is not a vdisk's."""
    created = await context.administration.create(call.target)
    return created_target(context.targets, created.name)


@answers(methods.TargetList)
async def target_list(context: Context, call: methods.TargetList) -> list[rows.Target]:
    """By name."""
    targets = context.targets
    return [created_target(targets, name) for name in sorted(targets.table.targets)]


@answers(methods.TargetDelete)
async def target_delete(context: Context, call: methods.TargetDelete) -> rows.DeletedTarget:
    """Its list goes too, so its vdisks may be for others than before."""
    name = await context.administration.remove(call.target)
    _end_sessions(context)
    return rows.DeletedTarget(target=name, deleted=True)


@answers(methods.TargetMap)
async def target_map(context: Context, call: methods.TargetMap) -> rows.Target:
    """Open sessions are told. The target's list counts for the vdisk's own target, too."""
    volume = context.pool.volume(call.vdisk)
    name, lun = await context.administration.map(call.target, volume, call.lun)
    context.iscsi.lun_mapped(name, lun, volume)
    _end_sessions(context)
    return created_target(context.targets, name)


@answers(methods.TargetUnmap)
async def target_unmap(context: Context, call: methods.TargetUnmap) -> rows.Target:
    """Open sessions are told."""
    if (call.vdisk is None) == (call.lun is None):
        raise RequestError("name the LUN by its vdisk or by its number, one of them")
    name, lun, volume = await context.administration.unmap(call.target, call.vdisk, call.lun)
    if volume is not None:
        context.iscsi.lun_unmapped(name, lun, volume)
    return created_target(context.targets, name)


# --- Access lists ---------------------------------------------------------------------------------


@answers(methods.AclAdd)
async def acl_add(context: Context, call: methods.AclAdd) -> rows.ChangedAccessList:
    """From the first one on, the target is for nobody else."""
    return _changed(context, await context.administration.allow(call.target, call.initiators))


@answers(methods.AclRemove)
async def acl_remove(context: Context, call: methods.AclRemove) -> rows.ChangedAccessList:
    """An empty list stays, and lets nobody in."""
    return _changed(context, await context.administration.disallow(call.target, call.initiator))


@answers(methods.AclClear)
async def acl_clear(context: Context, call: methods.AclClear) -> rows.ChangedAccessList:
    """Without a list, the target is as open as the configuration says."""
    return _changed(context, await context.administration.clear_list(call.target))


def _changed(context: Context, target: Found) -> rows.ChangedAccessList:
    """A list after a change."""
    ended = _end_sessions(context)
    return rows.ChangedAccessList(
        target=target.name,
        initiators=context.targets.access.acls.get(target.key),
        sessions_ended=ended,
    )


@answers(methods.AclList)
async def acl_list(context: Context, call: methods.AclList) -> list[rows.AccessList]:
    """By target."""
    found = access_lists(context.targets)
    if call.target is None:
        return found
    name = context.targets.named(call.target).name
    return [row for row in found if row.target == name]


# --- CHAP -----------------------------------------------------------------------------------------


@answers(methods.ChapSet)
async def chap_set(context: Context, call: methods.ChapSet) -> rows.ChapUser:
    """They count from the next login on."""
    if (call.mutual_user is None) != (call.mutual_secret is None):
        raise RequestError("mutual_user and mutual_secret belong together: give both or neither")
    if call.secret == call.mutual_secret:
        # RFC 7143 9.2.1: or an answer of one direction could be reflected as that of the other.
        raise RequestError("the mutual secret is the same as the secret: give two different ones")
    given = Credentials(
        user=call.user,
        secret=call.secret,
        mutual_user=call.mutual_user,
        mutual_secret=call.mutual_secret,
    )
    await context.targets.access.set_chap(call.initiator, given)
    return _shown(fold(call.initiator), given)


@answers(methods.ChapDelete)
async def chap_delete(context: Context, call: methods.ChapDelete) -> rows.DeletedChapUser:
    """Those of the configuration file, if any, are asked of it then."""
    await context.targets.access.remove_chap(call.initiator)
    return rows.DeletedChapUser(initiator=fold(call.initiator), deleted=True)


@answers(methods.ChapList)
async def chap_list(context: Context, call: methods.ChapList) -> list[rows.ChapUser]:
    """By initiator."""
    found = sorted(context.targets.access.chap.items())
    return [_shown(initiator, credentials) for initiator, credentials in found]


def _shown(initiator: str, credentials: Credentials) -> rows.ChapUser:
    """Credentials without their secrets."""
    return rows.ChapUser(
        initiator=initiator, user=credentials.user, mutual_user=credentials.mutual_user
    )
