"""Norms by group of parameters: they add up, both engines say the same, and nothing moves."""

import math
from pathlib import Path

import pytest
import torch
from ranks import launch

from cocoa_dist.registry.words import PARAMETER_GROUPS
from cocoa_dist.train.health import group_of

WORKER = Path(__file__).with_name("health_worker.py")
STEPS = 4
STAGES = ("joint_reconstruction", "contrastive")
ENGINES = ("deepspeed", "fsdp2")
ADAPTER = "stages.contrastive.adapter={kind: lora, rank: 2, alpha: 4, targets: [q_proj, v_proj]}"


def job(stage: str, engine: str, *overrides: str, name: str = "") -> dict[str, object]:
    return {
        "name": f"{stage} {engine}{name}",
        "recipe": "debug",
        "stage": stage,
        "overrides": ["data.tokens_per_pack=160", "metrics.measure_every_steps=1", *overrides],
        "steps": STEPS,
        "engine": engine,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    jobs = [job(stage, engine) for stage in STAGES for engine in ENGINES]
    jobs += [job("contrastive", engine, ADAPTER, name=" adapter") for engine in ENGINES]
    seldom = f"metrics.measure_every_steps={10 * STEPS}"
    jobs += [job("contrastive", engine, seldom, name=" seldom") for engine in ENGINES]
    folder = tmp_path_factory.mktemp("health")
    return launch(jobs, world_size=2, folder=folder, worker=WORKER)


def named(health: dict[str, float], what: str) -> dict[str, float]:
    prefix = f"{what}/"
    return {k.removeprefix(prefix): v for k, v in health.items() if k.startswith(prefix)}


def test_every_parameter_of_a_model_has_its_group() -> None:
    assert group_of("backbone.model.visual.blocks.0.attn.qkv.weight") == "vision"
    assert group_of("backbone.model.language_model.layers.1.mlp.up_proj.weight") == "text"
    assert group_of("backbone.model.language_model.norm.weight") == "text"
    assert group_of("backbone.model.language_model.embed_tokens.weight") == "embeddings"
    assert group_of("backbone.lm_head.weight") == "embeddings"
    inside = "backbone.base_model.model.model.visual.blocks.0.attn.qkv.lora_A.default.weight"
    assert group_of(inside) == "new"
    assert group_of("new_tokens.from_2047") == "new"
    assert group_of("patch_decoder.layer.mlp.up_proj.weight") == "new"


@pytest.mark.slow
@pytest.mark.parametrize("case", [*STAGES, "contrastive adapter"])
def test_norms_of_groups_add_up_to_the_norm_of_the_gradient(runs, case) -> None:
    stage, _, kind = case.partition(" ")
    for engine in ENGINES:
        found = runs[f"{stage} {engine}{' ' + kind if kind else ''}"]
        for norm, health in zip(found["norms"], found["health"], strict=True):
            groups = named(health, "grad_norm")
            assert math.hypot(*groups.values()) == pytest.approx(norm, rel=1e-5)  # float32
            assert set(groups) == ({"new"} if kind else set(groups) | {"vision", "text"})
            assert set(groups) <= set(PARAMETER_GROUPS)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_both_engines_measure_the_same(runs, stage) -> None:
    one, other = (runs[f"{stage} {engine}"]["health"] for engine in ENGINES)
    for step, (left, right) in enumerate(zip(one, other, strict=True), start=1):
        assert set(left) == set(right)
        for name, value in left.items():  # the engines' own sums differ in float32
            assert value == pytest.approx(right[name], rel=2e-3), (step, name)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_update_ratio_is_how_far_the_step_before_moved_the_weights(runs, stage, engine) -> None:
    found = runs[f"{stage} {engine}"]
    assert not named(found["health"][0], "update_ratio")  # nothing has moved
    for step in range(1, STEPS):
        before, after = found["weights"][step - 1], found["weights"][step]
        groups = named(found["health"][step], "update_ratio")
        for group, ratio in groups.items():
            names = [name for name in before if group_of(name) == group]
            size = torch.cat([before[n].double().flatten() for n in names]).norm()
            way = torch.cat([(after[n].double() - before[n]).flatten() for n in names]).norm()
            # a change of float32 weights is rounded to them: 1e-7 of 1, against moves of 1e-3
            assert ratio == pytest.approx(float(way / size), rel=1e-3), (step, group)
        assert set(groups) == {group_of(name) for name in before}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_measuring_changes_no_number(runs, engine) -> None:
    often, seldom = runs[f"contrastive {engine}"], runs[f"contrastive {engine} seldom"]
    assert often["losses"] == seldom["losses"]
    assert often["norms"] == seldom["norms"]
    assert often["extras"] == seldom["extras"] == [[2.0, 4.0]] * STEPS
    for left, right in zip(often["weights"], seldom["weights"], strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)
    measured = [bool(named(h, "grad_norm")) for h in seldom["health"]]
    assert measured == [True, *[False] * (STEPS - 1)]  # the first step, then every 40th
