"""The report's section on how a run went: from files to numbers, from numbers to markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cocoa_dist.config import dump_yaml, load_recipe
from cocoa_dist.report import history
from cocoa_dist.report.facts import RunFacts
from cocoa_dist.report.history import (
    MOST_MOMENTS,
    History,
    Stretch,
    ask_launcher,
    read_history,
    stretches_of,
    told,
)
from cocoa_dist.report.history_pieces import (
    duration,
    goodput_part,
    history_section,
    throughput_part,
    timeline_part,
)
from cocoa_dist.report.theme import STYLE
from cocoa_dist.timeline import Moment, MomentKind

K = MomentKind
STAGE = "contrastive"


def moment(time: float, kind: MomentKind, *, step: int = 0, text: str = "", stage: str = STAGE):
    return Moment(time, kind, stage, step, text)


PREEMPTED = [
    moment(0, K.SUBMITTED, stage="", text="the run folder was made"),
    moment(10, K.STARTED, text="on 2 ranks"),
    moment(30, K.CHECKPOINT, step=4, text="2.5 MB"),
    moment(40, K.INTERRUPTED, step=5, text="preempted: told <to> leave"),
    moment(60, K.RESUMED, step=5, text="on 4 ranks, before it were 2"),
    moment(70, K.LEFT_OUT, step=6, text="1 x image"),
    moment(100, K.FINISHED, step=8, text="finished: 8 of 8 steps"),
]


class Tags(HTMLParser):
    """Checks that what is opened is closed, and collects classes and attributes."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: set[str] = set()
        self.styles: list[str] = []
        self.feed(markup)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.classes |= set((found.get("class") or "").split())
        self.styles += [found["style"]] if found.get("style") else []
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run(tmp_path: Path) -> RunFacts:
    """A run of one stage on 2 ranks: 10 s in the queue, 20 s of start, 10 s of steps."""
    config = load_recipe("debug", ["method=contrastive"])
    (tmp_path / "resolved.yaml").write_text(dump_yaml(config))
    who = {"stage": STAGE, "epoch": "local-1-ab"}
    begun = {**who, "from_step": 0, "world_size": 2, "started_at": 110.0}
    ended = {**begun, "ended_at": 140.0, "verdict": "stopped", "reason": "STOP", "step": 4}
    steps = {"steps": 4, "step": 4, "seconds": 10.0, "waited": 1.0, "longest": 3.0}
    phase = {"kind": "phase", **who}
    events = [
        {"kind": "submitted", "time": 100.0},
        {**phase, "phase": "start", "time": 110.0, "step": 0},
        {**phase, "phase": "train", "time": 130.0, "step": 0},
        {"kind": "beat", "time": 140.0, **who, **steps},
        {"kind": "saved", "time": 140.0, **who, "step": 4, "bytes": 2_000_000},
    ]
    bad = {"stage": STAGE, "kind": "image"}
    (tmp_path / "quarantine").mkdir()
    for name, lines in (
        ("incarnations.jsonl", [begun, ended]),
        ("events.jsonl", events),
        ("quarantine/a.rank0.jsonl", [{**bad, "step": 2}, {**bad, "step": 99}]),
    ):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    logged = tuple(
        {"stage": STAGE, "step": i, "time": 130.0 + i, "tokens": 100 * i, "step_seconds": 0.5}
        for i in (1, 2)
    )
    return RunFacts(tmp_path, config, (), {}, (*logged, {"stage": STAGE, "step": 3, "loss": 1.0}))


def test_the_history_of_a_run_is_read_from_its_folder(run: RunFacts) -> None:
    found = read_history(run)
    # Nothing was committed (no manifest), so its steps have to be done again.
    wanted = {"queue": 10.0, "start": 20.0, "replay": 9.0, "data_wait": 1.0}
    assert {cause: spent for cause, spent in found.seconds.items() if spent} == wanted
    assert found.goodput == 0.0
    assert [(m.time, m.kind) for m in found.moments] == [
        (100.0, K.SUBMITTED),
        (110.0, K.STARTED),
        (132.0, K.LEFT_OUT),
        (140.0, K.INTERRUPTED),
        (140.0, K.CHECKPOINT),
    ]
    assert found.stretches == [Stretch(STAGE, 110.0, 140.0)]
    assert found.throughput[STAGE] == [(1.0, 200.0), (2.0, 400.0)]
    assert found.throughput["joint_reconstruction"] == []


