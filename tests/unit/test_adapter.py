"""Adapters: merged by our arithmetic as by peft's."""

import pytest
import torch

from cocoa_dist.config import AdapterConfig, ModelConfig, RandomModelConfig
from cocoa_dist.model.adapter import add_adapter, merge_adapter
from cocoa_dist.model.backbone import load_backbone
from cocoa_dist.model.embedder import EmbeddingModel
from cocoa_dist.model.heads import HeadsConfig
from cocoa_dist.train.build import load_vocabulary, special_token_ids

TARGETS = ("q_proj", "v_proj", "gate_proj", "fc1", "qkv")


def backbone():
    config = ModelConfig(
        random=RandomModelConfig(hidden_size=32, num_heads=2, num_key_value_heads=1,
                                 intermediate_size=48, vision_width=16, vision_heads=2),
        tokenizer="asset:tokenizer",
    )  # fmt: skip
    torch.manual_seed(0)
    return load_backbone(
        config,
        token_ids=special_token_ids(config),
        vocabulary_size=load_vocabulary(config).size,
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_weights_equal_pefts_own(kind) -> None:
    config = AdapterConfig(kind=kind, rank=4, alpha=8, targets=TARGETS)
    plain_names = dict(EmbeddingModel(backbone(), HeadsConfig()).named_parameters()).keys()
    model = EmbeddingModel(backbone(), HeadsConfig())
    model.backbone = add_adapter(model.backbone, config)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    ours = merge_adapter({n: p.detach() for n, p in model.named_parameters()}, config)
    theirs = model.backbone.merge_and_unload()
    assert ours.keys() == plain_names
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours[f"backbone.{name}"], parameter, rtol=1e-5, atol=1e-6)


def test_target_that_is_not_there_is_named() -> None:
    config = AdapterConfig(targets=("q_proj", "w_pack"))
    with pytest.raises(ValueError, match="no module named w_pack"):
        add_adapter(backbone(), config)
