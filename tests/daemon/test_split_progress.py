"""What subscribers and the log are told of splits, on a virtual clock."""

from typing import Any

from daemon.split_progress import LOG_SECONDS, SplitProgress, log_fields

Row = dict[str, Any]


class Told:
    def __init__(self) -> None:
        self.notified: list[Row] = []
        self.logged: list[Row] = []
        self.progress = SplitProgress(self.notified.append, self.logged.append)


def row(state: str = "running", percent: float = 0.0, name: str = "a") -> Row:
    return {"name": name, "state": state, "percent": percent, "holes_remaining": 7, "secret": 1}


def test_a_running_split_is_notified_at_every_look_and_logged_every_few_seconds() -> None:
    told = Told()
    for quarter in range(int(LOG_SECONDS * 4 * 3) + 1):
        told.progress.look([row(percent=quarter)], quarter / 4)
    assert len(told.notified) == LOG_SECONDS * 4 * 3
    assert [logged["percent"] for logged in told.logged] == [20, 40, 60]


def test_a_split_that_stands_still_fills_no_log() -> None:
    told = Told()
    for second in range(100):
        told.progress.look([row(percent=3)], second)
    assert told.logged == []


def test_the_end_of_a_split_is_notified_once() -> None:
    told = Told()
    told.progress.look([row(percent=50)], 0)
    told.progress.look([row("done", 100)], 1)
    told.progress.look([row("done", 100)], 2)
    assert [seen["state"] for seen in told.notified] == ["done"]


def test_a_split_that_began_and_ended_between_two_looks_is_notified() -> None:
    told = Told()
    told.progress.look([], 0)
    told.progress.look([row("done", 100)], 1)
    assert [seen["state"] for seen in told.notified] == ["done"]


def test_splits_that_ended_before_the_daemon_started_are_no_news() -> None:
    told = Told()
    told.progress.look([row("done", 100), row("failed", 10, "b")], 0)
    told.progress.look([row("done", 100), row("failed", 10, "b")], 1)
    assert told.notified == []


def test_a_split_of_a_deleted_and_recreated_vdisk_is_new() -> None:
    told = Told()
    told.progress.look([row("done", 100)], 0)
    told.progress.look([], 1)
    told.progress.look([row("done", 100)], 2)
    assert len(told.notified) == 1


def test_the_log_holds_the_documented_fields_only() -> None:
    assert log_fields(row()) == {"name": "a", "percent": 0.0, "holes_remaining": 7}
