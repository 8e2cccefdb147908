"""The table of keys in docs/operations.md, made from the definitions of methods and rows.

python -m tests.daemon.document_keys       writes it anew
"""

from collections.abc import Iterator
from typing import Any, Final, Literal, get_args, get_origin

import msgspec

from daemon.admin.client_lines import ClientLines
from protocol.control.calls import METHODS
from protocol.control.definition import AnyMethod, result_type, row_type
from protocol.control.methods import Connect, Hello, ListMethods, Subscribe
from protocol.control.rows import COUNTERS, CheckReport, NewPool, Row, metas_of
from tests.daemon.programs import ROOT

PAGE: Final = ROOT / "docs" / "operations.md"
BEGIN: Final = "<!-- keys: made by tests/daemon/document_keys.py -->\n"
END: Final = "<!-- end of keys -->\n"
HEAD: Final = "| command | document |\n|---|---|\n"
# No commands of `cleavectl`.
WITHOUT_COMMAND: Final = {Hello, ListMethods, Subscribe}
# What commands print that is not, or not only, what one method answers.
OTHER_DOCUMENTS: Final[tuple[tuple[str, type[Row]], ...]] = (
    ("`cleaved create`", NewPool),
    ("`cleaved check`", CheckReport),
)
PRINTED: Final[dict[type[AnyMethod], type[Row]]] = {Connect: ClientLines}


def documents() -> dict[type[Row], list[str]]:
    """The commands that print each kind of row."""
    found: dict[type[Row], list[str]] = {}
    for method in METHODS.values():
        if method not in WITHOUT_COMMAND:
            kind = PRINTED.get(method) or row_type(method)
            found.setdefault(kind, []).append(command(method))
    for words, kind in OTHER_DOCUMENTS:
        found.setdefault(kind, []).append(words)
    return found


def command(method: type[AnyMethod]) -> str:
    """`vdisk ls` (a list)"""
    words = method.METHOD.replace(".", " ").replace("_", " --")
    return f"`{words}`" + (" (a list)" if get_origin(result_type(method)) is list else "")


def keys(kind: type[Row]) -> str:
    """`a, b` (what b says), `c`"""
    return ", ".join(groups(kind))


def groups(kind: type[Row]) -> Iterator[str]:
    """Keys up to the next one that has a description."""
    group: list[str] = []
    metas = metas_of(kind)
    for field in msgspec.structs.fields(kind):
        group.append(field.encode_name)
        words = metas[field.encode_name].description or one_of(field.type)
        if words:
            yield f"`{', '.join(group)}` ({words})"
            group = []
    if group:
        yield f"`{', '.join(group)}`"


def one_of(kind: Any) -> str:
    """What the literals are, where it is one of several."""
    literals = [inner for inner in (kind, *get_args(kind)) if get_origin(inner) is Literal]
    values = [value for literal in literals for value in get_args(literal)]
    if not values or not all(isinstance(value, str) for value in values):
        return ""
    return f"{', '.join(values[:-1])} or {values[-1]}"


def table() -> str:
    lines = [f"| {', '.join(commands)} | {keys(kind)} |" for kind, commands in documents().items()]
    lines.append(f"| `stats --watch` | `{', '.join(COUNTERS)}`: a second |")
    return HEAD + "".join(f"{line}\n" for line in lines)


def written() -> str:
    """What stands in the page."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, "the marks are gone"
    PAGE.write_text(before + begin + table() + end + after)


if __name__ == "__main__":
    main()
