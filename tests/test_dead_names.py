"""No name is dead: whatever the layers define, something in the layers uses. Tests alone do not
count. Each kind of name has a canary: a dead one that must be found.

A name of a module is used where it is loaded in that module, or in one that imports it. An
attribute (a method, a class constant, a slot, a field) is used where any attribute of that name is
loaded, of whatever object. So a dead attribute whose name lives elsewhere is not found, and nothing
that is used is reported.
"""

import ast
import importlib
import re
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

from storage.vdisks.counters import Counters

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("storage", "protocol", "daemon")
ENTRY_POINTS = {"main", "VERSION"}  # pyproject.toml names them

# Names that something outside of the layers uses, by what that is.
ON_REQUEST = "a program that uses the store may want all to be durable"
INITIATOR = "our initiator is a library, which the daemon uses in part"
CONVERTED = "all attributes together become one control row"
TLS = "for the listener once it serves TLS"
LIBRARY = {
    "protocol.nbd.connection.NbdConnection.tls_started": TLS,
    **{f"storage.vdisks.counters.Counters.{name}": CONVERTED for name in Counters.__slots__},
    "storage.pool.pool.Pool.consistency_point": ON_REQUEST,
    "protocol.iscsi.initiator.connection.InitiatorConnection.logout_requested": INITIATOR,
    "protocol.iscsi.initiator.connection.InitiatorConnection.send_targets": INITIATOR,
    "protocol.iscsi.initiator.connection.InitiatorConnection.task_management": INITIATOR,
}

Trees = dict[str, ast.Module]
GENERICS = {"Callable", "Iterator", "deque", "dict", "list", "set", "tuple", "type"}
NAME = re.compile(r"[A-Za-z_]\w*")
READERS = {"getattr", "hasattr", "attrgetter", "methodcaller"}


def modules() -> Trees:
    found = {}
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text())
    return found


def targets(node: ast.stmt) -> Iterator[str]:
    """Names that an assignment makes."""
    if isinstance(node, ast.Assign):
        each = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        each = [node.target]
    else:
        return
    for target in each:
        yield from (inner.id for inner in ast.walk(target) if isinstance(inner, ast.Name))


