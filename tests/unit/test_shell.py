"""A model without weights is the same model: ranks that are given theirs differ in nothing else."""

import pytest
import torch

from cocoa_dist.config import load_recipe
from cocoa_dist.train.build import build_parts

STAGE = "joint_reconstruction"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SETTINGS = {
    "all": [],
    "lora": [
        f"stages.{STAGE}.adapter={{kind: lora, rank: 4, dropout: 0.1, targets: [q_proj, qkv]}}"
    ],
    "dora": [f"stages.{STAGE}.adapter={{kind: dora, rank: 4, targets: [v_proj, qkv]}}"],
    "frozen tower": [f"stages.{STAGE}.freeze_vision=true"],
    "checkpointed": ["model.checkpoint_activations=true"],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_differs_in_nothing_else(family, settings, dtype) -> None:
    config = load_recipe(
        "debug",
        [f"model.random.family={family}", f"model.dtype={dtype}", *settings],
    )
    whole, shell = (
        build_parts(config, STAGE, run_dir=None, weights=weights).model for weights in (True, False)
    )

    def described(model):
        return [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()]

    assert described(shell) == described(whole)
    assert {p.dtype for p in whole.parameters()} == {getattr(torch, dtype)}
    assert not any(p.is_meta for p in shell.parameters())
    buffers = dict(shell.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)
