"""tools/bench_metrics.py counts what is spent inside, and its table is what was measured."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import bench_metrics as bench  # noqa: E402


def burn(seconds: float) -> None:
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass


def test_timers_count_what_is_spent_inside_by_part() -> None:
    holder = SimpleNamespace(one=lambda: burn(0.01) or 7, two=lambda: burn(0.02))
    timers = bench.Timers()
    timers.wrap("a", holder, "one")
    timers.wrap("a", holder, "two")
    assert holder.one() == 7
    holder.two()
    assert timers.seconds["a"] == pytest.approx(0.03, rel=0.3)


def test_nothing_does_nothing() -> None:
    nothing = bench.Nothing()
    with nothing.phase("train"):
        nothing.step(1, seconds=0.1)
    assert nothing.asked() == 0


def test_the_published_table_is_made_from_the_published_numbers() -> None:
    rows = [bench.Row(**row) for row in json.loads(bench.OUT.with_suffix(".json").read_text())]
    lines = bench.table(rows, pairs=3, steps=20).splitlines()
    published = bench.OUT.with_suffix(".md").read_text().splitlines()
    assert lines[3:] == published[3:]  # versions stand above


@pytest.mark.parametrize("arguments", [["--pairs", "1"], ["--steps", "0"]])
def test_too_few_blocks_are_refused(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert "at least 2 of each" in capsys.readouterr().err
