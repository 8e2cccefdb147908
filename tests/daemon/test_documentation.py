"""docs/operations.md is complete: every event, option, command and error code that the code has
stands in it.
"""

import re

import click
import pytest

from daemon.admin.cli import cleavectl
from daemon.iscsi.listener import IscsiListener
from daemon.nbd.listener import NbdListener
from daemon.pool.events import EVENT_LEVELS
from daemon.process.config import (
    ChapSection,
    ControlSection,
    IscsiSection,
    LogSection,
    NbdSection,
    PoolSection,
)
from protocol.control.calls import METHODS
from protocol.control.errors import EXIT_CODES
from storage.layout import SPLIT_STATES
from tests.daemon import document_keys
from tests.daemon.programs import ROOT

LAYERS = ("storage", "daemon")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
EMITTERS = re.compile(
    r"(?:on_event|log_event|log(?:\(\))?\.(?:info|warning|error)|Repeats)\("
    r'\s*f?"([a-z_]+\.[a-z_{]+)'
)
# Events that each protocol has by its own name.
OF_A_PROTOCOL = re.compile(r'f"\{[\w.]*protocol\}\.([a-z_]+)"')
PROTOCOLS = (IscsiListener.protocol, NbdListener.protocol)


def events() -> list[str]:
    texts = [path.read_text() for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    found = {name for text in texts for name in EMITTERS.findall(text)}
    found |= {
        f"{protocol}.{name}"
        for text in texts
        for name in OF_A_PROTOCOL.findall(text)
        for protocol in PROTOCOLS
    }
    # Names made of a split's state.
    return sorted(
        (found - {"split.{"})
        | {f"split.{state}" for state in SPLIT_STATES if state != "none"}
        | EVENT_LEVELS.keys()
    )


def test_the_search_finds_events_of_both_layers() -> None:
    expected = {"pool.opened", "daemon.ready", "split.paused", "iscsi.failed", "iscsi.refused"}
    assert expected <= set(events())


@pytest.mark.parametrize("event", events())
def test_every_event_is_documented(event: str) -> None:
    assert f"`{event}`" in OPERATIONS


@pytest.mark.parametrize("code", sorted(EXIT_CODES))
def test_every_error_code_is_documented(code: str) -> None:
    assert re.search(rf"\b{code}\b", OPERATIONS)


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("pool", PoolSection.__struct_fields__),
        ("iscsi", IscsiSection.__struct_fields__),
        ("iscsi.chap", ChapSection.__struct_fields__),
        ("nbd", NbdSection.__struct_fields__),
        ("control", ControlSection.__struct_fields__),
        ("log", LogSection.__struct_fields__),
    ],
)
def test_every_option_is_documented(section: str, fields: tuple[str, ...]) -> None:
    for field in fields:
        assert f"`{section}.{field}" in OPERATIONS or f"`.{field}`" in OPERATIONS, field


def test_the_table_of_keys_is_that_of_the_definitions() -> None:
    assert document_keys.written() == document_keys.table(), (
        "write it anew: python -m tests.daemon.document_keys"
    )


def commands(group: click.Group) -> dict[str, click.Command]:
    context = click.Context(group)
    found = {name: group.get_command(context, name) for name in group.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def test_every_command_is_documented() -> None:
    for name, command in commands(cleavectl).items():
        assert re.search(rf"`{name}\b", OPERATIONS), name
        for subcommand in commands(command) if isinstance(command, click.Group) else ():
            assert re.search(rf"\b{subcommand}\b", OPERATIONS), f"{name} {subcommand}"


def test_every_method_has_a_command_of_its_name() -> None:
    for method in set(METHODS.values()) - document_keys.WITHOUT_COMMAND:
        *groups, name = method.METHOD.partition("_")[0].split(".")
        found: click.Command = cleavectl
        for words in (*groups, name):
            assert isinstance(found, click.Group)
            assert words in commands(found), method.METHOD
            found = commands(found)[words]
