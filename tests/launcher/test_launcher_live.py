"""The live views: `status --watch` of one run and `top` of many, on folders made by hand."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launcher_harness import hurry, make_launch, put_checkpoint
from rich.console import Console

import launcher
from cocoa_dist.config import load_recipe
from launcher.__main__ import main
from launcher.claim import claimed
from launcher.history import Verdict, end_incarnation, start_incarnation
from launcher.live import Rates, draw, rates_of, read_view, sparkline, watch
from launcher.runfolder import Holder, prepare
from launcher.slurm.explain import JobStatus
from launcher.steplog import StepRecord
from launcher.top import Jobs, read_rows, top

EPOCH = "local-1-abcd"


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = make_launch(folder)
    made.run_dir.mkdir()
    prepare(made.run_dir, config=load_recipe(str(made.recipe)), recipe_file=made.recipe)
    return made.run_dir


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hurry(monkeypatch)
    return make_run(tmp_path / "one")


def begin(run_dir: Path, *, stage: str = "a"):
    return start_incarnation(run_dir, epoch=EPOCH, stage=stage, from_step=0, world_size=2)


def log(run_dir: Path, steps: range, *, stage: str = "a") -> None:
    """Append steps of 0.5 s, the last of which has just ended; the loss is 10 - step."""
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in steps:
            line = {"stage": stage, "step": step, "epoch": EPOCH, "loss": 10.0 - step}
            line |= {"time": time.time() - 0.5 * (steps[-1] - step), "samples": 4, "tokens": 100}
            file.write(json.dumps(line) + "\n")


def finish(run_dir: Path) -> None:
    for stage in "abc":
        put_checkpoint(run_dir, stage=stage, step=10)


def console(*, terminal: bool, width: int = 120, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    return Console(file=file, force_terminal=terminal, width=width, height=40, legacy_windows=False)


def text_of(console: Console) -> str:
    buffer = console.file.buffer  # type: ignore[attr-defined]
    return buffer.getvalue().decode(console.encoding)


def test_the_curve_has_the_median_of_what_a_place_stands_for() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], width=8, bars="01234567") == "01234567"
    assert sparkline([0, 0, 9, 7, 7, 0], width=2, bars="01234567") == "07"
    assert sparkline([3.0, 3.0], width=9, bars="01234567") == "00"
    assert sparkline([float("nan"), 1.0, float("inf"), 2.0], width=9, bars="01") == "01"
    assert sparkline([], width=9) == ""


def test_rates_are_those_of_the_newest_incarnation() -> None:
    steps = [
        StepRecord("a", i, "1" if i < 3 else "2", 100.0 + 2 * i, 1.0, 1.0, samples=4, tokens=10 * i)
        for i in range(1, 6)
    ]
    assert rates_of(steps) == Rates(steps=0.5, samples=2.0, tokens=90 / 4)
    assert rates_of(steps[:3]) == rates_of([]) == Rates()


def test_a_run_at_work_shows_stages_rates_loss_goodput_and_what_happened(run_dir: Path) -> None:
    begin(run_dir)
    log(run_dir, range(1, 8))
    saved = {"kind": "saved", "time": time.time(), "stage": "a", "step": 4, "bytes": 5_000_000}
    beat = {"kind": "beat", "time": time.time(), "stage": "a", "epoch": EPOCH, "step": 7}
    beat |= {"steps": 7, "seconds": 0.01, "waited": 0.0, "longest": 0.01}
    history = run_dir / "incarnations.jsonl"
    line = json.loads(history.read_text())
    history.write_text(json.dumps({**line, "started_at": line["started_at"] - 10}) + "\n")
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps(saved) + "\n" + json.dumps(beat) + "\n")
    shown = console(terminal=False)
    with claimed(run_dir, Holder.of_this_process()):
        shown.print(draw(read_view(run_dir, now=time.time()), width=120))
    lines = text_of(shown).splitlines()
    assert lines[0].split() == ["run", "recipe", "small", "running"]
    assert "7/10" in lines[1]
    found = {line.split()[0]: line for line in lines}
    assert found["loss"].split()[1] == "3"
    assert found["loss"].split()[2][0] == "\u2588"
    assert found["loss"].split()[2][-1] == "\u2581"
    assert "2 steps/s, 8 samples/s, 200 tokens/s" in found["rate"]
    assert "about 0:00:12" in text_of(shown)  # 23 steps of 0.5 s
    assert "goodput" in found
    assert "checkpoint" in lines[-1]
    assert "a step 4" in lines[-1]
    assert "5.0 MB" in lines[-1]
    assert any("started" in line and "on 2 ranks" in line for line in lines)


def test_a_terminal_without_unicode_gets_ascii(run_dir: Path) -> None:
    log(run_dir, range(1, 8))
    finish(run_dir)
    shown = console(terminal=True, encoding="ascii")
    watch(run_dir, shown)
    assert "loss  " in text_of(shown)


def test_without_a_terminal_a_line_comes_when_something_changed(run_dir: Path) -> None:
    begin(run_dir)
    log(run_dir, range(1, 3))
    looks = iter([lambda: None, lambda: log(run_dir, range(3, 5)), lambda: finish(run_dir)])
    shown = console(terminal=False)
    with claimed(run_dir, Holder.of_this_process()):
        watch(run_dir, shown, sleep=lambda _: next(looks)())
    lines = [line for line in text_of(shown).splitlines() if line.startswith("run: ")]
    assert [line.split(", ")[:2] for line in lines] == [
        ["run: running", "a 2/10"],
        ["run: running", "a 4/10"],
        ["run: done", "c 10/10"],
    ]
    assert "\x1b" not in text_of(shown)


def interrupted(_: float) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_leaves_the_last_picture_and_a_cursor(run_dir: Path, terminal: bool) -> None:
    begin(run_dir)
    log(run_dir, range(1, 3))
    shown = console(terminal=terminal)
    with claimed(run_dir, Holder.of_this_process()):
        watch(run_dir, shown, sleep=interrupted)
    text = text_of(shown)
    assert "2/10" in text
    assert ("\x1b[?25h" in text) == terminal  # the cursor is there again


def test_slurm_is_not_asked_at_every_look(run_dir: Path) -> None:
    begin(run_dir)
    asked, now = [], [1000.0]
    job = JobStatus(job="7", state="RUNNING", restarts=0, nodes="n1", why="runs on n1")

    def ask(_: Path) -> JobStatus:
        asked.append(now[0])
        return job

    def sleep(seconds: float) -> None:
        now[0] += 5.0
        if now[0] > 1040:
            raise KeyboardInterrupt

    shown = console(terminal=False)
    watch(run_dir, shown, ask_job=ask, clock=lambda: now[0], sleep=sleep)
    assert asked == [1000.0, 1015.0, 1030.0]
    assert "job 7 runs on n1" in text_of(shown)


def process(*arguments: str) -> "subprocess.Popen[str]":
    root = str(Path(launcher.__file__).parents[1])
    code = "import sys; from launcher.__main__ import main; code = main(sys.argv[1:])\n"
    code += "assert 'torch' not in sys.modules; sys.exit(code)"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"},
    )


def test_a_signal_of_ctrl_c_ends_the_process_with_0(run_dir: Path) -> None:
    begin(run_dir)
    log(run_dir, range(1, 3))
    looking = process("status", str(run_dir), "--watch", "--every", "0.1")
    try:
        assert looking.stdout is not None
        assert looking.stdout.readline().startswith("run: ")
        looking.send_signal(signal.SIGINT)
        _, errors = looking.communicate(timeout=30)
    finally:
        looking.kill()
    assert (looking.returncode, errors) == (0, "")


def cpu_of(call: Callable[[], object]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    call()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_ten_runs_take_less_than_importing_torch_would(tmp_path: Path, monkeypatch) -> None:
    hurry(monkeypatch)
    for number in range(10):
        run_dir = make_run(tmp_path / f"{number}")
        begin(run_dir)
        log(run_dir, range(1, 200))
    found: list[str] = []

    def look() -> None:
        looking = process("top", str(tmp_path))
        found.extend(looking.communicate(timeout=60))
        assert looking.returncode == 0, found

    # CPU seconds: the wall clock of a busy machine proves nothing. Half a second when it is quiet;
    # torch alone is 1.7.
    assert min(cpu_of(look), cpu_of(look)) < 1.0
    assert found[0].count("a 0/10") == 10  # no incarnation holds what it logged


def test_those_that_need_somebody_come_first(tmp_path: Path, monkeypatch) -> None:
    hurry(monkeypatch)
    done, given_up, broken = (make_run(tmp_path / name) for name in ("1", "2", "3"))
    finish(done)
    log(done, range(1, 11), stage="c")
    begun = begin(given_up)
    end_incarnation(given_up, begun, verdict=Verdict.GIVEN_UP, reason="three crashes")
    (broken / "resolved.yaml").write_text("name: [")
    shown = console(terminal=False, width=160)
    top(tmp_path, shown)
    lines = [line.split() for line in text_of(shown).splitlines()]
    assert [line[:2] for line in lines if line[0].endswith("/run")] == [
        ["3/run", "unreadable"],
        ["2/run", "given_up"],
        ["1/run", "done"],
    ]
    assert "100%" in lines[-1]


def test_a_narrow_terminal_gets_fewer_columns_and_whole_ones(tmp_path: Path, monkeypatch) -> None:
    hurry(monkeypatch)
    log(make_run(tmp_path / "1"), range(1, 5))
    shown = console(terminal=True, width=80)
    top(tmp_path, shown, once=True)
    text = text_of(shown)
    assert "steps/s" in text
    assert "restarts" not in text
    assert "\u2026" not in text  # nothing is cut


def test_jobs_are_asked_for_once_in_half_a_minute(tmp_path: Path) -> None:
    asked: list[Path] = []
    jobs = Jobs(lambda run_dir: asked.append(run_dir))
    for _ in range(3):
        assert jobs.of(tmp_path) is None
    assert asked == [tmp_path]


def test_top_leaves_on_ctrl_c(run_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr("launcher.top.time.sleep", interrupted)
    shown = console(terminal=True)
    top(run_dir.parent, shown)
    assert "pending" in text_of(shown)
    assert "\x1b[?25h" in text_of(shown)


def test_top_of_nothing_says_so(tmp_path: Path, capsys) -> None:
    assert main(["top", str(tmp_path)]) == 0
    assert "no run folders" in capsys.readouterr().out
    assert main(["top", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert read_rows(tmp_path, jobs=Jobs(), now=0.0) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["status", "x", "--watch", "--json"], "not allowed with"),
        (["status", "x", "--watch", "--every", "0"], "expected seconds from 0.1 to 3600"),
        (["top", "x", "--every", "soon"], "expected seconds from 0.1 to 3600"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], complaint: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert complaint in capsys.readouterr().err


def test_watching_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["status", str(tmp_path), "--watch"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
