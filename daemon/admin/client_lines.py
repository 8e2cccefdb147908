"""What a client program needs to connect to a vdisk: ready lines for each kind of client, and
whether a login would work.

USER, SECRET, SECRETFILE and INITIATOR stand in the lines for what cannot be known here.
"""

from collections.abc import Callable, Mapping
from html import escape
from shlex import quote
from typing import Final

from protocol.control.errors import CONFLICT, FAILED, ControlError
from protocol.control.rows import Portal


class ClientLines(Portal, frozen=True, kw_only=True):
    """What ``connect -o json`` prints."""

    client: str
    lines: list[str]
    notes: list[str]


# So many of a list of initiators are named in a note.
INITIATORS_NAMED_MAX: Final = 5


def check_reachable(where: Portal) -> None:
    """Raise ControlError where no line for a client could work, with what would help."""
    name, initiator = where.name, where.initiator
    if not where.portals:
        raise ControlError(
            FAILED,
            "the daemon listens on no iSCSI address",
            "set iscsi.listen, or start it with --iscsi HOST:PORT",
        )
    if where.allowed:
        return
    listed = where.initiators
    if listed and initiator is not None:
        cause = f"{initiator} is not on the access list of {name}"
    elif listed is not None:
        cause = f"the access list of {name} is empty: nobody may log in"
    else:
        cause = (
            f"{name} has no access list, and access is not open (iscsi.open_access): nobody may"
            " log in"
        )
    raise ControlError(
        CONFLICT, cause, f"to let a client in: cleavectl acl add {name} {initiator or 'INITIATOR'}"
    )


def notes(where: Portal) -> list[str]:
    """What the lines leave open."""
    found = []
    listed, initiator = where.initiators, where.initiator
    if listed and initiator is None:
        more = len(listed) - INITIATORS_NAMED_MAX
        names = ", ".join(listed[:INITIATORS_NAMED_MAX]) + (
            f" and {more} more (cleavectl acl ls {where.name})" if more > 0 else ""
        )
        found.append(
            f"INITIATOR is the client's iSCSI name, one of {names}: --initiator writes it into the"
            " lines"
        )
    elif listed:
        found.append(
            f"{where.name} is for those on its access list: the client's iSCSI name must be"
            f" {initiator}"
        )
    if where.chap:
        user = (
            "USER is the client's CHAP user (cleavectl chap ls); "
            if where.chap_user is None
            else ""
        )
        found.append(
            f"{user}SECRET and SECRETFILE stand for its CHAP secret, and for a file that holds it"
        )
    if all(map(_is_loopback, where.portals)):
        found.append(
            "the daemon listens on loopback only: the lines work on this machine alone (set"
            " iscsi.listen for others)"
        )
    return found


def _is_loopback(portal: str) -> bool:
    return portal.startswith(("127.", "[::1]:", "localhost:"))


def portal_of(where: Portal) -> str:
    """The first address that other machines can reach, as this one can too; the first of all where
    there is none.
    """
    return next((portal for portal in where.portals if not _is_loopback(portal)), where.portals[0])


def _initiator(where: Portal) -> str | None:
    """What the client must call itself; None: whatever it likes."""
    return "INITIATOR" if where.initiator is None and where.initiators else where.initiator


def _user(where: Portal) -> str:
    return where.chap_user or "USER"


def url(where: Portal) -> str:
    """``iscsi://HOST:PORT/TARGET/LUN``, as libiscsi and QEMU take it. A vdisk's name has no
    character that a URL would change.
    """
    return f"iscsi://{portal_of(where)}/{where.target}/{where.lun}"


def qemu(where: Portal) -> list[str]:
    """A drive for a virtual machine; -iscsi carries the names that the login needs."""
    lines, login, initiator = [], [], _initiator(where)
    if initiator is not None:
        login.append(f"initiator-name={initiator}")
    if where.chap:
        lines.append("-object secret,id=chap,file=SECRETFILE")
        login.append(f"user={_qemu_value(_user(where))},password-secret=chap")
    if login:
        lines.append(f"-iscsi {','.join(login)}")
    return [*lines, f"-drive file={url(where)},format=raw,if=virtio,cache=none,discard=unmap"]


def _qemu_value(text: str) -> str:
    """QEMU's option lists end a value at a comma; two stand for one."""
    return quote(text.replace(",", ",,"))


