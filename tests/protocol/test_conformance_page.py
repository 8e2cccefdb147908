"""docs/conformance.md names every key, PDU, command and page that the code has, no others, and
tests that exist.
"""

import re
from pathlib import Path

from protocol.iscsi import keys, pdu
from protocol.scsi import dispatch
from protocol.scsi.commands import identity, log, mode

HERE = Path(__file__).resolve().parent
PAGE = (HERE.parents[1] / "docs" / "conformance.md").read_text()
STATES = {"supported", "partial", "refused"}
# What login handles itself, and what is text in the full feature phase only.
OTHER_KEYS = {
    "AuthMethod",
    "CHAP_A",
    "CHAP_N, CHAP_R, CHAP_I, CHAP_C",
    "SendTargets",
    "TargetAlias",
    "TargetAddress",
    "TargetPortalGroupTag",
    "any other",
}


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading."""
    body = PAGE.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    table = [line for line in body.splitlines() if line.startswith("| ")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table[1:]
        if len(line.split("|")) > 4
    ]


def pages(kind: str) -> list[int]:
    return [
        int(code, 16) for code in re.findall(rf"^\| {kind} ([0-9A-F]{{2}})h \|", PAGE, re.MULTILINE)
    ]


def test_every_key():
    named = {row[0] for row in rows("iSCSI keys")}
    assert named == keys.OPERATIONAL.keys() | keys.DECLARED_FIRST | OTHER_KEYS


def test_every_pdu():
    opcodes = {
        value
        for name, value in vars(pdu).items()
        if name.endswith(("_REQUEST", "_RESPONSE", "_COMMAND", "_OUT", "_IN"))
        or name in {"R2T", "ASYNC_MESSAGE", "REJECT"}
    }
    assert {int(row[0].rstrip("h"), 16) for row in rows("PDUs")} == opcodes
    assert len(opcodes) == 18


def test_every_command():
    wanted = [
        (
            f"{command.opcode:02X}h"
            + ("" if command.service_action is None else f"/{command.service_action:02X}h"),
            command.name,
        )
        for command in sorted(
            dispatch.TABLE.commands,
            key=lambda command: (command.opcode, command.service_action or 0),
        )
    ]
    assert [(row[0], row[1]) for row in rows("SCSI commands")] == wanted


def test_every_page():
    assert pages("VPD") == sorted(identity.PAGES)
    assert pages("mode") == [page.code for page in mode.PAGES]
    assert pages("log") == sorted((log.SUPPORTED_PAGES, *log.PAGES))


def test_every_row_has_a_state_and_tests_that_exist():
    source = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    known = set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
    for heading, state_at in (("iSCSI keys", 1), ("PDUs", 2), ("SCSI commands", 2)):
        for row in rows(heading):
            assert row[state_at] in STATES, row
            named = re.findall(r"`(test_\w+)`", row[-1])
            assert named or row[0] == "TargetAlias", row
            assert set(named) <= known, row
