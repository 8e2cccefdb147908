"""The file systems that the guest uses: the same steps with the commands of each."""

from typing import NamedTuple


class FileSystem(NamedTuple):
    """Commands in which {device} and {mount} are filled in. Programs have full paths, since busybox
    also has an mke2fs.
    """

    make: str
    mount_options: str
    grow: str
    check: str


FILE_SYSTEMS = {
    "ext4": FileSystem(
        "/sbin/mke2fs -q -t ext4 {device}",
        "defaults",
        "/sbin/resize2fs {device}",
        "/sbin/e2fsck -f -n {device}",
    ),
    # A clone has its original's UUID, and xfs refuses to mount both without nouuid.
    "xfs": FileSystem(
        "/sbin/mkfs.xfs -q {device}",
        "nouuid",
        "/sbin/xfs_growfs {mount}",
        "/sbin/xfs_repair -n {device}",
    ),
}


class Mounted:
    """The commands for one file system on one device."""

    def __init__(self, kind: str, device: str, mount: str) -> None:
        self._kind = kind
        self._texts = {"device": device, "mount": mount}
        self._words = FILE_SYSTEMS[kind]

    @property
    def make(self) -> str:
        return self._words.make.format(**self._texts)

    @property
    def mount(self) -> str:
        options = self._words.mount_options
        return "mkdir -p {mount} && mount -t {kind} -o {options} {device} {mount}".format(
            kind=self._kind, options=options, **self._texts
        )

    @property
    def unmount(self) -> str:
        return "umount {mount}".format(**self._texts)

    @property
    def grow(self) -> str:
        return self._words.grow.format(**self._texts)

    @property
    def check(self) -> str:
        """Return a command that exits with 0 if the file system is clean, and changes nothing."""
        return self._words.check.format(**self._texts)
