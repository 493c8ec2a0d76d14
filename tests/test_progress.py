"""Progress in a log: no line twice, none that stands still, and what is left in all."""

from __future__ import annotations

import re

import pytest
from rich.table import Table

from adalayer_native import _progress, _stages
from adalayer_native._console import print_table
from adalayer_native._progress import ProgressBar, duration, stage
from adalayer_native._stages import Stage, job


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (_progress, _stages):
            monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_last_line_is_not_printed_twice(capsys, clock) -> None:
    with ProgressBar("working", 3, unit="step") as bar:
        for _ in range(3):
            clock.pass_(11)
            bar.advance()
    printed = lines(capsys)
    assert len(printed) == 3 and printed[-1].startswith("working: 3/3")


def test_a_short_piece_of_work_is_one_line(capsys, clock) -> None:
    with ProgressBar("working", 3, unit="step") as bar:
        bar.advance(3)
    assert len(lines(capsys)) == 1


def test_what_ends_early_does_not_stand_still(capsys, clock) -> None:
    with ProgressBar("trying plans", 44, unit="plan") as bar:
        bar.advance(36)
        clock.pass_(5)
    (line,) = lines(capsys)
    assert line.startswith("trying plans: 36/36") and "left" not in line


def test_what_fails_says_how_far_it_was(capsys, clock) -> None:
    def work() -> None:
        with ProgressBar("trying plans", 44, unit="plan") as bar:
            bar.advance(36)
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        work()
    assert lines(capsys)[0].startswith("trying plans: 36/44")


def test_a_note_alone_is_no_step(capsys, clock) -> None:
    with ProgressBar("repairing", 2, unit="layer") as bar:
        clock.pass_(11)
        bar.advance(0, "conv1")
        clock.pass_(1)
        bar.advance(1, "conv1")
    first, last = lines(capsys)
    assert first.startswith("repairing: 0/2") and "conv1" in first
    assert last.startswith("repairing: 1/1")


def test_a_job_says_how_many_stages_follow_and_what_is_left(capsys, clock) -> None:
    with job([Stage("first", 10), Stage("second", 20), Stage("third", 20)]):
        with stage("first"):
            clock.pass_(10)
        with stage("second"), ProgressBar("counting", 4, unit="step") as bar:
            clock.pass_(15)
            bar.advance()  # a quarter after 15 seconds: 45 more, and 20 of 25/15 s each
        with stage("third", enabled=False):
            clock.pass_(1)
    printed = lines(capsys)
    assert printed[0] == "first (stage 1 of 3)"
    assert printed[1] == "second (stage 2 of 3, about 40 s left in all)"
    found = re.search(r"1/4.*stage 2 of 3, about (\d+) s left in all", printed[2])
    assert found and int(found[1]) == 78
    assert _stages.current() is None


def test_stages_that_were_done_in_an_earlier_run_say_nothing_about_speed(clock) -> None:
    with job([Stage("read", 1000), Stage("made", 10), Stage("last", 10)]) as running:
        with stage("read"):
            clock.pass_(0.1)
        with stage("made"):
            assert running.left() is None
            clock.pass_(20)
        with stage("last"):
            assert running.left() == pytest.approx(20)


def test_a_job_within_a_job_is_a_part_of_it(capsys, clock) -> None:
    with job([Stage("inner", 1), Stage("outer", 1)]) as whole:
        with job([Stage("inner", 1)]) as part, stage("inner"):
            assert part is whole
        assert _stages.current() is whole
        with stage("unknown"):
            pass
    assert lines(capsys) == ["inner (stage 1 of 2)"]
    with stage("alone"):
        assert _stages.current() is None


def test_silent_bars_do_not_count(clock) -> None:
    with job([Stage("one", 1, bars=2)]) as running, stage("one", enabled=False):
        with ProgressBar("hidden", 2, enabled=False) as bar:
            bar.advance(2)
        assert running.done == 0
        with ProgressBar("shown", 2) as bar:
            bar.advance(1)
            assert running.done == 0.25
        assert running.done == 0.5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (12_000, "3 h 20 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_narrow_terminal_gets_more_tables(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = Table(title="numbers", caption="notes")
    table.add_column("name")
    for k in range(6):
        table.add_column(f"value {k}", justify="right")
    table.add_row("a name", *(f"{k}23,456,789" for k in range(6)))
    print_table(table)
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert all(len(line) <= 40 for line in text.splitlines())
    assert all(f"{k}23,456,789" in text for k in range(6)) and text.count("a name") > 1
    assert text.count("numbers") == 1 and text.count("notes") == 1
