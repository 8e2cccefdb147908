"""What a client program needs to connect to a vdisk: ready lines for each kind of client."""

from collections.abc import Callable, Mapping
from html import escape
from typing import Any, Final

Row = dict[str, Any]


def url(where: Row) -> str:
    """``iscsi://HOST:PORT/TARGET/LUN``, as libiscsi and QEMU take it. A vdisk's name has no character that a URL would change."""
    return f"iscsi://{where['portals'][0]}/{where['target']}/{where['lun']}"


def qemu(where: Row) -> list[str]:
    """A drive for a virtual machine; -iscsi carries the name that a CHAP login needs."""
    lines = [f"-drive file={url(where)},format=raw,if=virtio,cache=none,discard=unmap"]
    if where["chap"]:
        lines.insert(0, "-object secret,id=chap,file=SECRETFILE -iscsi user=USER,password-secret=chap")
    return lines


def open_iscsi(where: Row) -> list[str]:
    """Login with iscsiadm, after discovery, or where that asks for CHAP too, of a node that is written down by hand."""
    portal, target = where["portals"][0], where["target"]
    node = f"iscsiadm -m node -T {target} -p {portal}"
    if not where["chap"]:
        lines = [f"iscsiadm -m discovery -t sendtargets -p {portal}"]
    else:
        lines = [f"{node} -o new"]
        settings = ("authmethod -v CHAP", "username -v USER", "password -v SECRET")
        lines += [f"{node} -o update -n node.session.auth.{setting}" for setting in settings]
    return [*lines, f"{node} --login"]


def libiscsi(where: Row) -> list[str]:
    """The URL, and a first command to try it with."""
    found = url(where)
    if where["chap"]:
        found = found.replace("iscsi://", "iscsi://USER%SECRET@")
    return [found, f"iscsi-inq '{found}'"]


def libvirt(where: Row) -> list[str]:
    """A disk element for a domain."""
    host, _, port = where["portals"][0].rpartition(":")
    name = escape(f"{where['target']}/{where['lun']}")
    auth = ["    <auth username='USER'><secret type='iscsi' usage='cleaved'/></auth>"] if where["chap"] else []
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


CLIENTS: Final[Mapping[str, Callable[[Row], list[str]]]] = {
    "qemu": qemu,
    "open-iscsi": open_iscsi,
    "libiscsi": libiscsi,
    "libvirt": libvirt,
}
