"""What happened in a run, from files made by hand."""

import json
from pathlib import Path

from cocoa_dist import timeline
from cocoa_dist.timeline import MomentKind, read_left_out, read_timeline


def put(path: Path, *lines: dict[str, object] | str) -> None:
    path.parent.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))


def incarnation(epoch: str, *, start: float, ranks: int = 2, since: int = 0, **end: object):
    begun = {"epoch": epoch, "stage": "a", "from_step": since, "world_size": ranks}
    begun |= {"started_at": start, "ended_at": None, "verdict": None}
    return [begun, {**begun, **end}] if end else [begun]


def make(run_dir: Path) -> None:
    first = incarnation("1", start=10, ended_at=20, verdict="preempted", reason="told\nx", step=4)
    end = {"ended_at": 40, "verdict": "crash", "reason": "", "step": 4}
    second = incarnation("2", start=30, ranks=4, since=4, **end)
    put(run_dir / "incarnations.jsonl", *first, *second, *incarnation("3", start=50, ranks=4))
    put(
        run_dir / "events.jsonl",
        {"kind": "submitted", "time": 5},
        {"kind": "phase", "phase": "train", "time": 11, "stage": "a", "step": 0},
        {"kind": "beat", "steps": 4, "time": 15, "stage": "a", "step": 4},
        {"kind": "phase", "phase": "evaluation", "time": 16, "stage": "a", "step": 4},
        {"kind": "saved", "time": 17, "stage": "a", "step": 4, "bytes": 2_500_000},
        {"kind": "save_failed", "time": 35, "stage": "a", "step": 5, "reason": "disk full"},
    )


def test_moments_are_in_order_and_say_what_happened(tmp_path: Path) -> None:
    make(tmp_path)
    found = [(m.time, m.kind, m.step, m.text) for m in read_timeline(tmp_path)]
    kind = MomentKind
    assert found == [
        (5, kind.SUBMITTED, 0, "the run folder was made"),
        (10, kind.STARTED, 0, "on 2 ranks"),
        (16, kind.EVALUATION, 4, "on held-out data"),
        (17, kind.CHECKPOINT, 4, "2.5 MB"),
        (20, kind.INTERRUPTED, 4, "preempted: told"),
        (30, kind.RESUMED, 4, "on 4 ranks, before it were 2"),
        (35, kind.SAVE_FAILED, 5, "disk full"),
        (40, kind.FAILED, 4, "crash"),
        (50, kind.STARTED, 0, "on 4 ranks"),
    ]


def test_the_end_of_a_stage_is_not_said_twice(tmp_path: Path) -> None:
    end = {"ended_at": 2, "verdict": "finished", "reason": "8 of 8 steps", "step": 8}
    put(tmp_path / "incarnations.jsonl", *incarnation("1", start=1, **end))
    assert read_timeline(tmp_path)[-1] == timeline.Moment(
        2.0, MomentKind.FINISHED, "a", 8, "8 of 8 steps"
    )


def test_torn_and_strange_lines_are_left_out(tmp_path: Path) -> None:
    make(tmp_path)
    before = read_timeline(tmp_path)
    for name in ("events.jsonl", "incarnations.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write(
                '[1]\n"saved"\n{"kind": "saved"}\n{"kind": "saved", "time": "x"}\n\xff\n{"ki'
            )
    assert read_timeline(tmp_path) == before


def test_a_folder_without_files_has_no_moments(tmp_path: Path) -> None:
    assert read_timeline(tmp_path) == []
    assert read_left_out(tmp_path, times={}) == []


def test_the_end_of_a_long_diary_is_read_alone(tmp_path: Path, monkeypatch) -> None:
    saves = [{"kind": "saved", "time": i, "stage": "a", "step": i, "bytes": 1} for i in range(1000)]
    put(tmp_path / "events.jsonl", *saves)
    monkeypatch.setattr(timeline, "_TAIL_BYTES", 1000)
    newest = read_timeline(tmp_path, whole=False)
    assert 5 < len(newest) < 25
    assert newest == read_timeline(tmp_path)[-len(newest) :]


def test_records_left_out_are_counted_by_step_where_the_step_was_kept(tmp_path: Path) -> None:
    folder = tmp_path / "quarantine"
    bad = {"stage": "a", "kind": "image"}
    put(folder / "a.rank0.jsonl", {**bad, "step": 2}, {**bad, "step": 1}, {**bad, "step": 9})
    put(folder / "a.rank1.jsonl", {**bad, "step": 2}, {**bad, "step": 2, "kind": "text"}, "torn")
    found = read_left_out(tmp_path, times={("a", 1): 10.0, ("a", 2): 20.0})
    assert [(m.time, m.step, m.text) for m in found] == [
        (10.0, 1, "1 x image"),
        (20.0, 2, "2 x image, 1 x text"),
    ]
