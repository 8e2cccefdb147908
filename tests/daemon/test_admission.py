"""Which connections are taken, and what is told of those that are not."""

from typing import Any

import pytest

from daemon.tcp.admission import BURST, LOGINS_PER_ADDRESS_MAX, PACE_MIN, REFUSAL_COST, Admission


class Connection:
    def __init__(self) -> None:
        self.logging_in = True


def fill(admission: Admission, host: str, count: int) -> list[Connection]:
    made = [Connection() for _ in range(count)]
    for connection in made:
        assert admission.refusal(host) is None
        admission.added(connection, host)
    return made


def test_one_address_cannot_hold_more_logins_than_its_share() -> None:
    admission = Admission("iscsi", connections_max=1000)
    held = fill(admission, "10.0.0.1", LOGINS_PER_ADDRESS_MAX)
    reason = admission.refusal("10.0.0.1")
    assert reason is not None
    assert str(LOGINS_PER_ADDRESS_MAX) in reason
    assert admission.refusal("10.0.0.2") is None
    held[0].logging_in = False  # it has logged in, and counts no more
    fill(admission, "10.0.0.1", 1)
    assert admission.refusal("10.0.0.1") is not None
    admission.removed(held[1], "10.0.0.1")
    assert admission.refusal("10.0.0.1") is None


def test_those_that_have_logged_in_count_for_the_whole_only() -> None:
    admission = Admission("iscsi", connections_max=LOGINS_PER_ADDRESS_MAX * 3)
    for _ in range(3):
        for connection in fill(admission, "h", LOGINS_PER_ADDRESS_MAX):
            connection.logging_in = False
    assert admission.refusal("h") == f"iscsi.connections_max {LOGINS_PER_ADDRESS_MAX * 3}"
    assert admission.refusal("other") is not None


def test_nothing_is_kept_of_addresses_that_have_gone() -> None:
    admission = Admission("iscsi", connections_max=10_000)
    for number in range(1000):
        (connection,) = fill(admission, f"host{number}", 1)
        admission.removed(connection, f"host{number}")
        assert admission.refusal(f"stranger{number}") is None
    assert admission._logging_in == {}
    assert admission._connections == 0


def test_a_flood_of_refusals_is_a_few_lines_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    def lines() -> list[Any]:
        return [line for line in capsys.readouterr().out.splitlines() if "iscsi.refused" in line]

    admission = Admission("iscsi", connections_max=1)
    for number in range(1000):
        admission.refused(f"10.0.0.1:{number}", "full")
    assert len(lines()) == 1
    admission.tick()
    (line,) = lines()
    assert "times=" in line
    assert "999" in line
    admission.tick()
    assert lines() == []
    admission.refused("10.0.0.1:1", "full")
    assert len(lines()) == 1


def taken_within(admission: Admission, seconds: float, taken: bool = True) -> int:
    """Connections of a flood that are taken (or refused) in so much time, from second 1000 on."""
    now, count = 1000.0, 0
    while now < 1000.0 + seconds:
        wait_seconds = admission.wait_seconds(now)
        if wait_seconds:
            now += wait_seconds
        else:
            admission.spend(taken)
            count += 1
    return count


@pytest.mark.parametrize(("connections_max", "pace"), [(256, PACE_MIN), (50_000, 5000)])
def test_a_burst_is_taken_at_once_and_then_no_more_than_the_pace(
    connections_max: int, pace: float
) -> None:
    assert taken_within(Admission("iscsi", connections_max), 1e-6) == BURST
    assert taken_within(Admission("iscsi", connections_max), 10.0) == pytest.approx(
        BURST + 10 * pace, abs=1
    )


def test_refusals_cost_a_part_and_time_gives_the_burst_back() -> None:
    admission = Admission("iscsi", 256)
    assert taken_within(admission, 10.0, taken=False) == pytest.approx(
        (BURST + 10 * PACE_MIN) / REFUSAL_COST, abs=11
    )
    assert admission.wait_seconds(1e6) == 0
    assert admission._credit == BURST
