"""From a request to a typed call: the table of all methods, the check of a request's parameters,
and the description of all that ``rpc.list`` answers.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from protocol.control import methods
from protocol.control.definition import AnyMethod, Method, summary_of
from protocol.control.errors import INVALID_PARAMS, UNKNOWN_METHOD, ControlError
from protocol.control.parameters import PATTERN_WORDS
from protocol.control.rows import MethodDescription, ParameterDescription

METHODS: Final[Mapping[str, type[AnyMethod]]] = {
    found.METHOD: found
    for found in vars(methods).values()
    if isinstance(found, type) and issubclass(found, Method) and found is not Method
}


def validate(name: str, params: Any) -> AnyMethod:
    """The call that a request stands for. Raises ControlError (UNKNOWN_METHOD, INVALID_PARAMS) with
    a sentence on what would be right.
    """
    method = METHODS.get(name)
    if method is None:
        raise ControlError(
            UNKNOWN_METHOD, f"there is no method {name!r}", "rpc.list names them all"
        )
    try:
        return msgspec.convert(_named(params), method)
    except msgspec.ValidationError as error:
        raise ControlError(
            INVALID_PARAMS, f"{name}: {_in_words(str(error))}", f"{name} takes {_signature(method)}"
        ) from None


def _in_words(message: str) -> str:
    """What a pattern says, instead of the pattern that msgspec shows."""
    for pattern, words in PATTERN_WORDS.items():
        message = message.replace(f"`str` matching regex {pattern!r}", words)
    return message


def _named(params: Any) -> Any:
    """The map of parameters: itself, or the only item of an array; nothing counts as an
    empty one.
    """
    if params is None or params == []:
        return {}
    if isinstance(params, list) and len(params) == 1:
        return params[0]
    return params


def _signature(method: type[AnyMethod]) -> str:
    fields = msgspec.structs.fields(method)
    if not fields:
        return "no parameters"
    return ", ".join(
        field.encode_name if field.required else f"[{field.encode_name}]" for field in fields
    )


def describe() -> list[MethodDescription]:
    """The answer to ``rpc.list``."""
    return [
        MethodDescription(method=name, summary=summary_of(method), params=_parameters(method))
        for name, method in METHODS.items()
    ]


def _parameters(method: type[AnyMethod]) -> list[ParameterDescription]:
    _, components = msgspec.json.schema_components([method])
    found = components[method.__name__]
    return [
        ParameterDescription(name=name, required=name in found["required"], schema=schema)
        for name, schema in found["properties"].items()
    ]
