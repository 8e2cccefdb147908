"""Carries out calls: finds the handler of a method, and gives errors of the pool their codes."""

from collections.abc import Mapping
from typing import Any, Final

from daemon.control.answering import HANDLERS
from daemon.control.context import Context
from daemon.control.handlers import (  # noqa: F401 -- each registers its functions
    access,
    pool,
    sessions,
    splits,
    vdisks,
)
from protocol.control import errors
from protocol.control.definition import AnyMethod
from protocol.control.errors import ControlError
from storage.errors import (
    BlockDamaged,
    Conflict,
    DeviceFailed,
    NotFound,
    OutOfRange,
    PoolFull,
    PoolReadOnly,
    RequestError,
    StorageError,
    VolumeClosed,
)

# Most specific first: the first class that fits gives the code.
ERROR_CODES: Final[Mapping[type[StorageError], str]] = {
    NotFound: errors.NOT_FOUND,
    Conflict: errors.CONFLICT,
    OutOfRange: errors.OUT_OF_RANGE,
    RequestError: errors.INVALID_PARAMS,
    PoolFull: errors.POOL_FULL,
    PoolReadOnly: errors.READ_ONLY,
    VolumeClosed: errors.CLOSING,
    BlockDamaged: errors.DAMAGED,
    DeviceFailed: errors.DEVICE_FAILED,
    StorageError: errors.FAILED,
}


def control_error(error: StorageError) -> ControlError:
    """The protocol's error for one of the pool's."""
    code = next(code for kind, code in ERROR_CODES.items() if isinstance(error, kind))
    return ControlError(code, str(error))


class ControlService:
    """All methods, on one daemon."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def call(self, call: AnyMethod) -> Any:
        """The result of one call. Raises ControlError, and nothing else that the pool raises on
        purpose.
        """
        try:
            return await HANDLERS[type(call)](self._context, call)
        except StorageError as error:
            raise control_error(error) from error
