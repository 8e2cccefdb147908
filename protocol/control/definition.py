"""What a method of the control socket is: one class, from which everything else about it follows.

    class VdiskShow(Method[rows.VdiskDetail], frozen=True, kw_only=True):
        \"\"\"Show one vdisk in full.\"\"\"

        METHOD = "vdisk.show"

        name: Name

The class is the method, and an instance is a call of it: METHOD is its name on the wire, the fields
are its parameters with their checks, the type in brackets is its result, and the first paragraph of
the docstring is its description. Sizes are bytes, rates are bytes a second.
"""

from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin

import msgspec

from protocol.control.rows import Row

Result = TypeVar("Result")


class Method(
    msgspec.Struct,
    Generic[Result],
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,  # a misspelt parameter must not be silently ignored
    omit_defaults=True,  # an older daemon does not know newer parameters
):
    """Base of all methods. ``METHOD`` is the name on the wire, NOUN.VERB as `cleavectl` has it."""

    METHOD: ClassVar[str]


AnyMethod = Method[Any]


def summary_of(method: type[AnyMethod]) -> str:
    """The first paragraph of the docstring as a phrase: no capital, no full stop."""
    sentence = " ".join((method.__doc__ or "").split("\n\n")[0].split()).removesuffix(".")
    return sentence[:1].lower() + sentence[1:]


def result_type(method: type[Method[Result]]) -> type[Result]:
    """The type of the result: a `Row` or a list of one kind of them (of plain values for a few)."""
    (result,) = get_args(method.__orig_bases__[0])  # type: ignore[attr-defined]  # Generic's own
    found: type[Result] = result
    return found


def row_type(method: type[AnyMethod]) -> type[Row]:
    """The kind of row that the result is, or is a list of."""
    result: Any = result_type(method)
    found: Any = get_args(result)[0] if get_origin(result) is list else result
    assert isinstance(found, type) and issubclass(found, Row), f"{method.METHOD} answers no rows"
    row: type[Row] = found
    return row
