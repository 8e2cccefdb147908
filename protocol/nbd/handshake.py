"""The fixed newstyle handshake ("Handshake", "TLS support", "Option types").

A `Handshake` begins with the client's flags and ends with an export, an abort, or TLS: behind TLS a
new one begins with the options, and takes nothing along but the client's flags.
"""

import enum
from collections.abc import Callable
from typing import ClassVar, Final, NamedTuple

from protocol.nbd import limits, meta_context, wire
from protocol.nbd.errors import OptionRefused, ProtocolError
from protocol.nbd.export import Export, ExportDirectory, MetaContext, transmission_flags
from protocol.nbd.framing import Outbox, ReceiveBuffer
from protocol.nbd.listing import Listing
from protocol.nbd.option_data import (
    ContextQuery,
    decode_string,
    parse_contexts,
    parse_info,
    parse_nothing,
)
from protocol.nbd.option_replies import OptionReplies

HANDSHAKE_FLAGS: Final = wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES
GREETING: Final = wire.GREETING.pack(wire.MAGIC, wire.OPTION_MAGIC, HANDSHAKE_FLAGS)
# What a client may ask for before TLS where TLS is required ("FORCEDTLS mode").
_WITHOUT_TLS: Final = frozenset((wire.OPT_STARTTLS, wire.OPT_ABORT))
# Where TLS is offered, these may say that an export requires it, and others may not
# ("SELECTIVETLS mode").
_SAYING_TLS: Final = frozenset((wire.OPT_INFO, wire.OPT_GO))


class TlsMode(enum.Enum):
    """NOTLS, SELECTIVETLS and FORCEDTLS of the document; and that TLS is there."""

    NONE = "none"
    OFFERED = "offered"
    REQUIRED = "required"
    ACTIVE = "active"


class State(enum.Enum):
    """See the module's docstring. LISTING: a long reply is under way, and nothing is handled
    meanwhile.
    """

    CLIENT_FLAGS = "client flags"
    OPTIONS = "options"
    LISTING = "listing"
    TLS = "tls"
    ENTERED = "entered"
    ABORTED = "aborted"


class Entered(NamedTuple):
    """What was negotiated for the transmission phase. The ID of a context is its place, from 1."""

    export: Export
    size_bytes: int
    structured: bool
    extended: bool
    contexts: tuple[MetaContext, ...]


