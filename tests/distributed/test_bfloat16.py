"""The dtype that GPUs train in, on the CPU: saved beside training, resumed to the last bit."""

import pytest
import torch
from incarnations import STAGE, Incarnation, Moment, assert_same_run, end, losses
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

BFLOAT16 = ["model.dtype=bfloat16", f"stages.{STAGE}.optimizer.learning_rate=3.0e-4"]


RECIPES = {
    "all": ["engine.ds_config=zero3_cpu"],
    "offload": ["engine.ds_config=zero3_offload"],
    "dora": [
        f"stages.{STAGE}.adapter={{kind: dora, rank: 4, dropout: 0.1, targets: [q_proj, qkv]}}",
        *("model.random=null", "model.path=asset:quickstart_backbone"),
    ],
}


@pytest.mark.parametrize("more", RECIPES.values(), ids=RECIPES.keys())
def test_a_run_in_bfloat16_goes_on_bit_for_bit(more, tmp_path) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    recipe = [*BFLOAT16, *more]
    Incarnation(whole, *recipe).finish()
    Incarnation(halved, *recipe, moment=Moment("leaves", "all", 3)).finish()
    folder = end(halved)[0]
    shard = load_file(folder / "shards" / "rank_00000.safetensors")
    kept = {v.dtype for name, v in shard.items() if not name.startswith("buffer/")}
    assert kept == {torch.float32}  # what the optimizer moves, not what the forward pass reads
    Incarnation(halved, *recipe).finish()
    assert_same_run(halved, whole)
    assert losses(whole)[-1] < losses(whole)[0]
