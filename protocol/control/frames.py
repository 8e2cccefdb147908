"""Frames: bytes to messages, messages to bytes. The one place that knows msgpack.

msgpack reads, since it can take a stream in pieces and bound what it holds; msgspec writes, since
it knows `Row` and `Method`.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgpack
import msgspec

from protocol.control.errors import FramingError
from protocol.control.limits import ITEMS_PER_PART, REQUEST_ID_MAX

REQUEST: Final = 0
RESPONSE: Final = 1
NOTIFICATION: Final = 2

_pack: Final = msgspec.msgpack.Encoder().encode


class Request(NamedTuple):
    """``[0, id, method, params]``. ``params`` is as the peer sent it: validated later, by the
    method.
    """

    request_id: int
    method: str
    params: Any


class Response(NamedTuple):
    """``[1, id, error, result]``: exactly one of the two is not None, or both are None (done,
    nothing to say).
    """

    request_id: int
    error: Any
    result: Any


class Notification(NamedTuple):
    """``[2, method, params]``: sent by the daemon to those that subscribed."""

    method: str
    params: Any


Message = Request | Response | Notification


class FrameReader:
    """Cuts a byte stream into messages. At most ``frame_bytes_max`` bytes are ever held, and
    ``items_max`` items of one array.
    """

    def __init__(self, frame_bytes_max: int, items_max: int) -> None:
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=frame_bytes_max,
            max_array_len=items_max,
            max_map_len=items_max,
            max_ext_len=0,
            raw=False,
            strict_map_key=True,
        )
        self._frame_bytes_max = frame_bytes_max

    def feed(self, data: bytes) -> Iterator[Message]:
        """Messages that ``data`` completes. Raises FramingError; after that the reader is of no
        further use.
        """
        try:
            self._unpacker.feed(data)
        except msgpack.BufferFull:
            raise FramingError(f"a frame is longer than {self._frame_bytes_max} bytes") from None
        while True:
            try:
                frame = self._unpacker.unpack()
            except msgpack.OutOfData:
                return
            except (ValueError, TypeError, msgpack.UnpackException) as error:
                raise FramingError(f"not a msgpack frame: {error}") from error
            yield _message(frame)


def _message(frame: Any) -> Message:
    if isinstance(frame, list) and frame:
        kind = frame[0]
        if kind == REQUEST and len(frame) == 4 and _is_id(frame[1]) and isinstance(frame[2], str):
            return Request(frame[1], frame[2], frame[3])
        if kind == RESPONSE and len(frame) == 4 and _is_id(frame[1]):
            return Response(frame[1], frame[2], frame[3])
        if kind == NOTIFICATION and len(frame) == 3 and isinstance(frame[1], str):
            return Notification(frame[1], frame[2])
    raise FramingError(
        "a frame is [0, id, method, params], [1, id, error, result] or [2, method, params]"
    )


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= REQUEST_ID_MAX


def encode_request(request_id: int, method: str, params: Any) -> bytes:
    """One request frame."""
    return _pack([REQUEST, request_id, method, params])


def encode_notification(method: str, params: Any) -> bytes:
    """One notification frame."""
    return _pack([NOTIFICATION, method, params])


def encode_response(request_id: int, error: Any, result: Any) -> Iterator[bytes]:
    """One response frame, in parts that each cost the event loop little: a long list is cut every
    ITEMS_PER_PART items.
    """
    if error is not None or not isinstance(result, list) or len(result) <= ITEMS_PER_PART:
        yield _pack([RESPONSE, request_id, error, result])
        return
    header_of = msgpack.Packer().pack_array_header
    head = (header_of(4), _pack(RESPONSE), _pack(request_id), _pack(None))
    yield b"".join((*head, header_of(len(result))))
    for first in range(0, len(result), ITEMS_PER_PART):
        yield b"".join(map(_pack, result[first : first + ITEMS_PER_PART]))
