"""A blocking client of the control socket."""

import os
import select
import socket
from typing import Final, Self

from protocol.control.client_connection import ClientConnection, event_in, hello, result_in
from protocol.control.definition import Method, Result
from protocol.control.errors import ControlError, FramingError
from protocol.control.frames import Notification, Response
from protocol.control.rows import Row

RECEIVE_BYTES: Final = 1 << 18


class Unreachable(Exception):
    """No daemon answers at the control path; the message says why and what to do."""


class ControlClient:
    """One connection to the daemon. Calls are answered one after the other; notifications between
    are kept.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection = ClientConnection()
        self._notifications: list[Notification] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise Unreachable(
                f"no daemon answers at {path}: {error.strerror or error}; start it (cleaved serve),"
                " or name its socket with --control"
            ) from error
        try:
            self.call(hello(f"cleavectl[{os.getpid()}]"))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def call(self, call: Method[Result]) -> Result:
        """The result. Raises ControlError when the daemon refuses, Unreachable when it
        goes away.
        """
        return result_in(self._response(*self._connection.request(call)), type(call))

    def event(self, timeout_seconds: float) -> Row | None:
        """What the next notification carries, or None when none came in time. Raises Unreachable
        when the daemon goes away.
        """
        if not self._notifications and select.select([self._socket], [], [], timeout_seconds)[0]:
            self._notifications += [
                message for message in self._receive() if isinstance(message, Notification)
            ]
        return event_in(self._notifications.pop(0)) if self._notifications else None

    def _response(self, request_id: int, request: bytes) -> Response:
        try:
            self._socket.sendall(request)
        except OSError as error:
            raise Unreachable(
                f"the daemon at {self._path} closed the connection: {error.strerror or error}"
            ) from error
        while True:
            answer: Response | None = None
            for message in self._receive():
                if isinstance(message, Notification):
                    self._notifications.append(message)
                elif message.request_id == request_id:
                    answer = message
                elif message.error is not None:
                    raise ControlError.from_object(message.error)
            if answer is not None:
                return answer

    def _receive(self) -> list[Response | Notification]:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
            if not data:
                raise Unreachable(
                    f"the daemon at {self._path} closed the connection; its log says why"
                )
            return list(self._connection.receive(data))
        except OSError as error:
            raise Unreachable(
                f"the daemon at {self._path} does not answer: {error.strerror or error}"
            ) from error
        except FramingError as error:
            raise Unreachable(f"what answers at {self._path} is no cleaved: {error}") from error