def body_of(block: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, those within ``if``, ``try``, ``for`` and ``with``
    included.
    """
    for node in block:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.For | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from body_of(getattr(node, part, []))


def is_registered(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A decorator that is called with arguments, as that of a command line, keeps what it gets."""
    return any(isinstance(decorator, ast.Call) for decorator in node.decorator_list)


def defined_in_module(tree: ast.Module) -> Iterator[str]:
    for node in body_of(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not is_registered(node):
                yield node.name
        elif isinstance(node, ast.ClassDef):
            yield node.name
        else:
            yield from targets(node)


def slots(node: ast.stmt) -> Iterator[str]:
    if list(targets(node)) == ["__slots__"]:
        yield from strings(node)


def records(tree: ast.Module) -> set[str]:
    """Names by which classes of a module derive from what ``is_record`` looks for."""
    names = {"Struct", "TypedDict", "NamedTuple", "Versioned"}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and is_record(node, names):
            names.add(node.name)
    return names


def is_record(node: ast.ClassDef, names: set[str]) -> bool:
    """Its fields are read as a whole: converted, serialised or unpacked."""
    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    return bool(bases & names) or any(
        isinstance(inner, ast.Attribute) and inner.attr == "__dataclass_fields__"
        for inner in ast.walk(node)
    )


def defined_in_class(node: ast.ClassDef, names: set[str]) -> Iterator[str]:
    record = is_record(node, names)
    for inner in body_of(node.body):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inner.name
        elif not (isinstance(inner, ast.AnnAssign) and record):
            yield from slots(inner)
            yield from targets(inner)


class Reads:
    """What a piece of code reads: names, attributes of whatever object, attributes by the name of
    their owner; and what a module imports: names that stand for modules, and for (module, name).
    """

    def __init__(self, tree: ast.AST, known: Container[str] = ()) -> None:
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.owned: set[tuple[str, str]] = set()
        self.modules: dict[str, str] = {}
        self.taken: dict[str, tuple[str, str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                if isinstance(node.ctx, ast.Load):
                    self.names.add(node.id)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Load):
                    self.attributes.add(node.attr)
                if isinstance(node.value, ast.Name):
                    self.owned.add((node.value.id, node.attr))
            elif isinstance(node, ast.Call):
                self._called(node)
            elif isinstance(node, ast.arg | ast.AnnAssign):
                self._annotated(node.annotation)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._annotated(node.returns)
            elif isinstance(node, ast.Subscript):
                if isinstance(node.value, ast.Name) and node.value.id in GENERICS:
                    self._annotated(node.slice)
            elif isinstance(node, ast.Import):
                self.modules |= {(each.asname or each.name): each.name for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                self._imported(node, known)

    def _called(self, node: ast.Call) -> None:
        """getattr and the like."""
        if isinstance(node.func, ast.Name) and node.func.id in READERS:
            self.attributes |= set(strings(node))

    def _annotated(self, annotation: ast.AST | None) -> None:
        """A type may be told by a string."""
        if annotation is not None:
            for text in strings(annotation):
                self.names |= set(NAME.findall(text))

    def _imported(self, node: ast.ImportFrom, known: Container[str]) -> None:
        for each in node.names:
            inner = f"{node.module}.{each.name}"
            if inner in known:
                self.modules[each.asname or each.name] = inner
            else:
                self.taken[each.asname or each.name] = (node.module or "", each.name)


def strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def uses(reads: dict[str, Reads]) -> set[tuple[str, str]]:
    """(module, name) of what is used."""
    found: set[tuple[str, str]] = set()
    for module, read in reads.items():
        found |= {(module, name) for name in read.names}
        found |= {read.taken[name] for name in read.names & read.taken.keys()}
        found |= {
            (read.modules[owner], name) for owner, name in read.owned if owner in read.modules
        }
    # What a package takes from its modules is theirs.
    return found | {
        reads[module].taken[name]
        for module, name in found
        if module in reads and name in reads[module].taken
    }


def is_special(name: str) -> bool:
    return (name.startswith("__") and name.endswith("__")) or name == "_"


def dead(trees: Trees) -> Iterator[str]:
    """Names that nothing uses, as module.name or module.class.name."""
    reads = {module: Reads(tree, trees) for module, tree in trees.items()}
    used = uses(reads)
    attributes = set[str]().union(*(read.attributes for read in reads.values()))
    for module, tree in trees.items():
        for name in set(defined_in_module(tree)):
            if (module, name) not in used and not is_special(name) and name not in ENTRY_POINTS:
                yield f"{module}.{name}"
        names = records(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for name in set(defined_in_class(node, names)) - attributes - reads[module].names:
                    if not (is_special(name) or is_inherited(module, node.name, name)):
                        yield f"{module}.{node.name}.{name}"


def is_inherited(module: str, owner: str, name: str) -> bool:
    """Whether a class from outside of the layers has the attribute, and so calls it or is asked for
    it.
    """
    try:
        found = getattr(importlib.import_module(module), owner, None)
    except ImportError:
        return False
    if found is None:
        return True  # a class within a function: its bases are not known
    return any(
        hasattr(base, name)
        for base in found.__mro__[1:]
        if base.__module__.partition(".")[0] not in LAYERS
    )


def test_no_name_is_dead() -> None:
    found = set(dead(modules())) - LIBRARY.keys()
    assert sorted(found) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("LIMIT = 1\n", {"a.LIMIT"}),
        ("LOW, HIGH = 1, 2\nprint(LOW)\n", {"a.HIGH"}),
        ("def unused(): ...\n", {"a.unused"}),
        ("class Unused: ...\n", {"a.Unused"}),
        ("class A:\n    def unused(self): ...\nA()\n", {"a.A.unused"}),
        ("class A:\n    __slots__ = ('unused', 'x')\nA().x\n", {"a.A.unused"}),
        ("class A:\n    unused: int\nA()\n", {"a.A.unused"}),
        ("class A:\n    SIZE = 1\nA()\n", {"a.A.SIZE"}),
        ("class A:\n    def set(self):\n        self.set.x = 1\n    x: int\nA()\n", {"a.A.x"}),
        ("class A:\n    def f(self): ...\n    TABLE = {1: f}\nA().TABLE\n", set()),
        ("@command()\ndef f(): ...\n", set()),
        ("class A: ...\ndef f(a: 'A'): ...\nf\n", set()),
        ("class A:\n    def f(self): ...\ngetattr(A(), 'f')\n", set()),
    ],
)
def test_what_is_dead_is_found_and_nothing_else(text: str, found: set[str]) -> None:
    assert set(dead({"a": ast.parse(text)})) == found


def test_a_name_is_used_only_by_who_imports_it() -> None:
    trees = {"a": "X = 1\nY = 2\n", "b": "from a import X\nY = X\nprint(Y)\n"}
    assert set(dead({name: ast.parse(text) for name, text in trees.items()})) == {"a.Y"}
