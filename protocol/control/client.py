"""The client's side of a control connection, sans-IO."""

import itertools
from collections.abc import Iterator
from typing import Any

from protocol.control.errors import FramingError
from protocol.control.frames import FrameReader, Notification, Request, Response, encode_request
from protocol.control.limits import PROTOCOL_VERSION, RESPONSE_BYTES_MAX, RESPONSE_ITEMS_MAX


class ClientConnection:
    """Numbers requests and cuts the daemon's bytes into responses and notifications."""

    def __init__(self) -> None:
        self._reader = FrameReader(RESPONSE_BYTES_MAX, RESPONSE_ITEMS_MAX)
        self._ids = itertools.count(1)  # 0 is what the daemon answers to bytes that are no request

    def hello(self, client: str) -> tuple[int, bytes]:
        """The first request: its id and its bytes."""
        return self.request("hello", {"client": client, "protocol": PROTOCOL_VERSION})

    def request(self, method: str, params: dict[str, Any]) -> tuple[int, bytes]:
        """One request: its id and its bytes."""
        request_id = next(self._ids)
        return request_id, encode_request(request_id, method, params)

    def receive(self, data: bytes) -> Iterator[Response | Notification]:
        """Messages that ``data`` completes. Raises FramingError when the other side is not a daemon
        of this kind.
        """
        for message in self._reader.feed(data):
            if isinstance(message, Request):
                raise FramingError("the daemon sends no requests")
            yield message
