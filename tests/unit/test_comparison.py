"""Comparisons of methods: budgets, the table's arithmetic, and what happens when something fails.

Runs are written by a stand-in for the launcher; tests/distributed/test_compare_methods.py trains.
"""

import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from comparison_preset import PRESET

from cocoa_dist.comparison import compare
from cocoa_dist.comparison.arms import Preset, list_variants, preset_names, read_preset, resolve
from cocoa_dist.comparison.budget import (
    Budget,
    Split,
    StageCost,
    cost_key,
    expected,
    fitted,
    measure,
)
from cocoa_dist.comparison.compare import Comparison, Request
from cocoa_dist.comparison.folder import Place
from cocoa_dist.comparison.runs import InterruptedByUserError
from cocoa_dist.comparison.statistics import paired, sampling_error, spread_in_per_cent, summarise
from cocoa_dist.config import ConfigError

STAGE = "joint_reconstruction"
EXTRA = 2.0  # CPU seconds of the stand-in's first step beyond the others
FAKE = (sys.executable, str(Path(__file__).with_name("fake_launcher.py")))


@pytest.fixture
def preset_file(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump(PRESET, sort_keys=False))
    return path


@pytest.fixture
def scored(monkeypatch):
    """Score runs by their name and seed instead of by a model; return what was scored."""
    asked = []

    def scores(place_of_score, *, run_dir, config, preset):
        asked.append((config.name, config.seed))
        base = {"alone": 40.0, "whole": 45.0}.get(config.name, 50.0)
        shift = {0: 0.0, 1: 3.0, 2: 5.0}[config.seed] + (config.name == "whole") * config.seed
        cuts = {cut: base + shift + n for n, cut in enumerate(("r1", "r5", "r10"))}
        chance = {"r1": 1.0, "r5": 5.0, "r10": 10.0}
        found = {
            "n": 100,
            "chance": chance,
            "t2i": cuts,
            "i2t": {k: v + 2 for k, v in cuts.items()},
        }
        return {"unseen": found, "validation": found}

    monkeypatch.setattr(compare, "scores", scores)
    return asked


def request(preset_file, tmp_path, **changes) -> Request:
    values = {"seeds": 2, "out": tmp_path / "out", "launcher": FAKE, **changes}
    return Request(preset=str(preset_file), **values)


def go(asked: Request, said=None) -> int:
    return Comparison.of(asked, say=(said if said is not None else []).append).go()


def content_of(tmp_path):
    return json.loads((tmp_path / "out" / "methods.json").read_text())


def starts(tmp_path) -> dict[str, int]:
    """How often the launcher was started, by run."""
    root = tmp_path / "out" / "runs"
    return {
        f"{path.parent.parent.name}/{path.parent.name}": len(path.read_text().splitlines())
        for path in root.glob("*/*/starts")
    }


def cost(step: float, *, first: float = 0.0, tokens: float = 10.0) -> StageCost:
    return StageCost("arm", "stage", 8, step, 0.0, first, tokens, 1, step, step)


# What is compared


@pytest.mark.parametrize("name", preset_names())
def test_every_row_of_a_shipped_preset_resolves(name) -> None:
    preset = read_preset(name)
    rows = list_variants(preset, factors=(1.0, 10.0))
    rows += list_variants(preset, ablations=list(preset.ablations))
    assert {row.arm for row in rows} == set(preset.arms)
    for row in rows:
        assert set(row.config.evaluation.sets) == set(preset.validation)  # never the held-out ones


def test_a_factor_multiplies_reconstruction_alone() -> None:
    preset = Preset.model_validate(PRESET)
    one, three = (resolve(preset, "whole", factor=f).config.stages for f in (1.0, 3.0))
    assert [stage.steps for stage in one.values()] == [8, 8, 8]
    assert [stage.steps for stage in three.values()] == [24, 24, 8]


