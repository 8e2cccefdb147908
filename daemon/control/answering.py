"""Which function carries out which method."""

from collections.abc import Awaitable, Callable
from typing import Any, Final, get_type_hints

from daemon.control.context import Context
from protocol.control.definition import AnyMethod, Method, Result, result_type

Handler = Callable[[Context, Any], Awaitable[Result]]

HANDLERS: Final[dict[type[AnyMethod], Handler[Any]]] = {}


def answers(method: type[Method[Result]]) -> Callable[[Handler[Result]], Handler[Result]]:
    """Decorates the function that carries out a method: it takes the call, gives the method's
    result, and raises ControlError or what the pool raises.
    """

    def register(handler: Handler[Result]) -> Handler[Result]:
        types = get_type_hints(handler)
        assert types["call"] is method, f"the handler of {method.METHOD} takes another call"
        assert types["return"] == result_type(method), f"{method.METHOD} has another result"
        assert method not in HANDLERS, f"{method.METHOD} has two handlers"
        HANDLERS[method] = handler
        return handler

    return register
