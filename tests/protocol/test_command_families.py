"""Every module of protocol/scsi/commands is a family that the dispatcher lists, or what families
use, under a name that says whose.
"""

import ast
from pathlib import Path

import pytest

from protocol.scsi import dispatch, opcodes
from protocol.scsi.command import Command, CommandTable
from protocol.scsi.plan import Reply
from tests.test_imports import imported

ROOM = "protocol.scsi.commands"
FOLDER = Path(dispatch.__file__).parent / "commands"
TREES = {
    path.stem: ast.parse(path.read_text())
    for path in FOLDER.glob("*.py")
    if path.stem != "__init__"
}
FAMILIES = {
    name
    for name, tree in TREES.items()
    for node in tree.body
    if (isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "COMMANDS")
    or (isinstance(node, ast.FunctionDef) and node.name == "commands")
}


def modules_of(tree: ast.Module) -> set[str]:
    """What a module imports of the room."""
    found = imported(tree, [f"{ROOM}.{name}" for name in TREES])
    return {name.rpartition(".")[2] for name in found}


def test_the_dispatcher_lists_every_family() -> None:
    tree = ast.parse(Path(dispatch.__file__).read_text())
    assert modules_of(tree) == FAMILIES and len(FAMILIES) > 10


def test_what_is_no_family_is_named_for_the_one_that_uses_it() -> None:
    for helper in TREES.keys() - FAMILIES:
        users = {name for name, tree in TREES.items() if helper in modules_of(tree)}
        owners = {name for name in FAMILIES if helper.startswith(f"{name}_")}
        assert users == owners or (len(users) > 1 and not owners), f"{helper}: {users}"


def test_every_operation_code_has_a_command() -> None:
    """And is told in no other place than opcodes.py, as rows begin with it."""
    named = {
        value
        for name, value in vars(opcodes).items()
        if name.isupper() and name not in {"READ_CAPACITY_16", "GET_LBA_STATUS"}
    }
    assert named == {command.opcode for command in dispatch.TABLE.commands}


@pytest.mark.parametrize("action", [None, 1])
def test_two_commands_that_one_cdb_tells_are_refused(action: int | None) -> None:
    table = CommandTable()
    row = Command(0x55, "ONE", "000000", lambda _: Reply(), service_action=1)
    table.add([row])
    with pytest.raises(AssertionError):
        table.add([Command(0x55, "OTHER", "000000", lambda _: Reply(), service_action=action)])