def test_ablated_rows_are_beside_the_control() -> None:
    preset = Preset.model_validate(PRESET)
    rows = list_variants(preset, ablations=["mask"])
    assert [row.name for row in rows] == ["alone", "whole-mask-0.5", "whole-mask-0.9"]
    ratio = [
        r.config.stages["eos_bridged_reconstruction"].objective.text_mask_ratio for r in rows[1:]
    ]
    assert ratio == [0.5, 0.9]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"control": "alon"}, "control: 'alon' is not an arm, did you mean 'alone'?"),
        ({"validation": PRESET["held_out"]}, "in held_out and in validation"),
        ({"arms": {**PRESET["arms"], "a/b": PRESET["arms"]["alone"]}}, "'a/b' names folders"),
        ({"pilot_steps": 2}, "greater than or equal to 6"),
    ],
)
def test_a_preset_that_makes_no_sense_is_refused(tmp_path, change, said) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump({**PRESET, **change}))
    with pytest.raises(ConfigError) as caught:
        read_preset(str(path))
    assert said in str(caught.value)


def test_unknown_names_have_a_nearest_one() -> None:
    preset = Preset.model_validate(PRESET)
    with pytest.raises(ConfigError, match=r"unknown arm 'wole', did you mean 'whole'\?"):
        list_variants(preset, arms=["wole"])
    with pytest.raises(ConfigError, match=r"unknown ablation 'masc', did you mean 'mask'\?"):
        list_variants(preset, ablations=["masc"])
    with pytest.raises(ConfigError, match="none of which is among the arms asked for"):
        list_variants(preset, arms=["alone"], ablations=["mask"])


def test_a_recipe_that_ends_on_another_stage_is_no_arm() -> None:
    recipe = {"extends": "debug", "stages": {"contrastive": None}}
    tree = {**PRESET, "arms": {**PRESET["arms"], "half": {"about": "", "recipe": recipe}}}
    with pytest.raises(
        ConfigError, match="arm 'half': its last stage 'eos_bridged_reconstruction'"
    ):
        list_variants(Preset.model_validate(tree), arms=["half"])


# Budgets


def test_the_contrastive_stage_gets_what_the_budget_leaves() -> None:
    variant = resolve(Preset.model_validate(PRESET), "whole")
    measured = (cost(0.5, first=1), cost(0.25), cost(0.2, first=2))
    stages = dict(zip(variant.config.stages, measured, strict=True))
    costs = {cost_key(variant.config, name): found for name, found in stages.items()}
    config = fitted(variant, costs, budget=Budget.COMPUTE, amount=30.0)
    assert config.stages["contrastive"].steps == round((30 - (1 + 4) - 2 - 2) / 0.2)
    assert expected(config, costs, budget=Budget.COMPUTE) == pytest.approx(30.0, abs=0.1)
    config = fitted(variant, costs, budget=Budget.TOKENS, amount=1000.0)
    assert config.stages["contrastive"].steps == (1000 - 160) / 10
    config = fitted(variant, costs, budget=Budget.STEPS, amount=77)
    assert [stage.steps for stage in config.stages.values()] == [8, 8, 77]
    # twice what they take, in the recipe's proportion: 13 = 1 + n * (0.5 + 0.25)
    config = fitted(variant, costs, budget=Budget.COMPUTE, amount=30.0, before=13.0)
    steps = [16, 16, round((30 - 13 - 2) / 0.2)]
    assert [stage.steps for stage in config.stages.values()] == steps
    config = fitted(variant, costs, budget=Budget.TOKENS, amount=1000.0, before=400.0)
    assert [stage.steps for stage in config.stages.values()] == [20, 20, 60]
    with pytest.raises(ValueError, match="take 7 of 7 CPU seconds and leave no step"):
        fitted(variant, costs, budget=Budget.COMPUTE, amount=7.0)


