"""What stands where in protocol/: the initiator is a library without the target, and a checksum is
computed in one module.
"""

import ast

import pytest

from tests.test_house_rules import ROOT
from tests.test_imports import Graph, graph_of

INITIATOR = "protocol.iscsi.initiator"
TARGET = {
    "protocol.iscsi.connection",
    "protocol.iscsi.login",
    "protocol.iscsi.node",
    "protocol.iscsi.session",
    "protocol.scsi.logical_unit",
}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
        for path in (ROOT / "protocol").rglob("*.py")
    }


def reached(graph: Graph, begin: set[str]) -> set[str]:
    """Modules that are imported, whatever in between."""
    found, left = set[str](), begin
    while left:
        found |= left
        left = set[str]().union(*(graph[name] for name in left)) - found
    return found


def test_the_initiator_imports_nothing_of_the_target(texts: dict[str, str]) -> None:
    graph = graph_of(texts)
    assert graph.keys() >= TARGET
    own = {name for name in graph if name.startswith(INITIATOR)}
    assert len(own) > 4 and not reached(graph, own) & TARGET


def test_crc32c_is_imported_in_one_module(texts: dict[str, str]) -> None:
    users = {
        name
        for name, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom) and "crc32c" in ast.unparse(node)
    }
    assert users == {"protocol.iscsi.framing"}
