"""What a step does is counted and held to benchmarks/step_counts.json; see tools/bench_step.py."""

import sys
from pathlib import Path

import pytest
from ranks import launch

WORKER = Path(__file__).with_name("step_counts_worker.py")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from step_cases import CASES, GRAPHS, differences, installed, read_committed  # noqa: E402

FIRST = CASES[0]


def job(name: str, *, case: str = "", spoilt: str = "") -> dict[str, object]:
    return {"name": name, "case": case or name, "spoilt": spoilt}


def committed(names) -> dict[str, dict[str, int]]:
    versions, counts = read_committed()
    if versions != installed():
        pytest.fail(f"counts are of {versions}: run tools/bench_step.py --update")
    return {name: counts[name] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_do_what_they_did_when_the_counts_were_committed(ranks, tmp_path) -> None:
    names = [case.name for case in CASES if case.ranks == ranks]
    found = launch([job(name) for name in names], world_size=ranks, folder=tmp_path, worker=WORKER)
    lines = differences(committed(names), found)
    assert not lines, "\n".join(lines)


@pytest.mark.slow
def test_compiled_layers_are_as_few_graphs_as_they_were(tmp_path) -> None:
    found = launch([job(GRAPHS)], world_size=1, folder=tmp_path, worker=WORKER)
    lines = differences(committed([GRAPHS]), found)
    assert not lines, "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", ["logits", "padding"])
def test_work_for_rows_that_nobody_reads_is_named(spoilt, tmp_path) -> None:
    jobs = [job("spoilt", case=FIRST.name, spoilt=spoilt)]
    found = launch(jobs, world_size=1, folder=tmp_path, worker=WORKER)
    lines = differences(committed([FIRST.name]), {FIRST.name: found["spoilt"]})
    more = [line for line in lines if f"{FIRST.name}: product_flops is" in line]
    assert len(more) == 1
    assert "(+" in more[0]
    assert any("kept_bytes" in line for line in lines)
    assert not any("model_flops" in line for line in lines)  # what has to be done is the same


def test_every_difference_is_named_with_both_numbers() -> None:
    before = {"a": {"x": 200, "y": 1}, "gone": {"x": 1}}
    now = {"a": {"x": 250, "y": 1, "z": 3}, "new": {"x": 1}}
    assert differences(before, now) == [
        "a: x is 250 (+25 %), expected 200",
        "a: z is 3, expected 0",
        "gone: not counted",
        "new: not in the file",
    ]
    assert differences(before, before) == []


def test_the_file_has_every_case() -> None:
    _, counts = read_committed()
    assert counts.keys() == {case.name for case in CASES} | {GRAPHS}
