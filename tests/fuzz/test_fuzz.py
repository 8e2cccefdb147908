"""A slice of the fuzzer, and the canaries: bugs planted in each layer that the fuzzer must find
within a few executions.
"""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from protocol.iscsi import chap
from protocol.iscsi.framing import ReceiveBuffer
from protocol.iscsi.login import LoginPhase
from protocol.scsi.commands import extended_copy
from protocol.scsi.limits import SECTOR_SHIFT
from tests.fuzz import guided
from tests.fuzz.chance import GivenChance
from tests.fuzz.guided import INPUT_BYTES_MAX
from tests.fuzz.run import replay_command, search
from tests.fuzz.surfaces import SURFACES

SEED = 20261122
# Executions that take a few seconds per surface.
SLICE = {"cdbs": 1500, "parameters": 1500, "login_text": 400, "login_chap": 400, "framing": 200}
# The fuzzer must find a planted bug within this number of executions.
CANARY_EXECUTIONS_MAX = 3000
GIVEN_EXECUTIONS = 2000


@pytest.mark.parametrize("name", SURFACES)
def test_a_slice_finds_nothing(name: str) -> None:
    finding = search(SEED, name, SURFACES[name], 0, SLICE[name])
    assert finding is None, f"{finding}; replay: {replay_command(SEED, name, finding.number)}"


def _no_range_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "protocol.scsi.commands.block.check_range",
        lambda _, lba, sectors: (lba << SECTOR_SHIFT, sectors << SECTOR_SHIFT),
    )


def _no_list_length_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extended_copy, "_check_segments", lambda _: None)


def _text_decoded_without_care(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = LoginPhase.handle

    def careless(self: LoginPhase, request: Any) -> Any:
        bytes(request.data).decode("ascii")
        return handle(self, request)

    monkeypatch.setattr(LoginPhase, "handle", careless)


def _numbers_read_without_care(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chap, "parse_identifier", int)


def _a_tail_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: ReceiveBuffer) -> None:
        self.start = self.end = 0

    monkeypatch.setattr(ReceiveBuffer, "compact", forgetful)


CANARIES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "cdbs": _no_range_check,
    "parameters": _no_list_length_check,
    "login_text": _text_decoded_without_care,
    "login_chap": _numbers_read_without_care,
    "framing": _a_tail_that_is_lost,
}


@pytest.mark.parametrize("name", SURFACES)
def test_a_planted_bug_is_found_and_replays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    CANARIES[name](monkeypatch)
    finding = search(SEED, name, SURFACES[name], 0, CANARY_EXECUTIONS_MAX)
    assert finding is not None
    again = search(SEED, name, SURFACES[name], finding.number, 1)
    assert again is not None and type(again.error) is type(finding.error)


@pytest.mark.parametrize("name", SURFACES)
def test_given_bytes_decide_and_find_a_planted_bug(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [
        Random(f"{SEED}/{name}/{number}").randbytes(INPUT_BYTES_MAX)
        for number in range(GIVEN_EXECUTIONS)
    ]
    for data in (b"", b"\xff" * INPUT_BYTES_MAX, *inputs[:20]):
        SURFACES[name](GivenChance(data))
    CANARIES[name](monkeypatch)
    failing = next(data for data in inputs if outcome(name, data) is not None)
    assert type(outcome(name, failing)) is type(outcome(name, failing))


def outcome(name: str, data: bytes) -> Exception | None:
    """Return the exception that an execution of the given bytes raises, if any."""
    try:
        SURFACES[name](GivenChance(data))
    except Exception as error:
        return error
    return None


def test_without_the_driver_a_guided_run_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["guided", "--count", "1"])
    assert guided.main() == 0 and capsys.readouterr().out.strip() == guided.MISSING


def test_an_input_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(guided.NAMES) == SURFACES.keys()
    (tmp_path / "input").write_bytes(bytes(100))
    monkeypatch.setattr(
        sys, "argv", ["guided", "--surface", "cdbs", "--replay", str(tmp_path / "input")]
    )
    assert guided.main() == 0 and "no longer fails" in capsys.readouterr().out


def test_the_seed_comes_first_and_decides() -> None:
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.run",
        "--seed",
        "5",
        "--count",
        "20",
        "--surface",
        "cdbs",
    ]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[0] == "seed 5" and re.search(
        r"cdbs +20 executions", done.stdout
    )
