"""vdisk, snapshot and clone."""

from daemon.control.answering import answers
from daemon.control.context import Context, all_rows
from daemon.pool.space_watch import space_warnings
from daemon.process.units import format_exact
from daemon.targets.administration import VDISK
from protocol.control import methods, rows
from protocol.control.errors import CONFLICT, ControlError
from protocol.control.rows import row_of


def _warnings(context: Context) -> list[str]:
    """For a request that will want room. What it asks for is made all the same: writes are what
    takes the room.
    """
    shown = context.pool.show()
    return space_warnings(
        shown["used_bytes"],
        shown["available_bytes"],
        shown["deleted_images"],
        context.space.threshold_percent,
    )


# --- Vdisks ---------------------------------------------------------------------------------------


@answers(methods.VdiskCreate)
async def vdisk_create(context: Context, call: methods.VdiskCreate) -> rows.NewVdisk:
    """Empty, and thin."""
    with context.administration.claim(VDISK, call.name):
        created = await context.pool.vdisk_create(call.name, call.size_bytes)
    return row_of(rows.NewVdisk, {**created, "warnings": _warnings(context)})


@answers(methods.VdiskList)
async def vdisk_list(context: Context, call: methods.VdiskList) -> list[rows.Vdisk]:
    """By name."""
    return await all_rows(rows.Vdisk, await context.pool.vdisk_list())


@answers(methods.VdiskShow)
async def vdisk_show(context: Context, call: methods.VdiskShow) -> rows.VdiskDetail:
    """Exact as of a consistency point that this takes."""
    return row_of(rows.VdiskDetail, await context.pool.vdisk_show(call.name))


@answers(methods.VdiskResize)
async def vdisk_resize(context: Context, call: methods.VdiskResize) -> rows.ResizedVdisk:
    """The clients of all protocols are told."""
    pool = context.pool
    before_bytes = pool.volume(call.name).size_bytes
    if call.size_bytes < before_bytes and not call.shrink:
        raise _would_cut(call.name, before_bytes, call.size_bytes)
    # No wait in between: the pool takes the vdisk for this resize in the same step, and no
    # other one can come first.
    await pool.vdisk_resize(call.name, call.size_bytes)
    for listener in context.listeners:
        listener.volume_resized(pool.volume(call.name))
    return row_of(
        rows.ResizedVdisk,
        {**await pool.vdisk_show(call.name), "warnings": _warnings(context)},
    )


def _would_cut(name: str, before_bytes: int, after_bytes: int) -> ControlError:
    """A vdisk was to shrink, and nobody said that this is meant."""
    return ControlError(
        CONFLICT,
        f"vdisk {name} has {format_exact(before_bytes)}: a size of {format_exact(after_bytes)}"
        f" would cut off its last {format_exact(before_bytes - after_bytes)}, with the data in"
        " them",
        f"nothing was changed; if that is meant: cleavectl vdisk resize {name} {after_bytes}"
        " --shrink",
    )


@answers(methods.VdiskRename)
async def vdisk_rename(context: Context, call: methods.VdiskRename) -> rows.VdiskDetail:
    """Open sessions go on."""
    pool = context.pool
    with context.administration.claim(VDISK, call.new_name, pool.volume(call.name)):
        await pool.vdisk_rename(call.name, call.new_name)
    return row_of(rows.VdiskDetail, await pool.vdisk_show(call.new_name))


@answers(methods.VdiskDelete)
async def vdisk_delete(context: Context, call: methods.VdiskDelete) -> rows.Deleted:
    """Everything that was kept for it goes too: its access list, its reservations."""
    volume = context.pool.volume(call.name)
    context.administration.check_deletable(volume)
    await context.pool.vdisk_delete(call.name)
    await context.administration.forget(volume)
    for listener in context.listeners:
        listener.volume_deleted(volume.uuid)
    await context.reservations.forget(volume.uuid)
    return rows.Deleted(name=call.name, deleted=True)


# --- Snapshots and clones -------------------------------------------------------------------------


@answers(methods.SnapshotCreate)
async def snapshot_create(context: Context, call: methods.SnapshotCreate) -> list[rows.NewSnapshot]:
    """All of one moment, or none."""
    pairs = [_two_names(reference) for reference in call.snapshots]
    created = await context.pool.snapshot_create(pairs)
    warnings = _warnings(context)
    return await all_rows(rows.NewSnapshot, [{**row, "warnings": warnings} for row in created])


@answers(methods.SnapshotList)
async def snapshot_list(context: Context, call: methods.SnapshotList) -> list[rows.Snapshot]:
    """By name."""
    return await all_rows(rows.Snapshot, await context.pool.snapshot_list(call.vdisk))


@answers(methods.SnapshotDelete)
async def snapshot_delete(context: Context, call: methods.SnapshotDelete) -> rows.Deleted:
    """At once, or when the last clone has been split."""
    vdisk, snapshot = _two_names(call.snapshot)
    deleted = await context.pool.snapshot_delete(vdisk, snapshot, call.after_split)
    return rows.Deleted(name=call.snapshot, deleted=deleted)


@answers(methods.CloneCreate)
async def clone_create(context: Context, call: methods.CloneCreate) -> rows.NewVdisk:
    """In the same time, whatever its size."""
    vdisk, snapshot = _two_names(call.snapshot)
    with context.administration.claim(VDISK, call.name):
        created = await context.pool.clone_create(vdisk, snapshot, call.name)
    if call.split:
        await context.pool.split_start(call.name)
    return row_of(rows.NewVdisk, {**created, "warnings": _warnings(context)})


def _two_names(reference: str) -> tuple[str, str]:
    vdisk, _, snapshot = reference.partition("@")
    return vdisk, snapshot
