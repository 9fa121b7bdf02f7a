"""What the display writes, on a terminal and elsewhere."""

import io
import threading

import pytest
from rich.console import Console

from launcher.progress import Display
from launcher.steplog import StepRecord


def record(step: int) -> StepRecord:
    return StepRecord("a", step, "e", 100.0 + 0.5 * step, 0.5, 1.0 / step)


def show(console: Console, *, from_step: int = 0) -> None:
    with Display(console, stage="a", from_step=from_step, target_step=100) as display:
        for step in range(from_step + 1, 101):
            display.update([record(step)])


def test_plain_output_is_a_line_for_every_tenth_of_the_stage():
    file = io.StringIO()
    show(Console(file=file, width=20))
    lines = file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[4] == "a: step 50/100, 2.00 steps/s, loss 0.02, 0:00:25 left"


def test_plain_output_speaks_after_a_while_even_without_much_progress(monkeypatch):
    monkeypatch.setattr("launcher.progress._LINE_SECONDS", 0.0)
    file = io.StringIO()
    show(Console(file=file), from_step=95)
    assert len(file.getvalue().splitlines()) == 5


def test_nothing_is_said_before_there_is_something_to_say():
    file = io.StringIO()
    with Display(Console(file=file), stage="a", from_step=0, target_step=9) as display:
        display.update([])
    assert file.getvalue() == ""


@pytest.mark.parametrize("from_step", [0, 40])
def test_a_terminal_gets_a_bar_and_no_thread(from_step):
    file = io.StringIO()
    before = threading.active_count()
    console = Console(file=file, force_terminal=True, width=100)
    with Display(console, stage="a", from_step=from_step, target_step=100) as display:
        display.update([record(from_step + 1)])
        display.update([record(from_step + 2)])
        assert threading.active_count() == before
    out = file.getvalue()
    assert f"{from_step + 2}/100" in out.replace(" ", "")
    assert "2.00 steps/s" in out
