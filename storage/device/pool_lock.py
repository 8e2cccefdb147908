"""The lock on a pool by its UUID: it holds where two paths lead to one pool and the kernel sees two
devices, as with a loop device over a pool file. What it covers, and what other locks do, stands in
docs/operations.md, "One daemon for each pool".

The lock is a set of abstract Unix sockets, names that live in memory and vanish with their process
(unix(7)). A writer takes all of them, a reader any one: so readers share it, nobody else does, and
there is no moment in which two can believe that they have it.
"""

import errno
import os
import socket
import stat
import struct
from uuid import UUID

from storage.device.owner import Owner, decode_owner
from storage.errors import PoolLocked, PoolRefused
from storage.layout import (
    BLOCK_BYTES,
    OWNER_OFFSET,
    SUPERBLOCK_UUID_OFFSET,
    SUPERBLOCK_VBNS,
    is_superblock,
)

# So many checks of one pool can run at once.
SHARES = 8
# SO_PEERCRED (unix(7)): pid, uid, gid.
CREDENTIALS = struct.Struct("=iII")


def lock_pool(path: str, descriptor: int, *, shared: bool) -> list[int]:
    """Lock the pool that the open file or device holds, if it holds one. Returns descriptors:
    closing them gives the lock up.

    What the kernel remembers of a block device is dropped before the UUID is read, and again when
    it is locked: the previous owner may have written by another path (the file under a loop
    device, another host), and the page cache does not know. Raises PoolLocked, PoolRefused.
    """
    is_block_device = stat.S_ISBLK(os.fstat(descriptor).st_mode)
    if is_block_device:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    blocks = _superblocks(descriptor)
    held: list[int] = []
    try:
        for uuid in sorted(
            {bytes(block[SUPERBLOCK_UUID_OFFSET : SUPERBLOCK_UUID_OFFSET + 16]) for block in blocks}
        ):
            held += _share(path, UUID(bytes=uuid)) if shared else _whole(path, UUID(bytes=uuid))
        for block in blocks:
            owner = decode_owner(block, OWNER_OFFSET)
            if owner is not None and owner.is_alive:
                raise _locked(path, owner)
        if is_block_device:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except BaseException:
        close_all(held)
        raise
    return held


def close_all(descriptors: list[int]) -> None:
    """Close them."""
    while descriptors:
        os.close(descriptors.pop())


def _superblocks(descriptor: int) -> list[bytes]:
    """Those that are whole. One that cannot be read is passed over: opening the pool reads it
    again, and reports that.
    """
    found = []
    for vbn in SUPERBLOCK_VBNS:
        try:
            block = os.pread(descriptor, BLOCK_BYTES, vbn * BLOCK_BYTES)
        except OSError:
            continue
        if is_superblock(block):
            found.append(block)
    return found


def _whole(path: str, uuid: UUID) -> list[int]:
    held: list[int] = []
    for share in range(SHARES):
        descriptor = _take(uuid, share)
        if descriptor is None:
            close_all(held)
            raise _busy(path, uuid, share)
        held.append(descriptor)
    return held


def _share(path: str, uuid: UUID) -> list[int]:
    for share in range(SHARES):
        descriptor = _take(uuid, share)
        if descriptor is not None:
            return [descriptor]
    raise _busy(path, uuid, 0)


def _name(uuid: UUID, share: int) -> str:
    return f"\0cleaved/{uuid}/{share}"


def _take(uuid: UUID, share: int) -> int | None:
    """A descriptor that holds this name, or None: another one does."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as holder:
            holder.bind(_name(uuid, share))
            holder.listen(1)  # so that others can ask whose it is
            return holder.detach()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise PoolRefused(
            f"the pool {uuid} cannot be locked: {error.strerror}; let this process use abstract"
            " Unix sockets"
        ) from error


def _holder_pid(uuid: UUID, share: int) -> int:
    """The process that holds this name; 0: it cannot be told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            asking.connect(_name(uuid, share))
            credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        except OSError:
            return 0
    pid: int = CREDENTIALS.unpack(credentials)[0]
    return pid


def _busy(path: str, uuid: UUID, share: int) -> PoolLocked:
    pid = _holder_pid(uuid, share)
    return _locked_by(path, f"process {pid}" if pid else "another process", f"the pool {uuid}")


def _locked(path: str, owner: Owner) -> PoolLocked:
    return _locked_by(path, f"process {owner.pid} of this machine", "this pool")


def _locked_by(path: str, who: str, what: str) -> PoolLocked:
    return PoolLocked(
        f"{path} is in use: {who} has {what} open by another path (a loop device, a second path to"
        " the disk, or a copy with the same UUID); stop that process first. A copy can be checked"
        " with `cleaved check --copy`, and served on another machine"
    )
