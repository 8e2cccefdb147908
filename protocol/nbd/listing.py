"""The long reply of the handshake: NBD_OPT_LIST where there are very many exports.

It is given piece by piece, each in a turn of the event loop of its own, and not faster than the
client takes it.
"""

from collections.abc import Callable, Iterator
from itertools import islice

from protocol.nbd.export import Listed
from protocol.nbd.limits import LIST_PIECE
from protocol.nbd.option_replies import OptionReplies


def _nothing() -> None:
    """What a listing that was released does."""


def _never() -> bool:
    """It does not go on."""
    return False


class Listing:
    """``turn`` is the transport's; ``flush`` sends what is queued; ``may_go_on`` is False while the
    client does not drain, or after the connection has ended; ``go_on`` handles what the client sent
    meanwhile.
    """

    __slots__ = (
        "_done",
        "_exports",
        "_flush",
        "_go_on",
        "_may_go_on",
        "_replies",
        "_stalled",
        "_turn",
    )

    def __init__(
        self,
        turn: Callable[[Callable[[], None]], None],
        flush: Callable[[], None],
        may_go_on: Callable[[], bool],
        go_on: Callable[[], None],
    ) -> None:
        self._turn = turn
        self._flush = flush
        self._may_go_on = may_go_on
        self._go_on = go_on
        self._exports: Iterator[Listed] | None = None
        self._replies: OptionReplies | None = None
        self._done: Callable[[], None] | None = None
        self._stalled = False

    def start(
        self, exports: Iterator[Listed], replies: OptionReplies, done: Callable[[], None]
    ) -> None:
        """Begin in the next turn; ``done`` ends the reply."""
        self._exports, self._replies, self._done = exports, replies, done
        self._turn(self._step)

    def resume(self) -> None:
        """The client drains again."""
        if self._stalled:
            self._stalled = False
            self._turn(self._step)

    def release(self) -> None:
        """The connection is over: refer back to it no more, so that no ring of references is
        left.
        """
        self._exports = self._replies = self._done = None
        self._stalled = False
        self._flush = self._go_on = _nothing
        self._may_go_on = _never

    def _step(self) -> None:
        if not self._may_go_on():
            self._stalled = True
            return
        assert self._exports is not None
        assert self._replies is not None and self._done is not None
        count = 0
        for listed in islice(self._exports, LIST_PIECE):
            self._replies.server(listed)
            count += 1
        if count == LIST_PIECE:
            self._flush()
            self._turn(self._step)
            return
        done = self._done
        self._exports = self._replies = self._done = None
        done()
        self._flush()
        self._go_on()
