"""`cleavectl vdisk`, `snapshot` and `clone`."""

import click

from daemon.admin.command import Settings, command, confirm, plain_commands
from daemon.admin.parameters import SIZE, SNAPSHOT
from daemon.process.units import format_exact
from protocol.control import methods


@click.group()
def vdisk() -> None:
    """Live virtual disks."""


plain_commands(vdisk, methods.VdiskList, methods.VdiskShow, methods.VdiskDelete)


@command(vdisk, methods.VdiskCreate)
@click.argument("name")
@click.option("--size", type=SIZE, required=True)
def vdisk_create(settings: Settings, name: str, size: int) -> None:
    """Create an empty vdisk."""
    settings.run(methods.VdiskCreate(name=name, size_bytes=size))


@command(vdisk, methods.VdiskResize)
@click.argument("name")
@click.argument("size", type=SIZE)
@click.option(
    "--shrink",
    is_flag=True,
    help="a smaller size is meant: cut the end off, with the data in it; asks on a terminal",
)
@click.option(
    "--yes", is_flag=True, help="with --shrink: do not ask; needed where there is no terminal"
)
def vdisk_resize(settings: Settings, name: str, size: int, shrink: bool, yes: bool) -> None:
    """Change the size. A smaller one cuts the end off, with the data in it, and is refused without
    --shrink.
    """
    if shrink:
        before = settings.call(methods.VdiskShow(name=name)).size_bytes
        if size < before:
            confirm(
                f"This cuts {format_exact(before - size)} off the end of vdisk {name}, with the"
                " data in them, for good",
                yes,
            )
    settings.run(methods.VdiskResize(name=name, size_bytes=size, shrink=shrink))


@command(vdisk, methods.VdiskRename)
@click.argument("old")
@click.argument("new")
def vdisk_rename(settings: Settings, old: str, new: str) -> None:
    """Rename a vdisk; its iSCSI target name follows."""
    settings.run(methods.VdiskRename(name=old, new_name=new))


@click.group()
def snapshot() -> None:
    """Read-only images of vdisks."""


plain_commands(snapshot, methods.SnapshotList)


@command(snapshot, methods.SnapshotCreate)
@click.argument("snapshots", type=SNAPSHOT, nargs=-1, required=True, metavar="VDISK@SNAPSHOT...")
def snapshot_create(settings: Settings, snapshots: tuple[str, ...]) -> None:
    """Take snapshots; several are of one moment, all or none."""
    settings.run(methods.SnapshotCreate(snapshots=list(snapshots)))


@command(snapshot, methods.SnapshotDelete)
@click.argument("name", type=SNAPSHOT, metavar="VDISK@SNAPSHOT")
@click.option(
    "--after-split",
    is_flag=True,
    help="where clones stand on it: delete it when the last of them has been split",
)
def snapshot_rm(settings: Settings, name: str, after_split: bool) -> None:
    """Delete a snapshot. Its space is reclaimed in the background."""
    settings.run(methods.SnapshotDelete(snapshot=name, after_split=after_split))


@click.group()
def clone() -> None:
    """Writable clones of snapshots."""


@command(clone, methods.CloneCreate)
@click.argument("source", type=SNAPSHOT, metavar="VDISK@SNAPSHOT")
@click.argument("name")
@click.option("--split", is_flag=True, help="start to split it from its backing store at once")
def clone_create(settings: Settings, source: str, name: str, split: bool) -> None:
    """Create a clone; it is a vdisk like any other."""
    settings.run(methods.CloneCreate(snapshot=source, name=name, split=split))
