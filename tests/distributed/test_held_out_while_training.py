"""Retrieval while a stage trains: what is scored, that nothing moves, that others hear of it."""

import pytest
import torch
from stage_run import start

from cocoa_dist.config import ConfigError, load_recipe
from cocoa_dist.manifest import stage_best
from cocoa_dist.train.evaluate import evaluate_sets, load_embedder

DROPOUT = "{kind: lora, rank: 2, alpha: 4, dropout: 0.5, targets: [q_proj, v_proj]}"
CASES = {  # stage, and what else
    "reconstruction": ("joint_reconstruction", ()),
    "contrastive": ("contrastive", ("engine.resident_parameters=true",)),
    "adapter": ("eos_bridged_reconstruction", (DROPOUT,)),
    "fsdp2": ("contrastive", ("engine.kind=fsdp2",)),
}
EVERY = "evaluation.every_steps=2"
SETS = "evaluation.sets.unseen_concept.limit=37"  # does not divide over ranks and batches


def run(folder, case: str, *more: str):
    stage, overrides = CASES[case]
    short = [f"stages.{name}.steps=5" for name in (stage,)]
    settings = [f"stages.{stage}.adapter={o}" if o == DROPOUT else o for o in overrides]
    return start(folder, stage, *short, *settings, SETS, "metrics.measure_every_steps=2", *more)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_changes_no_number_of_the_run(tmp_path, case) -> None:
    plain = run(tmp_path / "plain", case)
    keep = "evaluation.keep_best=held_out_recall/unseen_concept"
    often = run(tmp_path / "often", case, EVERY, keep, "evaluation.batch_size=16")
    plain.wait(), often.wait()
    assert often.numbers() == plain.numbers()
    left, right = plain.weights(), often.weights()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    scored = [r["step"] for r in often.records() if "held_out_recall/unseen_concept" in r]
    assert scored == [2, 4, 5]  # every second step, and the stage's end
    assert not any("held_out" in name for record in plain.records() for name in record)
    assert [e["step"] for e in often.events("evaluated")] == scored
    values = [r["held_out_recall/unseen_concept"] for r in often.records() if r["step"] in scored]
    _, best = stage_best(often.folder, stage=often.stage)
    assert best.step == scored[values.index(max(values))]
    phases = [e["phase"] for e in often.events("phase")]
    assert phases.count("evaluation") == 3
    assert "evaluation" not in [e["phase"] for e in plain.events("phase")]
    if case != "adapter":  # whose end is merged
        config = load_recipe("debug", [SETS])
        embedder = load_embedder(config, run_dir=often.folder, after_stage=often.stage)
        scores = evaluate_sets(config, embedder)["unseen_concept"]
        expected = (scores["t2i"]["r10"] + scores["i2t"]["r10"]) / 200
        assert scores["n"] == 37
        found = often.records()[-1]["held_out_recall/unseen_concept"]
        assert found == pytest.approx(expected, abs=1.01 / 37)  # a tie in float32 may fall apart


def test_an_evaluation_needs_a_set() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.every_steps is 5, but evaluation.sets has"):
        load_recipe("cocoa_qwen2_vl_2b", ["evaluation.every_steps=5", "evaluation.sets={}"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["evaluation.every_steps=5", "evaluation.keep_best=held_out_recall/unseen_concpt"],
            r"'held_out_recall/unseen_concpt' is not measured, did you mean "
            r"'held_out_recall/unseen_concept'\?; have: held_out_recall/unseen_concept",
        ),
        (["evaluation.every_steps=5", "evaluation.keep_best=loss"], r"'loss' is not measured"),
        (
            ["evaluation.keep_best=held_out_recall/unseen_concept"],
            r"keep_best needs evaluation.every_steps",
        ),
    ],
)
def test_a_measure_that_does_not_exist_is_refused_by_name(settings, said) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe("debug", settings)


@pytest.mark.slow
def test_a_set_that_is_not_there_ends_the_run_before_its_first_step(tmp_path) -> None:
    missing = f"evaluation.sets.other={{path: {tmp_path}/nowhere}}"
    found = start(tmp_path / "run", "contrastive", EVERY, missing)
    try:
        assert [process.wait(timeout=100) for process in found.ranks] == [2, 2]
    finally:
        found.kill()
    assert str(tmp_path / "nowhere") in found.log(0)
    assert not found.records()
