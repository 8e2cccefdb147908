"""Errors of the control protocol. What travels is ``{code, message, next_step?}``; the codes are
stable.

Two branches: ControlError is an answer to one request, FramingError ends the connection (the stream
cannot be followed any further). ``EXIT_CODES`` maps each code to the exit status of `cleavectl`.
"""

from collections.abc import Mapping
from typing import Any, Final

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NOT_FOUND: Final = 3
EXIT_CONFLICT: Final = 4
EXIT_UNREACHABLE: Final = 5

FAILED: Final = "failed"
INTERNAL: Final = "internal"
INVALID_PARAMS: Final = "invalid_params"
INVALID_REQUEST: Final = "invalid_request"
UNKNOWN_METHOD: Final = "unknown_method"
HELLO_FIRST: Final = "hello_first"
TOO_MANY_REQUESTS: Final = "too_many_requests"
NOT_FOUND: Final = "not_found"
CONFLICT: Final = "conflict"
OUT_OF_RANGE: Final = "out_of_range"
POOL_FULL: Final = "pool_full"
READ_ONLY: Final = "read_only"
DAMAGED: Final = "damaged"
DEVICE_FAILED: Final = "device_failed"
CLOSING: Final = "closing"

EXIT_CODES: Final[Mapping[str, int]] = {
    FAILED: EXIT_FAILED,
    INTERNAL: EXIT_FAILED,
    INVALID_PARAMS: EXIT_USAGE,
    INVALID_REQUEST: EXIT_USAGE,
    UNKNOWN_METHOD: EXIT_USAGE,
    HELLO_FIRST: EXIT_USAGE,
    TOO_MANY_REQUESTS: EXIT_FAILED,
    NOT_FOUND: EXIT_NOT_FOUND,
    CONFLICT: EXIT_CONFLICT,
    OUT_OF_RANGE: EXIT_USAGE,
    POOL_FULL: EXIT_FAILED,
    READ_ONLY: EXIT_FAILED,
    DAMAGED: EXIT_FAILED,
    DEVICE_FAILED: EXIT_FAILED,
    CLOSING: EXIT_UNREACHABLE,
}


class ControlError(Exception):
    """The answer to one request is an error; the connection goes on."""

    def __init__(self, code: str, message: str, next_step: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.next_step = next_step

    @property
    def exit_code(self) -> int:
        """Exit status of `cleavectl`. A code of a newer daemon that is not known here counts as
        failed.
        """
        return EXIT_CODES.get(self.code, EXIT_FAILED)

    def as_object(self) -> dict[str, str]:
        """What travels in the error place of a response."""
        found = {"code": self.code, "message": self.message}
        if self.next_step is not None:
            found["next_step"] = self.next_step
        return found

    @classmethod
    def from_object(cls, found: Any) -> "ControlError":
        """From the error place of a response; a peer's odd object becomes an error that
        shows it.
        """
        if (
            not isinstance(found, dict)
            or not isinstance(found.get("code"), str)
            or not isinstance(found.get("message"), str)
        ):
            return cls(FAILED, f"the daemon sent an error of an unknown form: {found!r}")
        next_step = found.get("next_step")
        return cls(
            found["code"], found["message"], next_step if isinstance(next_step, str) else None
        )


class FramingError(Exception):
    """The peer's bytes are no frames of this protocol, or exceed a limit: close the connection."""