def open_iscsi(where: Portal) -> list[str]:
    """Login with iscsiadm, after discovery, or where that asks for CHAP too, of a node that is
    written down by hand.
    """
    portal, target, initiator = portal_of(where), where.target, _initiator(where)
    node = f"iscsiadm -m node -T {target} -p {portal}"
    lines = []
    if initiator is not None:
        lines.append(f"# /etc/iscsi/initiatorname.iscsi must say: InitiatorName={initiator}")
    if not where.chap:
        lines.append(f"iscsiadm -m discovery -t sendtargets -p {portal}")
    else:
        lines.append(f"{node} -o new")
        settings = (
            "authmethod -v CHAP",
            f"username -v {quote(_user(where))}",
            "password -v SECRET",
        )
        lines += [f"{node} -o update -n node.session.auth.{setting}" for setting in settings]
    return [*lines, f"{node} --login"]


def libiscsi(where: Portal) -> list[str]:
    """The URL, and a first command to try it with. The initiator's name is no part of a URL."""
    found, initiator = url(where), _initiator(where)
    if where.chap:
        found = found.replace("iscsi://", f"iscsi://{_user(where)}%SECRET@")
    option = "" if initiator is None else f"-i {initiator} "
    return [found, f"iscsi-inq {option}{quote(found)}"]


def libvirt(where: Portal) -> list[str]:
    """A disk element for a domain."""
    host, _, port = portal_of(where).rpartition(":")
    name, initiator = escape(f"{where.target}/{where.lun}"), _initiator(where)
    auth = (
        [
            (
                f"    <auth username='{escape(_user(where))}'><secret type='iscsi'"
                " usage='cleaved'/></auth>"
            )
        ]
        if where.chap
        else []
    )
    if initiator is not None:
        auth.append(f"    <initiator><iqn name='{escape(initiator)}'/></initiator>")
    return [
        "<disk type='network' device='disk'>",
        "  <driver name='qemu' type='raw' cache='none' discard='unmap'/>",
        f"  <source protocol='iscsi' name='{name}'>",
        f"    <host name='{escape(host.strip('[]'))}' port='{port}'/>",
        *auth,
        "  </source>",
        "  <target dev='vda' bus='virtio'/>",
        "</disk>",
    ]


def check_nbd(where: Portal) -> None:
    """Raise ControlError where no NBD client could use the disk, with what would help."""
    if not where.nbd:
        raise ControlError(
            FAILED,
            "the daemon does not serve NBD",
            "set nbd.listen, or start it with --nbd HOST:PORT or --nbd PATH",
        )
    if not where.nbd_open and not any("/" in at for at in where.nbd):
        raise ControlError(
            CONFLICT,
            f"{where.name} is not open to everybody, and an NBD client over TCP proves no name",
            "serve NBD on a Unix socket (--nbd PATH), whose permissions decide",
        )


def _nbd_address(where: Portal) -> str:
    """TCP where that is allowed, since it reaches further; else the Unix socket's path."""
    paths = [at for at in where.nbd if "/" in at]
    ports = [at for at in where.nbd if "/" not in at] if where.nbd_open else []
    return next((at for at in ports if not _is_loopback(at)), next(iter(ports + paths)))


def nbd_url(where: Portal) -> str:
    """The NBD URI, as QEMU and libnbd take it."""
    at = _nbd_address(where)
    if "/" in at:
        return f"nbd+unix:///{where.name}?socket={at}"
    return f"nbd://{at}/{where.name}"


def nbd(where: Portal) -> list[str]:
    """Libnbd's tools, and the kernel's client."""
    at, found = _nbd_address(where), quote(nbd_url(where))
    if "/" in at:
        place = f"-unix {quote(at)}"
    else:
        host, _, port = at.rpartition(":")
        place = f"{host.strip('[]')} {port}"
    return [
        f"nbdinfo {found}",
        f"nbdcopy {found} FILE",
        f"nbd-client {place} /dev/nbd0 -N {quote(where.name)}",
    ]


def qemu_nbd(where: Portal) -> list[str]:
    """QEMU's tools, and a drive for a virtual machine."""
    found = nbd_url(where)
    drive = f"-drive file={_qemu_value(found)},format=raw,if=virtio,cache=none,discard=unmap"
    return [f"qemu-img info {quote(found)}", drive]


# Those that come over NBD.
NBD_CLIENTS: Final = frozenset(("nbd", "qemu-nbd"))
CLIENTS: Final[Mapping[str, Callable[[Portal], list[str]]]] = {
    "qemu": qemu,
    "open-iscsi": open_iscsi,
    "libiscsi": libiscsi,
    "libvirt": libvirt,
    "nbd": nbd,
    "qemu-nbd": qemu_nbd,
}
