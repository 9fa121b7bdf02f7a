"""The table of what comes next, for every state a folder can be in."""

from pathlib import Path

import pytest
from launcher_harness import make_launch, put_checkpoint

from cocoa_dist.config import RunConfig, load_recipe
from cocoa_dist.manifest import read_manifest
from launcher.advance import Done, Start, Stopped, decide, position


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_recipe(str(make_launch(tmp_path).recipe))


# checkpoints as (stage, step); the stage and the step it goes on after, None if it is done
TABLE = [
    pytest.param([], ("a", 0), id="nothing yet"),
    pytest.param([("a", 4)], ("a", 4), id="in the first stage"),
    pytest.param([("a", 4), ("a", 8)], ("a", 8), id="the newest counts"),
    pytest.param([("a", 10)], ("b", 0), id="a complete stage makes room for the next"),
    pytest.param([("a", 8), ("a", 10), ("b", 4)], ("b", 4), id="in the second stage"),
    pytest.param([("a", 10), ("b", 10), ("c", 8)], ("c", 8), id="in the last stage"),
    pytest.param([("a", 10), ("b", 10), ("c", 10)], None, id="done"),
    pytest.param([("b", 10), ("c", 10)], ("a", 0), id="a lost first stage is done again"),
    pytest.param([("a", 10), ("c", 4)], ("b", 0), id="a gap is filled first"),
]


@pytest.mark.parametrize(("have", "expected"), TABLE)
def test_the_first_incomplete_stage_goes_on_from_its_newest_checkpoint(
    tmp_path, config, have, expected
):
    for stage, step in have:
        put_checkpoint(tmp_path, stage=stage, step=step)
    decision = decide(config, tmp_path)
    if expected is None:
        assert isinstance(decision, Done)
        assert decision.checkpoint.parts[-2:] == ("c", "step_00000010")
    else:
        assert isinstance(decision, Start)
        assert (decision.stage, decision.from_step, decision.target_step) == (*expected, 10)


def test_of_many_checkpoints_one_manifest_is_read(tmp_path, config, monkeypatch):
    for step in range(1, 10):
        put_checkpoint(tmp_path, stage="a", step=step)
    read = []
    monkeypatch.setattr(
        "launcher.advance.read_manifest",
        lambda folder: read.append(folder) or read_manifest(folder),
    )
    decide(config, tmp_path)
    assert [folder.name for folder in read] == ["step_00000009"]


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", '{"schema_version": 99}', '{"schema_version": 1, "step": 8}', None],
)
def test_a_manifest_that_cannot_be_read_is_skipped_and_named(tmp_path, config, damage):
    put_checkpoint(tmp_path, stage="a", step=4)
    path = put_checkpoint(tmp_path, stage="a", step=8) / "manifest.json"
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage)
    decision = decide(config, tmp_path)
    assert isinstance(decision, Start)
    assert decision.from_step == 4
    assert len(decision.skipped) == 1
    assert "step_00000008" in decision.skipped[0]


def test_a_fault_older_than_the_checkpoint_in_use_is_not_reported(tmp_path, config):
    (put_checkpoint(tmp_path, stage="a", step=4) / "manifest.json").write_text("{")
    put_checkpoint(tmp_path, stage="a", step=8)
    decision = decide(config, tmp_path)
    assert isinstance(decision, Start)
    assert (decision.from_step, decision.skipped) == (8, ())


def test_complete_needs_both_the_word_and_the_step(tmp_path, config):
    put_checkpoint(tmp_path, stage="a", step=8, complete=True)
    decision = decide(config, tmp_path)
    assert isinstance(decision, Start)
    assert (decision.stage, decision.from_step) == ("a", 8)


def test_folders_that_are_no_checkpoints_are_not_looked_at(tmp_path, config):
    folder = put_checkpoint(tmp_path, stage="a", step=8)
    folder.rename(folder.with_name("step_00000008.staging"))
    decision = decide(config, tmp_path)
    assert isinstance(decision, Start)
    assert decision.from_step == 0


def test_stop_holds_back_a_start_but_not_the_news_that_it_is_done(tmp_path, config):
    (tmp_path / "STOP").write_text("for the power cut\n")
    assert decide(config, tmp_path) == Stopped("for the power cut")
    for stage in "abc":
        put_checkpoint(tmp_path, stage=stage, step=10)
    assert isinstance(decide(config, tmp_path), Done)


def test_deciding_writes_nothing(tmp_path, config):
    put_checkpoint(tmp_path, stage="a", step=4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    decide(config, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_new_checkpoint_raises_the_position(tmp_path, config):
    seen = [position(config, decide(config, tmp_path))]
    for stage, step in [("a", 4), ("a", 10), ("b", 4), ("b", 10), ("c", 10)]:
        put_checkpoint(tmp_path, stage=stage, step=step)
        seen.append(position(config, decide(config, tmp_path)))
    assert seen == sorted(set(seen))
