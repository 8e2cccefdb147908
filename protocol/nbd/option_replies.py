"""Replies to options ("Fixed newstyle negotiation", "Option reply types")."""

from protocol.nbd import limits, wire
from protocol.nbd.errors import message_bytes
from protocol.nbd.export import Listed
from protocol.nbd.framing import Outbox


class OptionReplies:
    """Queues replies."""

    __slots__ = ("_outbox",)

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def _put(self, option: int, reply_type: int, data: bytes = b"") -> None:
        header = wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, reply_type, len(data))
        self._outbox.put(header, data)

    def ack(self, option: int) -> None:
        """Success, and the last reply."""
        self._put(option, wire.REP_ACK)

    def error(self, option: int, reply_type: int, message: str) -> None:
        """An error, and the last reply."""
        self._put(option, reply_type, message_bytes(message))

    def server(self, listed: Listed) -> None:
        """One export of a list; its description is the text for people behind the name."""
        name = listed.name.encode()
        self._put(
            wire.OPT_LIST,
            wire.REP_SERVER,
            wire.LENGTH.pack(len(name)) + name + listed.description.encode(),
        )

    def meta_context(self, option: int, number: int, name: str) -> None:
        """One metadata context and its ID."""
        self._put(option, wire.REP_META_CONTEXT, wire.CONTEXT_ID.pack(number) + name.encode())

    def info_export(self, option: int, size_bytes: int, flags: int) -> None:
        """NBD_INFO_EXPORT."""
        data = wire.INFO_EXPORT_REPLY.pack(wire.INFO_EXPORT, size_bytes, flags)
        self._put(option, wire.REP_INFO, data)

    def info_block_size(self, option: int) -> None:
        """NBD_INFO_BLOCK_SIZE, which is sent to all: the minimum is not the document's default."""
        data = wire.INFO_BLOCK_SIZE_REPLY.pack(
            wire.INFO_BLOCK_SIZE,
            limits.MINIMUM_BLOCK_BYTES,
            limits.PREFERRED_BLOCK_BYTES,
            limits.PAYLOAD_BYTES_MAX,
        )
        self._put(option, wire.REP_INFO, data)

    def info_text(self, option: int, kind: int, text: str) -> None:
        """NBD_INFO_NAME or NBD_INFO_DESCRIPTION."""
        self._put(option, wire.REP_INFO, wire.INFO_TYPE.pack(kind) + text.encode())

    def export_name(self, size_bytes: int, flags: int, padded: bool) -> None:
        """The reply to NBD_OPT_EXPORT_NAME, which has no header."""
        self._outbox.put(
            wire.EXPORT_NAME_REPLY.pack(size_bytes, flags)
            + (wire.EXPORT_NAME_PADDING if padded else b"")
        )
