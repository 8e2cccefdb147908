"""Which function carries out which method: each handler says so by its annotations."""

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, get_type_hints

from daemon.control.context import Context
from protocol.control.definition import AnyMethod, result_type

Call = TypeVar("Call", bound=AnyMethod)
Answer = TypeVar("Answer")
Handler = Callable[[Context, Call], Awaitable[Answer]]

HANDLERS: Final[dict[type[AnyMethod], Handler[Any, Any]]] = {}


def answers(handler: Handler[Call, Answer]) -> Handler[Call, Answer]:
    """Decorates the function that carries out the method which its parameter ``call`` is of. It
    gives the method's result, and raises ControlError or what the pool raises.
    """
    types = get_type_hints(handler)
    method = types["call"]
    assert method not in HANDLERS, f"{method.METHOD} has two handlers"
    assert types["return"] == result_type(method), f"{method.METHOD} answers {result_type(method)}"
    HANDLERS[method] = handler
    return handler
