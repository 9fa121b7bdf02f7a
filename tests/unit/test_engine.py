"""The engine's pure parts: learning rate, and what a DeepSpeed file may hold."""

import json

import pytest

from cocoa_dist.config import OptimizerConfig
from cocoa_dist.train.ds_config import DS_CONFIG_DIR, build_ds_config, read_ds_config
from cocoa_dist.train.engine import learning_rate_at


def rates(schedule: str, *, warmup: int, total: int) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup)
    return [learning_rate_at(step, config, total_steps=total) for step in range(1, total + 1)]


def test_warm_up_is_linear_and_every_step_moves() -> None:
    for schedule in ("constant", "linear", "cosine"):
        found = rates(schedule, warmup=4, total=12)
        assert found[:4] == [0.25, 0.5, 0.75, 1.0]
        assert all(rate > 0 for rate in found)
        assert max(found) == 1.0


def test_linear_falls_evenly_and_cosine_falls_to_almost_nothing() -> None:
    linear = rates("linear", warmup=0, total=4)
    assert linear == [1.0, 0.75, 0.5, 0.25]
    cosine = rates("cosine", warmup=0, total=100)
    assert cosine[0] == 1.0
    assert cosine[50] == pytest.approx(0.5, abs=0.02)
    assert cosine[-1] < 0.001


@pytest.mark.parametrize("warmup", [0, 4])
def test_before_the_first_step_there_was_no_rate(warmup: int) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=warmup)
    assert learning_rate_at(0, config, total_steps=8) == 0.0


@pytest.mark.parametrize("path", sorted(DS_CONFIG_DIR.glob("*.json")), ids=lambda p: p.stem)
def test_shipped_ds_configs_hold_mechanics_only(path) -> None:
    joined = build_ds_config(read_ds_config(path.stem), max_grad_norm=0.5, dtype="bfloat16")
    assert joined["zero_optimization"]["stage"] == 3
    assert joined["gradient_clipping"] == 0.5
    assert joined["bf16"] == {"enabled": True}


@pytest.mark.parametrize("key", ["gradient_clipping", "optimizer", "train_batch_size", "bf16"])
def test_ds_config_may_not_set_what_the_recipe_owns(key) -> None:
    with pytest.raises(ValueError, match=f"sets '{key}', which belongs to the recipe"):
        build_ds_config({key: 1}, max_grad_norm=1.0, dtype="float32")


def test_ds_config_may_not_say_auto() -> None:
    mechanics = {"zero_optimization": {"reduce_bucket_size": "auto"}}
    with pytest.raises(ValueError, match="zero_optimization"):
        build_ds_config(mechanics, max_grad_norm=1.0, dtype="float32")


def test_unknown_ds_config_names_the_known_ones(tmp_path) -> None:
    with pytest.raises(ValueError, match="neither a file nor one of"):
        read_ds_config("zero4")
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert read_ds_config(str(path)) == {"zero_optimization": {"stage": 3}}
