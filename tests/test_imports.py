"""What imports what: no circle anywhere, type-only imports included, and one order of the rooms
within each layer. Each rule has a canary: a module that breaks it and must be found.
"""

import ast
import graphlib
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("storage", "protocol", "daemon")

# The rooms of each layer from the ground up. A module imports from its own room and from those
# below it. What stands in a layer's folder itself has its place by its name.
ORDER = {
    "storage": (
        "storage.errors",
        "storage.checksum",
        "storage.layout",
        "storage.fields",
        "storage.slicer",
        "storage.device",
        "storage.check",
        "storage.superblock",
        "storage.tree",
        "storage.epoch",
        "storage.state",
        "storage.allocation",
        "storage.log",
        "storage.images",
        "storage.data",
        "storage.consistency",
        "storage.backdoor",
        "storage.vdisks",
        "storage.split",
        "storage.pool",
    ),
    "protocol": (
        "protocol.names",
        "protocol.volume",
        "protocol.turns",
        "protocol.control",
        "protocol.scsi",
        "protocol.scsi.commands",
        "protocol.scsi.dispatch",
        "protocol.iscsi",
        "protocol.iscsi.initiator",
        "protocol.nbd",
    ),
    "daemon": (
        "daemon",
        "daemon.process",
        "daemon.admin",  # as a client it knows nothing of the rooms of the server
        "daemon.pool",
        "daemon.targets",
        "daemon.tcp",
        "daemon.iscsi",
        "daemon.nbd",
        "daemon.control",
        "daemon.server",
        "daemon.cli",
        "daemon.demo",
    ),
}

Graph = dict[str, set[str]]


def imported(tree: ast.Module, modules: Iterable[str]) -> set[str]:
    """The modules of ours that a module imports, wherever in it, for types alone included."""
    known = set(modules)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found & known


def graph_of(texts: dict[str, str]) -> Graph:
    """Module by module what it imports."""
    return {name: imported(ast.parse(text), texts) - {name} for name, text in texts.items()}


def circle(graph: Graph) -> list[str]:
    """The modules of one circle, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def room_of(module: str, order: tuple[str, ...]) -> int:
    """The place of a module in the order of its layer. Raises StopIteration when it has none."""
    inner = [room for room in order if module == room or module.startswith(f"{room}.")]
    return order.index(max(inner, key=len))


def upward(graph: Graph, order: tuple[str, ...]) -> list[str]:
    """Imports from a room above the module's own."""
    layer = order[0].split(".", 1)[0]
    return [
        f"{module} imports {other}"
        for module in sorted(graph)
        for other in sorted(graph[module])
        if module != layer
        and other.split(".", 1)[0] == layer == module.split(".", 1)[0]
        and room_of(other, order) > room_of(module, order)
    ]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    found = {}
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text()
    assert len(found) > 100
    return found


def test_nothing_imports_itself_in_a_circle(texts: dict[str, str]) -> None:
    assert circle(graph_of(texts)) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_rooms_stand_on_each_other_in_one_order(layer: str, texts: dict[str, str]) -> None:
    graph = graph_of(texts)
    assert upward(graph, ORDER[layer]) == []
    rooms = {name for name in graph if name.startswith(f"{layer}.") and name.count(".") == 1}
    assert rooms - set(ORDER[layer]) == set(), "a room without a place in the order"


def test_no_import_is_for_types_alone(texts: dict[str, str]) -> None:
    """An import that only a type checker sees would hide what a module depends on."""
    assert [name for name, text in texts.items() if "TYPE_CHECKING" in text] == []


def test_a_circle_is_found_also_through_types() -> None:
    texts = {
        "storage.a": "from storage import b\n",
        "storage.b": "if TYPE_CHECKING:\n    from storage.a import A\n",
    }
    assert set(circle(graph_of(texts))) == {"storage.a", "storage.b"}


def test_an_import_from_above_is_found() -> None:
    texts = {"storage.tree.node": "from storage.pool import Pool\n", "storage.pool": ""}
    found = upward(graph_of(texts), ORDER["storage"])
    assert found == ["storage.tree.node imports storage.pool"]