def test_a_pilot_tells_first_steps_from_the_others(tmp_path) -> None:
    spent = [0.0, 5.0, 2.0, 1.0, 0.4, 0.6, 0.5]  # a line has the step before's
    lines = [{"stage": "s", "step": n, "cpu_seconds": c, "tokens": 7} for n, c in enumerate(spent)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    found = measure(tmp_path, arm="a", stage="s")
    assert found.cpu_step == pytest.approx(0.5)
    assert found.cpu_first == pytest.approx(8.0 - 3 * 0.5)
    assert found.cpu_seconds(6) == pytest.approx(sum(spent))
    with pytest.raises(ValueError, match="steps of stage 't' were timed"):
        measure(tmp_path, arm="a", stage="t")


def test_pilots_are_averaged_over_rounds() -> None:
    found = cost(1.0).with_round(cost(2.0, first=3.0)).with_round(cost(6.0))
    assert (found.cpu_step, found.cpu_first, found.rounds) == (3.0, 1.0, 3)
    assert found.cpu_high == 6.0


def test_arms_share_the_references_reconstruction_budget(preset_file, tmp_path, scored) -> None:
    tree = yaml.safe_load(preset_file.read_text())
    stages = {"eos_bridged_reconstruction": None, "contrastive": {"init_from": STAGE}}
    tree["arms"]["joint"] = {"about": "one", "recipe": {"extends": "debug", "stages": stages}}
    preset_file.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert go(request(preset_file, tmp_path, seeds=1, arms=("joint", "whole"))) == 0
    _, joint, whole = content_of(tmp_path)["groups"][0]["rows"]
    before = 8 * 0.1 + 8 * 0.2 + 2 * EXTRA  # of the reference, which is `whole`
    assert joint["steps"][STAGE] == round((before - EXTRA) / 0.1)
    assert list(whole["steps"].values()) == [8, 8, 8]
    # a contrastive step takes 0.3 s in `whole` and, by the same pilot, in `joint`
    assert joint["steps"]["contrastive"] == 8


def test_steps_cost_alike_where_only_their_number_differs() -> None:
    preset = Preset.model_validate(PRESET)
    own, other = (resolve(preset, name).config for name in ("whole", "alone"))
    assert cost_key(own, "contrastive") == cost_key(other, "contrastive")
    masked = resolve(preset, "whole", ablation="mask", value=0.5).config
    stage = "eos_bridged_reconstruction"
    assert cost_key(own, stage) != cost_key(masked, stage)


# Arithmetic


def test_summaries_are_plain_statistics() -> None:
    own, control = {0: 50.0, 1: 53.0, 2: 49.0}, {0: 45.0, 1: 47.0, 2: 48.0, 3: 90.0}
    found = paired(own, control)
    differences = [5.0, 6.0, 1.0]
    assert found.mean == pytest.approx(sum(differences) / 3)
    assert found.spread == pytest.approx(
        math.sqrt(sum((d - 4.0) ** 2 for d in differences) / (3 - 1))
    )
    assert (found.n, found.exceeds) == (3, True)
    assert summarise([-1.0, 3.0]).exceeds is False
    one = summarise([2.0])
    assert (one.spread, one.exceeds) == (None, None)
    assert summarise([]) is None
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert sampling_error(50.0, 100) == pytest.approx(5.0)
    assert spread_in_per_cent([90.0, 110.0]) == pytest.approx(20.0)


# Whole comparisons with a stand-in for the launcher


def test_a_comparison_is_what_its_runs_say(preset_file, tmp_path, scored) -> None:
    assert go(request(preset_file, tmp_path)) == 0
    content = content_of(tmp_path)
    (group,) = content["groups"]
    alone, whole = group["rows"]
    # stages of the stand-in: 0.1, 0.2, 0.3 CPU seconds a step; 0.3 for `alone`, whose contrastive
    # stage is the same work as the reference's, which is where it was measured
    step, extra = 0.3, 2.0
    budget = sum(8 * each + extra for each in (0.1, 0.2, 0.3))
    assert group["budget"] == pytest.approx(budget)
    assert whole["steps"]["contrastive"] == 8
    assert alone["steps"] == {"contrastive": round((budget - extra) / step)}
    own = [45.0 + 2, 49.0 + 2]  # R@10 of seeds 0 and 1, words to pictures
    base = [40.0 + 2, 43.0 + 2]
    found = whole["scores"]["unseen/t2i/r10"]
    assert found["mean"] == pytest.approx(statistics.fmean(own))
    assert found["spread"] == pytest.approx(statistics.stdev(own))
    difference = whole["differences"]["unseen/t2i/r10"]
    each = [a - b for a, b in zip(own, base, strict=True)]
    assert difference["mean"] == pytest.approx(statistics.fmean(each))
    assert difference["spread"] == pytest.approx(statistics.stdev(each))
    assert difference["exceeds_spread"] is True
    assert whole["scores"]["unseen/both/r10"]["mean"] == pytest.approx(found["mean"] + 1)
    assert (alone["control"], alone["differences"]) == (None, None)
    used = [row["used"]["cpu_seconds"]["mean"] for row in (alone, whole)]
    assert group["cpu_within_per_cent"] == pytest.approx(
        100 * abs(used[0] - used[1]) / statistics.fmean(used)
    )
    stages = whole["runs"]["0"]["stages"]
    assert stages["contrastive"]["data"]["emoji"]["records"] == 64
    assert stages["contrastive"]["passes"] == pytest.approx(8 * 24 / 64)
    # the curve is over the CPU seconds of all stages so far
    points = whole["runs"]["1"]["curve"]["validation"]
    assert [point[1] for point in points] == pytest.approx([11.0, 21.0, 31.0])
    assert points[-1][0] == pytest.approx(whole["runs"]["1"]["cpu_seconds"])
    said = (tmp_path / "out" / "methods.md").read_text()
    assert "whole, unseen, R@10 (mean of both ways): 5.5 points above alone over 2 seed(s)" in said
    assert "| whole | 2 | 47.0 ± 2.8 (**+5.5 ± 0.7**)" in said
    assert "| (chance) |  | 1.0 | 10.0 | 1.0 | 10.0 |" in said
    assert "0, 0 | 1.00 to 0.12 |" in said  # the stand-in's loss is 1 / step
    page = (tmp_path / "out" / "methods.html").read_text()
    assert "<b>+5.5 ± 0.7</b>" in page
    assert "<svg" in page
    assert "seed=1 --run-dir" in said


def test_nothing_is_trained_twice_and_seeds_may_grow(preset_file, tmp_path, scored) -> None:
    assert go(request(preset_file, tmp_path, seeds=1)) == 0
    assert go(request(preset_file, tmp_path, seeds=3, jobs=3)) == 0
    assert set(starts(tmp_path).values()) == {1}
    assert len(starts(tmp_path)) == 6
    assert content_of(tmp_path)["groups"][0]["rows"][1]["scores"]["unseen/t2i/r1"]["n"] == 3


def test_a_failed_arm_is_named_and_the_others_go_on(
    preset_file, tmp_path, scored, monkeypatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "alone")
    said = []
    assert go(request(preset_file, tmp_path), said) == 1
    assert any(
        line.startswith("FAILED  [1/4] alone, seed 0: exit code 93: a rank") for line in said
    )
    content = content_of(tmp_path)
    assert [(m["row"], m["seed"]) for m in content["missing"]] == [("alone", 0), ("alone", 1)]
    words = (tmp_path / "out" / "methods.md").read_text()
    assert "- alone, seed 1: failed with exit code 93: a rank had a bad day" in words
    assert len(content["groups"][0]["rows"][1]["runs"]) == 2
    monkeypatch.delenv("FAKE_FAIL")
    assert go(request(preset_file, tmp_path)) == 0
    assert starts(tmp_path)["whole/seed0"] == 1


def test_an_arm_whose_pilot_fails_is_missing(preset_file, tmp_path, scored, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "pilot-whole-mask-0.5")
    assert go(request(preset_file, tmp_path, ablations=("mask",), seeds=1)) == 1
    (missing,) = content_of(tmp_path)["missing"]
    assert missing["row"] == "whole-mask-0.5"
    assert missing["why"].startswith("its pilot failed: exit code 93: a rank had a bad day")
    assert set(starts(tmp_path)) == {"alone/seed0", "whole-mask-0.9/seed0"}


def test_a_changed_arm_is_refused_by_name(preset_file, tmp_path, scored) -> None:
    asked = request(preset_file, tmp_path, seeds=1)
    assert go(asked) == 0
    before = json.loads((tmp_path / "out" / "plan.json").read_text())
    tree = yaml.safe_load(preset_file.read_text())
    tree["arms"]["whole"]["recipe"]["stages"] = {"contrastive": {"batch_size": 48}}
    preset_file.write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(ValueError, match=r"is another than when its runs began") as caught:
        go(asked)
    assert "whole is another" in str(caught.value)
    assert "stages.contrastive.batch_size: 24 -> 48" in str(caught.value)
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == before  # nothing measured
    assert set(starts(tmp_path).values()) == {1}


def test_a_budget_is_settled_once(preset_file, tmp_path, scored) -> None:
    asked = request(preset_file, tmp_path, seeds=1, arms=("alone",))
    assert go(asked) == 0
    tree = yaml.safe_load(preset_file.read_text())
    tree["arms"]["whole"]["recipe"]["stages"] = {"contrastive": {"steps": 80}}
    preset_file.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert go(asked) == 0
    assert set(starts(tmp_path).values()) == {1}


def test_pilots_of_another_comparison_serve(preset_file, tmp_path, scored) -> None:
    first = tmp_path / "first"
    assert go(request(preset_file, tmp_path, seeds=1, out=first)) == 0
    asked = request(preset_file, tmp_path, seeds=1, budget=Budget.STEPS, pilots_from=first)
    assert go(asked) == 0
    assert not (tmp_path / "out" / "pilots").exists()
    costs = [json.loads((f / "plan.json").read_text())["pilots"] for f in (first, asked.out)]
    assert costs[0] == costs[1]
    with pytest.raises(ValueError, match="its pilots ran on 1 processes, this comparison runs on"):
        go(request(preset_file, tmp_path, out=tmp_path / "new", pilots_from=first, nproc=2))
    with pytest.raises(ValueError, match=r"--pilots-from .* cannot be read"):
        go(request(preset_file, tmp_path, out=tmp_path / "new", pilots_from=tmp_path))


def test_the_table_can_be_written_of_what_is_there(preset_file, tmp_path, scored) -> None:
    """By --table-only, also while another call trains."""
    asked = request(preset_file, tmp_path, seeds=1)
    assert go(asked) == 0
    for name in ("methods.md", "methods.html", "methods.json"):
        (tmp_path / "out" / name).unlink()
    more = Comparison.of(request(preset_file, tmp_path, seeds=2), say=print)
    content = more.write(more.plan())
    assert [(m["row"], m["why"]) for m in content["missing"]] == [
        ("alone", "not run yet"),
        ("whole", "not run yet"),
    ]
    assert "This table is partial" in (tmp_path / "out" / "methods.md").read_text()
    assert (tmp_path / "out" / "methods.html").is_file()


def test_other_settings_want_another_folder(preset_file, tmp_path, scored) -> None:
    assert go(request(preset_file, tmp_path, seeds=1)) == 0
    with pytest.raises(ValueError, match="budget: 'equal-compute' -> 'equal-steps'"):
        Comparison.of(request(preset_file, tmp_path, budget=Budget.STEPS), say=print)


def test_a_run_of_another_recipe_is_not_taken_for_the_arms(preset_file, tmp_path, scored) -> None:
    asked = request(preset_file, tmp_path, seeds=1)
    assert go(asked) == 0
    path = tmp_path / "out" / "runs" / "whole" / "seed0" / "resolved.yaml"
    path.write_text(path.read_text().replace("temperature: 0.05", "temperature: 0.5"))
    assert go(asked) == 1
    (missing,) = content_of(tmp_path)["missing"]
    assert "was trained by another recipe" in missing["why"]
    assert "objective.temperature: 0.5 -> 0.05" in missing["why"]


def test_at_equal_steps_an_arm_without_reconstruction_serves_all_factors(
    preset_file, tmp_path, scored
) -> None:
    asked = request(
        preset_file,
        tmp_path,
        seeds=1,
        budget=Budget.STEPS,
        split=Split.RECIPE,
        factors=(1.0, 3.0),
    )
    assert go(asked) == 0
    assert set(starts(tmp_path)) == {"alone/seed0", "whole/seed0", "whole-3x/seed0"}
    groups = content_of(tmp_path)["groups"]
    assert [group["budget"] for group in groups] == [8, 8]
    assert [list(g["rows"][1]["steps"].values()) for g in groups] == [[8, 8, 8], [24, 24, 8]]
    assert groups[1]["rows"][1]["differences"]["unseen/t2i/r1"]["n"] == 1


def test_a_signal_reaches_the_launcher_and_the_call_leaves(
    preset_file, tmp_path, scored, monkeypatch
) -> None:
    monkeypatch.setenv("FAKE_SLEEP", "alone")
    run_dir = tmp_path / "out" / "runs" / "alone" / "seed0"

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not (run_dir / "waits").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(InterruptedByUserError, match="SIGTERM; the same command") as caught:
        go(request(preset_file, tmp_path, budget=Budget.STEPS, split=Split.RECIPE))
    thread.join()
    assert caught.value.code == 143
    assert (run_dir / "told").read_text() == "TERM"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_call_waits_its_turn(preset_file, tmp_path, scored) -> None:
    from cocoa_dist.comparison.folder import held

    with held(Place(tmp_path / "out")), pytest.raises(ValueError, match="held by another call"):
        go(request(preset_file, tmp_path))
