"""TransportIDs of iSCSI (SPC-4 7.6.4.6): how PERSISTENT RESERVE IN and OUT name an initiator, or
one port of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from protocol.names import INITIATOR_PORT, ISID_DIGITS, NAME_BYTES_MAX, fold

_ISCSI: Final = 0x05
_DEVICE_FORMAT: Final = 0x00
_PORT_FORMAT: Final = 0x40
_HEAD_BYTES: Final = 4
# The name is padded with zeros so that the additional length is a multiple of four, and at least
# this.
_NAME_BYTES_MIN: Final = 20
# The longest node name, separator, ISID, a zero, padding.
_NAME_BYTES_MAX: Final = -(-(NAME_BYTES_MAX + len(INITIATOR_PORT) + ISID_DIGITS + 1) // 4) * 4


class BadTransportId(Exception):
    """``at`` is the offset of what is wrong, from the first byte of the list."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.at = at


@dataclass(frozen=True, slots=True)
class TransportId:
    """``isid`` is None where it names the initiator device, with all of its ports. Names and digits
    are in lower case.
    """

    node_name: str
    isid: str | None

    def ports(self, known: Iterable[str]) -> list[str]:
        """The initiator ports that it names: one port, known or not, or all known ports of a
        device.
        """
        if self.isid is not None:
            return [f"{self.node_name}{INITIATOR_PORT}{self.isid}"]
        return sorted(
            {port for port in known if port.partition(INITIATOR_PORT)[0] == self.node_name}
        )


def encode_transport_id(port: str) -> bytes:
    """TransportID of an initiator port."""
    name = port.encode() + b"\0"
    name += bytes(max(_NAME_BYTES_MIN - len(name), -len(name) % 4))
    return bytes((_PORT_FORMAT | _ISCSI, 0)) + len(name).to_bytes(2, "big") + name


def decode_transport_ids(data: bytes) -> list[TransportId]:
    """All TransportIDs of a parameter list. Raises BadTransportId."""
    found, at = [], 0
    while at < len(data):
        if len(data) - at < _HEAD_BYTES:
            raise BadTransportId(at)
        size = int.from_bytes(data[at + 2 : at + _HEAD_BYTES], "big")
        end = at + _HEAD_BYTES + size
        if not _NAME_BYTES_MIN <= size <= _NAME_BYTES_MAX or size % 4 or end > len(data):
            raise BadTransportId(at + 2)
        found.append(_decode(data[at], data[at + _HEAD_BYTES : end], at))
        at = end
    return found


def _decode(first: int, padded: bytes, at: int) -> TransportId:
    if first not in (_ISCSI | _DEVICE_FORMAT, _ISCSI | _PORT_FORMAT):
        # An initiator of another protocol cannot come through a port of this one.
        raise BadTransportId(at)
    name, zero, padding = padded.partition(b"\0")
    try:
        node, separator, isid = fold(name.decode()).partition(INITIATOR_PORT)
    except UnicodeDecodeError:
        raise BadTransportId(at + _HEAD_BYTES) from None
    if (
        not zero
        or any(padding)
        or not node
        or len(node.encode()) > NAME_BYTES_MAX
        or bool(separator) != bool(first & _PORT_FORMAT)
    ):
        raise BadTransportId(at + _HEAD_BYTES)
    if separator and (len(isid) != ISID_DIGITS or not set(isid) <= set("0123456789abcdef")):
        raise BadTransportId(at + _HEAD_BYTES)
    return TransportId(node, isid if separator else None)
