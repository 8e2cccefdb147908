"""The log's two forms, in a process of their own: the configuration is the process's."""

import json
import re
import sys

import pytest

from daemon.process.logs import Repeats
from tests.daemon.programs import run

PROGRAM = """
import logging, sys
from daemon.process import logs
logs.set_up(*sys.argv[1:])
logs.get_log().debug("test.debug")
logs.get_log().info("test.info", size_bytes=5)
logging.getLogger("asyncio").warning("slow %s", "callback")
def divide(secret):
    return 1 / 0
try:
    divide("hunter" + str(2))
except ZeroDivisionError as error:
    logs.get_log().error("test.error", exc_info=error)
"""


async def test_json_lines() -> None:
    result = await run(sys.executable, "-c", PROGRAM, "info", "json")
    assert (result.status, result.output) == (0, "")
    info, python, error = map(json.loads, result.messages.splitlines())
    assert (info["event"], info["level"], info["size_bytes"]) == ("test.info", "info", 5)
    assert info["timestamp"].endswith("Z")
    assert (python["event"], python["level"], python["logger"], python["message"]) == (
        "python.log",
        "warning",
        "asyncio",
        "slow callback",
    )
    assert "ZeroDivisionError" in error["exception"]


@pytest.mark.parametrize(
    ("level", "lines"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
async def test_levels(level: str, lines: int) -> None:
    result = await run(sys.executable, "-c", PROGRAM, level, "json")
    assert len(result.messages.splitlines()) == lines


async def test_text() -> None:
    result = await run(sys.executable, "-c", PROGRAM, "info", "text")
    assert "test.info" in result.messages
    assert "size_bytes=5" in result.messages
    assert "{" not in result.messages.splitlines()[0]


@pytest.mark.parametrize("form", ["json", "text"])
async def test_local_variables_stay_out_of_the_log(form: str) -> None:
    result = await run(sys.executable, "-c", PROGRAM, "info", form)
    assert "ZeroDivisionError" in result.messages
    assert "hunter2" not in result.messages


def test_repeats_are_told_once_in_so_many_ticks(capsys: pytest.CaptureFixture[str]) -> None:
    repeats = Repeats("some.event", ticks=3)
    told = []
    for _ in range(6):
        for _ in range(5):
            repeats.log("why", peer="p")
        repeats.tick()
        told.append(re.findall(r"times=(\d+)", capsys.readouterr().out))
    assert told == [["1"], [], ["14"], ["1"], [], ["14"]]