def test_a_launcher_that_cannot_say_costs_the_bar_and_not_the_page(tmp_path: Path, caplog) -> None:
    assert ask_launcher(tmp_path) == ({}, None)
    assert "says nothing about goodput" in caplog.text


def test_an_answer_that_is_no_json_is_told(run: RunFacts, monkeypatch, caplog) -> None:
    monkeypatch.setattr(history.sys, "executable", "/bin/echo")
    assert ask_launcher(run.run_dir) == ({}, None)
    assert "says nothing about goodput" in caplog.text


def test_a_stretch_whose_end_is_unknown_ends_with_the_next_start() -> None:
    moments = [moment(0, K.STARTED), moment(7, K.RESUMED), moment(9, K.CHECKPOINT)]
    assert stretches_of(moments) == [Stretch(STAGE, 0, 7), Stretch(STAGE, 7, 9)]
    assert stretches_of([]) == []


def test_checkpoints_in_a_row_are_one_line() -> None:
    saves = [moment(i, K.CHECKPOINT, step=i, text="1 MB") for i in range(1, 6)]
    lines = told([moment(0, K.STARTED), *saves, moment(9, K.FINISHED, step=5)])
    assert [line.kind for line in lines] == [K.STARTED, K.CHECKPOINT, K.FINISHED]
    assert lines[1].text == "5 times, first after step 1; last: 1 MB"
    assert (lines[1].time, lines[1].step) == (5, 5)


def test_of_a_long_history_the_beginning_and_the_end_are_told() -> None:
    moments = [moment(i, K.RESUMED if i % 2 else K.FAILED) for i in range(500)]
    lines = told(moments)
    assert len(lines) == MOST_MOMENTS + 1
    assert (lines[0], lines[-1]) == (moments[0], moments[-1])
    assert [line.text for line in lines if line.text] == ["... 420 more, not shown ..."]


def test_the_bar_is_as_wide_as_its_shares_and_the_table_says_each() -> None:
    markup = goodput_part({"productive": 75.0, "start": 24.99, "hang": 0.01, "queue": 0.0}, 0.75)
    assert Tags(markup).styles == ["width:75.00%", "width:24.99%"]
    assert "75.0&nbsp;% of it was productive" in markup
    assert markup.count("<tr>") == 3  # the cause of 0.01 s is in the table, the queue is not
    assert goodput_part({}, None) == goodput_part({"productive": 0.0}, None) == ""


def test_the_timeline_has_ranks_ticks_and_words_and_escapes_them() -> None:
    markup = timeline_part(PREEMPTED, stretches_of(PREEMPTED))
    tags = Tags(markup)
    assert "left:10.00%;width:30.00%" in tags.styles
    assert "left:60.00%;width:40.00%" in tags.styles
    assert {"saved", "broken", "warn"} <= tags.classes
    assert "on 4 ranks, before it were 2" in markup
    assert "told &lt;to&gt; leave" in markup
    assert "<to>" not in markup
    assert timeline_part([], []) == ""


def test_throughput_is_drawn_for_stages_that_logged_any() -> None:
    markup = throughput_part({"joint_reconstruction": [(1.0, 200.0), (2.0, 400.0)], STAGE: []})
    assert markup.count("<svg") == 1
    assert "median 300" in markup
    assert throughput_part({STAGE: []}) == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (25_500, "7 h 05 min")],
)
def test_durations_are_written_as_people_do(seconds: float, words: str) -> None:
    assert duration(seconds).replace("&nbsp;", " ") == words


def whole_section() -> str:
    causes = {"productive": 60.0, "start": 20.0, "queue": 15.0, "replay": 5.0}
    points = {STAGE: [(1.0, 200.0), (2.0, 400.0)]}
    return history_section(History(causes, 0.6, PREEMPTED, stretches_of(PREEMPTED), points))


def test_a_section_fetches_nothing_and_has_no_colours_of_its_own() -> None:
    markup = whole_section()
    assert not re.findall(r"https?:|src=|url\(|<script|@import", markup)
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b|rgb", markup)


def test_every_class_of_the_section_has_a_style() -> None:
    without = {"facts", "num", "quiet", "two", "grid", "chart", "key", "plain", "raw", "guide"}
    classes = Tags(whole_section()).classes - without
    assert {css for css in classes if f".{css}" not in STYLE} == set()


def test_a_run_that_tells_nothing_has_no_section() -> None:
    assert history_section(History({}, None, [], [], {STAGE: []})) == ""
