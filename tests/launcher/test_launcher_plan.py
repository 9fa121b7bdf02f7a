"""The command `plan`: what it says, what it refuses, and that nothing heavy is imported."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cocoa_dist.config import load_recipe
from launcher.__main__ import main
from launcher.plan import command
from launcher.plan.estimate import advice, calibrated, estimate, median_step_seconds
from launcher.plan.hardware import CARDS, GIB, Cluster

RECIPE = "cocoa_qwen2_5_vl_7b"


def ask(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def tell(*arguments: str) -> int:
    return main(["plan", *arguments])


def found(recipe=RECIPE, *, gpus=8, card="h200", overrides=(), **more):
    cluster = Cluster(CARDS[card], gpus, **more)
    return estimate(load_recipe(recipe, overrides), cluster=cluster, text_tokens=128)


def test_every_stage_is_estimated_and_adds_up(capsys):
    assert tell(RECIPE, "--gpus", "8", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    names = [stage["name"] for stage in told["stages"]]
    assert names == ["joint_reconstruction", "eos_bridged_reconstruction", "contrastive"]
    assert told["parameters"] == 8_292_166_656
    for stage in told["stages"]:
        assert sum(stage["memory"].values()) == pytest.approx(stage["memory_bytes"])
    total = sum(stage["steps"] * stage["step_seconds"] for stage in told["stages"])
    assert told["seconds"] == pytest.approx(total)
    assert told["gpu_hours"] == pytest.approx(total * 8 / 3600)


def test_the_tables_say_what_is_assumed(capsys):
    assert tell(RECIPE, "--gpus", "8", "--interconnect", "200") == 0
    out = capsys.readouterr().out
    for part in ("assumed: ", "128 tokens a text", "GPU hours", "activations", "checkpoint"):
        assert part in out


def test_more_cards_take_less_memory_and_time_each():
    few, many = found(gpus=8), found(gpus=64)
    for a, b in zip(few.stages, many.stages, strict=True):
        assert b.memory["optimizer"] == pytest.approx(a.memory["optimizer"] / 8)
    assert many.stages[0].compute_seconds == pytest.approx(few.stages[0].compute_seconds / 8)
    assert many.interval_seconds < few.interval_seconds


def test_hard_negatives_cost_tokens_and_time():
    def contrastive(*overrides):
        return found("moca_qwen2_5_vl_3b", overrides=overrides).stages[-1]

    none = contrastive("stages.contrastive.data.negatives=0")
    three = contrastive("stages.contrastive.data.negatives=3")
    batch = load_recipe("moca_qwen2_5_vl_3b").stages["contrastive"].batch_size
    assert three.tokens_per_step - none.tokens_per_step == batch * 3 * (128 + 1)
    assert three.compute_seconds > none.compute_seconds


def test_a_guide_costs_a_copy_of_the_weights_and_a_forward_pass(capsys):
    guide = "stages.contrastive.objective.guide=stage_start"
    none, (first, *_, guided) = found().stages[-1], found(overrides=[guide]).stages
    assert "guide" not in none.memory
    assert first.memory["guide"] == 0.0
    assert tell(RECIPE, guide, "--gpus", "8") == 0
    assert "guide" in capsys.readouterr().out
    assert guided.memory["guide"] == 2 * 8_292_166_656  # bfloat16
    assert guided.hardware_flops > none.hardware_flops
    assert guided.model_flops == none.model_flops


def test_a_slow_network_costs_more_where_weights_are_gathered():
    def seconds(gbit: float) -> float:
        partitioned = ["engine.resident_parameters=false"]
        return found(gpus=16, overrides=partitioned, network_gbit=gbit).stages[0].network_seconds

    assert seconds(50) == pytest.approx(8 * seconds(400))


def test_what_does_not_fit_comes_with_a_change_that_was_tried(capsys):
    overrides = ["model.checkpoint_activations=false", "data.tokens_per_pack=65536"]
    card = ("--gpus", "1", "--gpu", "a100-40")
    assert tell(RECIPE, *overrides, *card, "data.patches_per_pack=262144") == 1
    out = capsys.readouterr().out
    assert "does not fit: " in out
    assert "model.checkpoint_activations=true" in out


def test_advice_is_silent_where_everything_fits():
    assert advice(load_recipe(RECIPE), found()) == []


def test_weights_stay_on_every_card_where_they_fit():
    assert found(gpus=8).resident
    small = replace(CARDS["a100-40"], memory=24 * GIB)
    cluster = Cluster(small, 8)
    assert not estimate(load_recipe(RECIPE), cluster=cluster, text_tokens=128).resident


def test_a_batch_that_does_not_divide_names_both_ways_out():
    with pytest.raises(ValueError, match=r"batch_size=128 does not divide over 6 .*take 4 cards"):
        found(gpus=6)


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(ValueError, match=r"some/other-model.*Qwen2-VL-2B"):
        found(overrides=["model.path=some/other-model"])


def test_cards_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        ask(RECIPE, "--gpus", "0")
    assert "expected a number from 1, found 0" in capsys.readouterr().err


def write_steps(folder: Path, seconds: float, *, count: int) -> None:
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, count + 1):
            took = 100.0 if step <= 5 else seconds  # the first steps are not typical
            record = {
                "stage": "joint_reconstruction",
                "step": step,
                "time": float(step),
                "step_seconds": took,
                "loss": 1.0,
            }
            file.write(json.dumps(record) + "\n")


def test_a_run_calibrates_what_a_card_reaches(tmp_path):
    write_steps(tmp_path, 2.0, count=20)
    plain = found()
    assert median_step_seconds(tmp_path, stage="joint_reconstruction") == 2.0
    seen = calibrated(plain.cluster, plain, 2.0)
    again = estimate(load_recipe(RECIPE), cluster=seen, text_tokens=128)
    assert again.stages[0].step_seconds == pytest.approx(2.0)


def test_a_run_that_is_too_short_or_too_fast_is_refused(tmp_path):
    write_steps(tmp_path, 2.0, count=8)
    with pytest.raises(ValueError, match="has logged 3 steps of joint_reconstruction"):
        median_step_seconds(tmp_path, stage="joint_reconstruction")
    plain = found(gpus=64)
    with pytest.raises(ValueError, match="give the network of that run with --interconnect"):
        calibrated(plain.cluster, plain, 1e-6)


def test_no_torch_is_imported():
    code = (
        "import sys\n"
        "from launcher.plan import command, estimate, show\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_page_in_docs_is_up_to_date():
    tool = Path(__file__).parents[2] / "tools" / "build_plan_docs.py"
    done = subprocess.run(
        [sys.executable, str(tool), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_bad_input_is_a_line_and_the_code_2(capsys):
    assert tell(RECIPE, "--gpus", "6") == 2
    assert "does not divide over 6 cards" in capsys.readouterr().err
