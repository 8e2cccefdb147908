"""The daemon's side of one control connection, sans-IO.

States: a connection is NEW until ``hello`` was answered, then READY, and CLOSED once its bytes
could not be followed. Calls come out of ``receive`` validated; each is answered exactly once by
``answer`` or ``refuse``, in any order. What needs no pool is answered here (``rpc.list``,
``rpc.subscribe``, ``hello``'s refusals, malformed requests).
"""

import enum
from collections.abc import Iterator
from typing import Any, NamedTuple

from protocol.control import calls, methods
from protocol.control.definition import AnyMethod
from protocol.control.errors import (
    HELLO_FIRST,
    INVALID_REQUEST,
    TOO_MANY_REQUESTS,
    ControlError,
    FramingError,
)
from protocol.control.frames import FrameReader, Request, encode_notification, encode_response
from protocol.control.limits import (
    PROTOCOL_VERSION,
    REQUEST_BYTES_MAX,
    REQUEST_ITEMS_MAX,
    REQUESTS_PENDING_MAX,
)


class State(enum.Enum):
    """See the module's docstring."""

    NEW = "new"
    READY = "ready"
    CLOSED = "closed"


class Call(NamedTuple):
    """One validated request for the service. ``method`` is the call with its parameters."""

    request_id: int
    method: AnyMethod


class ServerConnection:
    """State of one connection. Bytes for the peer gather in ``take_output``."""

    def __init__(self) -> None:
        self.state = State.NEW
        self.client = ""
        self.subscriptions: frozenset[str] = frozenset()
        self._reader = FrameReader(REQUEST_BYTES_MAX, REQUEST_ITEMS_MAX)
        self._pending: set[int] = set()
        self._output: list[bytes] = []

    def receive(self, data: bytes) -> Iterator[Call]:
        """Calls that ``data`` completes. Bytes that are no frames close the connection, and the
        output says why.
        """
        try:
            for message in self._reader.feed(data):
                if not isinstance(message, Request):
                    raise FramingError("a client sends requests only")
                call = self._accept(message)
                if call is not None:
                    yield call
        except FramingError as error:
            self.state = State.CLOSED
            self._write(0, ControlError(INVALID_REQUEST, str(error)).as_object(), None)

    def _accept(self, request: Request) -> Call | None:
        try:
            return self._validate(request)
        except ControlError as error:
            self._write(request.request_id, error.as_object(), None)
            return None

    def _validate(self, request: Request) -> Call | None:
        if request.request_id in self._pending:
            raise ControlError(
                INVALID_REQUEST,
                f"request id {request.request_id} is in use by a request that waits for its answer",
            )
        if len(self._pending) >= REQUESTS_PENDING_MAX:
            raise ControlError(
                TOO_MANY_REQUESTS,
                f"{REQUESTS_PENDING_MAX} requests of this connection wait for their answers"
                " already",
            )
        method = calls.validate(request.method, request.params)
        if self.state is State.NEW and not isinstance(method, methods.Hello):
            raise ControlError(
                HELLO_FIRST,
                f"{request.method} came before hello",
                "call hello with client and protocol first",
            )
        if isinstance(method, methods.ListMethods):
            self._write(request.request_id, None, calls.describe())
            return None
        if isinstance(method, methods.Subscribe):
            self.subscriptions = frozenset(method.events)
            self._write(request.request_id, None, sorted(self.subscriptions))
            return None
        if isinstance(method, methods.Hello):
            self._greet(method)
        self._pending.add(request.request_id)
        return Call(request.request_id, method)

    def _greet(self, hello: methods.Hello) -> None:
        if hello.protocol != PROTOCOL_VERSION:
            raise ControlError(
                INVALID_REQUEST,
                f"the client speaks control protocol {hello.protocol}, this daemon"
                f" {PROTOCOL_VERSION}",
                "use a cleavectl of the daemon's version",
            )
        self.client = hello.client
        self.state = State.READY

    def answer(self, request_id: int, result: Any) -> Iterator[bytes]:
        """Bytes of a response, in parts that each cost the event loop little. They must reach the
        peer together, in order.
        """
        self._pending.remove(request_id)
        return encode_response(request_id, None, result)

    def refuse(self, request_id: int, error: ControlError) -> Iterator[bytes]:
        """Bytes of a response that is an error."""
        self._pending.remove(request_id)
        return encode_response(request_id, error.as_object(), None)

    def notification(self, event: str, params: Any) -> bytes | None:
        """Bytes of a notification, or None when this connection did not subscribe to it."""
        if event not in self.subscriptions or self.state is not State.READY:
            return None
        return encode_notification(event, params)

    def take_output(self) -> bytes:
        """What was answered here since the last call."""
        output = b"".join(self._output)
        self._output.clear()
        return output

    def _write(self, request_id: int, error: Any, result: Any) -> None:
        self._output.extend(encode_response(request_id, error, result))
