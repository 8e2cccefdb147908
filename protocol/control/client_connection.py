"""The client's side of a control connection, sans-IO."""

import itertools
from collections.abc import Iterator

import msgspec

from protocol.control import methods
from protocol.control.definition import AnyMethod, Method, Result, result_type
from protocol.control.errors import FAILED, ControlError, FramingError
from protocol.control.frames import FrameReader, Notification, Request, Response, encode_request
from protocol.control.limits import PROTOCOL_VERSION, RESPONSE_BYTES_MAX, RESPONSE_ITEMS_MAX
from protocol.control.rows import Row


class ClientConnection:
    """Numbers requests and cuts the daemon's bytes into responses and notifications."""

    def __init__(self) -> None:
        self._reader = FrameReader(RESPONSE_BYTES_MAX, RESPONSE_ITEMS_MAX)
        self._ids = itertools.count(1)  # 0 is what the daemon answers to bytes that are no request

    def request(self, call: AnyMethod) -> tuple[int, bytes]:
        """One request: its id and its bytes."""
        request_id = next(self._ids)
        return request_id, encode_request(request_id, call.METHOD, call)

    def receive(self, data: bytes) -> Iterator[Response | Notification]:
        """Messages that ``data`` completes. Raises FramingError when the other side is not a daemon
        of this kind.
        """
        for message in self._reader.feed(data):
            if isinstance(message, Request):
                raise FramingError("the daemon sends no requests")
            yield message


def hello(client: str) -> methods.Hello:
    """The first call of a connection."""
    return methods.Hello(client=client, protocol=PROTOCOL_VERSION)


def result_in(response: Response, method: type[Method[Result]]) -> Result:
    """What the daemon answered to a call of ``method``; keys of a newer daemon are passed over.
    Raises ControlError: the daemon refused, or its answer is of another version.
    """
    if response.error is not None:
        raise ControlError.from_object(response.error)
    try:
        return msgspec.convert(response.result, result_type(method))
    except msgspec.ValidationError as error:
        raise ControlError(
            FAILED,
            f"the daemon's answer to {method.METHOD} cannot be understood: {error}",
            "use a cleavectl of the daemon's version",
        ) from None


def event_in(notification: Notification) -> Row | None:
    """What a notification carries; None for one of another version."""
    kind = methods.EVENTS.get(notification.method)
    try:
        return None if kind is None else msgspec.convert(notification.params, kind)
    except msgspec.ValidationError:
        return None
