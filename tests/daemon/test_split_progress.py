"""What subscribers and the log are told of splits, on a virtual clock."""

from daemon.control.split_progress import LOG_SECONDS, SplitProgress, log_fields
from protocol.control.rows import Split
from tests.daemon.fakes import split_row


class Told:
    def __init__(self) -> None:
        self.notified: list[Split] = []
        self.logged: list[Split] = []
        self.ended: dict[str, Split] = {}
        self.progress = SplitProgress(self.ended.get, self.notified.append, self.logged.append)

    @property
    def states(self) -> list[str]:
        return [seen.state for seen in self.notified]


def row(state: str = "running", percent: float = 0.0, counted: bool = True) -> Split:
    return split_row(name="a", state=state, percent=percent, holes_remaining=7, counted=counted)


def test_a_running_split_is_notified_at_every_look_and_logged_every_few_seconds() -> None:
    told = Told()
    looks = int(LOG_SECONDS * 4 * 3) + 1
    for quarter in range(looks):
        told.progress.look([row(percent=quarter)], quarter / 4)
    assert len(told.notified) == looks
    assert [logged.percent for logged in told.logged] == [20, 40, 60]


def test_a_split_that_stands_still_fills_no_log() -> None:
    told = Told()
    for second in range(100):
        told.progress.look([row(percent=3)], second)
    assert told.logged == []


def test_a_paused_split_is_notified_once() -> None:
    told = Told()
    for second, state in enumerate(["running", "paused", "paused", "paused", "running"]):
        told.progress.look([row(state)], second)
    assert told.states == ["running", "paused", "running"]


def test_the_end_of_a_split_is_notified_once() -> None:
    told = Told()
    told.progress.look([row(percent=50)], 0)
    told.ended["a"] = row("done", 100)
    told.progress.look([], 1)
    told.progress.look([], 2)
    assert told.states == ["running", "done"]


def test_a_split_that_began_and_ended_between_two_looks_is_notified() -> None:
    told = Told()
    told.progress.look([], 0)
    told.progress.expect("a")
    told.ended["a"] = row("done", 100)
    told.progress.look([], 1)
    told.progress.look([], 2)
    assert told.states == ["done"]


def test_a_split_whose_vdisk_was_deleted_is_forgotten() -> None:
    told = Told()
    told.progress.look([row()], 0)
    told.progress.look([], 1)
    assert told.states == ["running"]


def test_an_event_repeats_the_state_to_those_that_wait() -> None:
    told = Told()
    told.progress.look([row("paused")], 0)
    told.progress.expect("a")
    told.progress.look([row("paused")], 1)
    assert told.states == ["paused", "paused"]


def test_a_split_that_counts_first_is_logged_from_nothing_on() -> None:
    told = Told()
    told.progress.look([row(percent=100.0, counted=False)], 0)
    told.progress.look([row(percent=20.0)], LOG_SECONDS)
    assert [logged.percent for logged in told.logged] == [20.0]


def test_the_log_holds_the_documented_fields_only() -> None:
    assert log_fields(row()) == {
        "name": "a",
        "mode": "copy",
        "percent": 0.0,
        "holes_remaining": 7,
        "blocks_copied": 400,
        "blocks_shared": 0,
        "rate_bytes_per_second": 0,
        "eta_seconds": 12.0,
    }