class Handshake:
    """``client_flags`` are those that were sent before TLS; None: they are still to come."""

    __slots__ = (
        "_bytes",
        "_contexts",
        "_contexts_of",
        "_directory",
        "_extended",
        "_listing",
        "_mode",
        "_replies",
        "_skipped",
        "_structured",
        "client_flags",
        "entered",
        "options",
        "shutting_down",
        "state",
    )

    def __init__(
        self,
        directory: ExportDirectory,
        mode: TlsMode,
        outbox: Outbox,
        listing: Listing,
        client_flags: int | None = None,
    ) -> None:
        self.state = State.CLIENT_FLAGS if client_flags is None else State.OPTIONS
        self.client_flags = client_flags
        self.entered: Entered | None = None
        self.shutting_down = False
        self.options = 0
        self._bytes = 0
        self._directory = directory
        self._mode = mode
        self._replies = OptionReplies(outbox)
        self._listing = listing
        self._structured = False
        self._extended = False
        self._contexts: list[MetaContext] = []
        self._contexts_of: Export | None = None
        self._skipped: tuple[int, int] | None = None

    # --- Bytes ------------------------------------------------------------------------------------

    def run(self, receive: ReceiveBuffer) -> None:
        """Handle every whole option. Raises ProtocolError."""
        while self.state in {State.CLIENT_FLAGS, State.OPTIONS} and self._step(receive):
            pass

    def _step(self, receive: ReceiveBuffer) -> bool:
        if self.state is State.CLIENT_FLAGS:
            return self._take_flags(receive)
        if self._skipped is not None:
            return self._skip(receive, *self._skipped)
        if not receive.has(wire.OPTION.size):
            return False
        magic, option, length = wire.OPTION.unpack_from(receive.storage, receive.start)
        if magic != wire.OPTION_MAGIC:
            raise ProtocolError(f"an option with the magic number {magic:#x}")
        if length > limits.OPTION_BYTES_MAX:
            self._count(option, length)
            receive.take(wire.OPTION.size)
            self._skipped = option, length
            return True
        if not receive.has(wire.OPTION.size + length):
            return False
        self._count(option, length)
        receive.take(wire.OPTION.size)
        self._handle(option, bytes(receive.take(length)))
        return True

    def _take_flags(self, receive: ReceiveBuffer) -> bool:
        """The section "Client flags": an unknown one ends the connection. TLS is for clients that
        know fixed newstyle.
        """
        if not receive.has(wire.CLIENT_FLAGS.size):
            return False
        (flags,) = wire.CLIENT_FLAGS.unpack(receive.take(wire.CLIENT_FLAGS.size))
        if flags & ~HANDSHAKE_FLAGS:
            raise ProtocolError(f"client flags {flags:#x}, of which some are unknown")
        if not flags & wire.FLAG_FIXED_NEWSTYLE and self._mode is TlsMode.REQUIRED:
            raise ProtocolError("TLS is required, and the client does not know fixed newstyle")
        self.client_flags = flags
        self.state = State.OPTIONS
        return True

    def _count(self, option: int, length: int) -> None:
        self.options += 1
        self._bytes += wire.OPTION.size + length
        if self.options > limits.OPTIONS_MAX or self._bytes > limits.HANDSHAKE_BYTES_MAX:
            if option != wire.OPT_EXPORT_NAME:
                self._replies.error(option, wire.REP_ERR_TOO_BIG, "the handshake is too long")
            raise ProtocolError(f"a handshake of {self.options} options, {self._bytes} bytes")

    def _skip(self, receive: ReceiveBuffer, option: int, left: int) -> bool:
        """Data of an option that is longer than any that is known here."""
        left -= len(receive.take(min(left, receive.available)))
        if left:
            self._skipped = option, left
            return False
        self._skipped = None
        if option == wire.OPT_EXPORT_NAME:
            raise ProtocolError("an export name longer than any string may be")
        refusal = self._refusal(option)
        if refusal is None:
            refusal = OptionRefused(
                wire.REP_ERR_TOO_BIG if option in self._HANDLERS else wire.REP_ERR_UNSUP,
                f"more than {limits.OPTION_BYTES_MAX} bytes of data",
            )
        self._refuse(option, refusal)
        return True

    # --- Options ----------------------------------------------------------------------------------

    def _handle(self, option: int, data: bytes) -> None:
        handler = self._HANDLERS.get(option)
        refusal = self._refusal(option)
        try:
            if refusal is not None:
                raise refusal
            if handler is None:
                raise OptionRefused(wire.REP_ERR_UNSUP, f"option {option} is not known here")
            handler(self, option, data)
        except OptionRefused as error:
            self._refuse(option, error)

    def _refusal(self, option: int) -> OptionRefused | None:
        """Why no option at all is handled now, or this one is not."""
        if option == wire.OPT_ABORT:
            return None
        if self._mode is TlsMode.REQUIRED and option not in _WITHOUT_TLS:
            return OptionRefused(wire.REP_ERR_TLS_REQD, "begin TLS first: it is required here")
        if self.shutting_down:
            return OptionRefused(wire.REP_ERR_SHUTDOWN, "the server is going down")
        return None

    def _refuse(self, option: int, error: OptionRefused) -> None:
        """An error reply; NBD_OPT_EXPORT_NAME has none, and ends the connection."""
        if option == wire.OPT_SET_META_CONTEXT:
            self._contexts, self._contexts_of = [], None
        if option == wire.OPT_EXPORT_NAME:
            raise ProtocolError(f"NBD_OPT_EXPORT_NAME was refused: {error}")
        self._replies.error(option, error.reply_type, str(error))

    def _export_name(self, option: int, data: bytes) -> None:
        if self._extended:
            raise ProtocolError("NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS")
        assert self.client_flags is not None
        entered = self._negotiated(self._find(option, decode_string(data)))
        self._replies.export_name(
            entered.size_bytes,
            self._flags(entered),
            padded=not self.client_flags & wire.FLAG_NO_ZEROES,
        )
        self._enter(entered)

    def _abort(self, option: int, data: bytes) -> None:
        self._replies.ack(option)
        self.state = State.ABORTED

    def _list(self, option: int, data: bytes) -> None:
        """A server that offers TLS leaves out what requires it."""
        parse_nothing(data)
        self.state = State.LISTING
        exports = (
            listed
            for listed in self._directory.list()
            if self._tls_active or not listed.tls_required
        )
        self._listing.start(exports, self._replies, self._listed)

    def _listed(self) -> None:
        self._replies.ack(wire.OPT_LIST)
        self.state = State.OPTIONS

    def _starttls(self, option: int, data: bytes) -> None:
        parse_nothing(data)
        assert self.client_flags is not None
        if self._tls_active:
            raise OptionRefused(wire.REP_ERR_INVALID, "TLS has begun already")
        if self._mode is TlsMode.NONE or not self.client_flags & wire.FLAG_FIXED_NEWSTYLE:
            raise OptionRefused(wire.REP_ERR_POLICY, "there is no TLS here")
        self._replies.ack(option)
        self.state = State.TLS

    def _info(self, option: int, data: bytes) -> None:
        request = parse_info(data)
        entered = self._negotiated(self._find(option, request.name))
        self._replies.info_export(option, entered.size_bytes, self._flags(entered))
        self._replies.info_block_size(option)
        if wire.INFO_NAME in request.wanted:
            self._replies.info_text(option, wire.INFO_NAME, entered.export.name)
        if wire.INFO_DESCRIPTION in request.wanted and entered.export.description:
            self._replies.info_text(option, wire.INFO_DESCRIPTION, entered.export.description)
        self._replies.ack(option)
        if option == wire.OPT_GO:
            self._enter(entered)

    def _structured_reply(self, option: int, data: bytes) -> None:
        parse_nothing(data)
        if self._extended:
            raise OptionRefused(
                wire.REP_ERR_EXT_HEADER_REQD, "extended headers were negotiated already"
            )
        self._structured = True
        self._replies.ack(option)

    def _extended_headers(self, option: int, data: bytes) -> None:
        parse_nothing(data)
        self._extended = True
        self._replies.ack(option)

    def _list_contexts(self, option: int, data: bytes) -> None:
        export, query = self._context_query(option, data)
        for name in meta_context.listed(export, query.queries):
            self._replies.meta_context(option, 0, name)
        self._replies.ack(option)

    def _set_contexts(self, option: int, data: bytes) -> None:
        """Replaces what was selected before, also when it fails."""
        self._contexts, self._contexts_of = [], None
        export, query = self._context_query(option, data)
        contexts = meta_context.selected(export, query.queries)
        if len(contexts) > limits.CONTEXTS_MAX:
            raise OptionRefused(
                wire.REP_ERR_TOO_BIG,
                f"{len(contexts)} contexts, where {limits.CONTEXTS_MAX} are the most",
            )
        for number, context in enumerate(contexts, 1):
            self._replies.meta_context(option, number, context.name)
        self._replies.ack(option)
        self._contexts, self._contexts_of = contexts, export

    def _context_query(self, option: int, data: bytes) -> tuple[Export, ContextQuery]:
        if not (self._structured or self._extended):
            raise OptionRefused(
                wire.REP_ERR_INVALID, "negotiate structured replies or extended headers first"
            )
        query = parse_contexts(data)
        return self._find(option, query.name), query

    # --- Exports ----------------------------------------------------------------------------------

    @property
    def _tls_active(self) -> bool:
        return self._mode is TlsMode.ACTIVE

    def _find(self, option: int, name: str) -> Export:
        """The export of that name. Before TLS one that requires it, and one that is not there, get
        the same answer.
        """
        export = self._directory.find(name)
        if export is not None and (self._tls_active or not export.tls_required):
            return export
        if self._mode is TlsMode.OFFERED and option in _SAYING_TLS:
            raise OptionRefused(
                wire.REP_ERR_TLS_REQD, "there is no such export, or it requires TLS"
            )
        raise OptionRefused(wire.REP_ERR_UNKNOWN, "there is no such export for this client")

    def _negotiated(self, export: Export) -> Entered:
        """What transmission would begin with now. Contexts count for the export that they were
        selected for.
        """
        of = self._contexts_of
        same = of is not None and (of.name, of.volume.uuid) == (export.name, export.volume.uuid)
        return Entered(
            export,
            export.volume.size_bytes & -limits.MINIMUM_BLOCK_BYTES,
            self._structured,
            self._extended,
            tuple(self._contexts) if same else (),
        )

    def _flags(self, entered: Entered) -> int:
        return transmission_flags(
            entered.export, self._structured, self._extended, bool(entered.contexts)
        )

    def _enter(self, entered: Entered) -> None:
        self.entered = entered
        self.state = State.ENTERED

    _HANDLERS: ClassVar[dict[int, Callable[["Handshake", int, bytes], None]]] = {
        wire.OPT_EXPORT_NAME: _export_name,
        wire.OPT_ABORT: _abort,
        wire.OPT_LIST: _list,
        wire.OPT_STARTTLS: _starttls,
        wire.OPT_INFO: _info,
        wire.OPT_GO: _info,
        wire.OPT_STRUCTURED_REPLY: _structured_reply,
        wire.OPT_LIST_META_CONTEXT: _list_contexts,
        wire.OPT_SET_META_CONTEXT: _set_contexts,
        wire.OPT_EXTENDED_HEADERS: _extended_headers,
    }
