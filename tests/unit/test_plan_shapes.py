"""The arithmetic of `launcher plan` against the models themselves."""

from collections.abc import Callable, Iterable

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from cocoa_dist.attention import compile_plan
from cocoa_dist.batch import VisionLayout
from cocoa_dist.model.backbone import route_attention
from cocoa_dist.segments import Role, Segment, attention_rule
from launcher.plan.costs import block_values, layer_values
from launcher.plan.shapes import PUBLISHED, ModelShape, read_shape

MODELS = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 3},
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_heads": 2,
        "out_hidden_size": 64,
    },
    "qwen3_vl": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(family, tied, tmp_path):
    config_class, model_class = MODELS[family]
    config = config_class(text_config=TEXT, vision_config=VISION[family], tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    shape = read_shape(tmp_path / "config.json")
    assert shape.vision.parameters == count(model.model.visual)
    assert shape.text.layer_parameters == count(model.model.language_model.layers[0])
    assert shape.parameters == count(model)


def published(shape: ModelShape) -> torch.nn.Module:
    text = {
        "vocab_size": shape.text.vocabulary,
        "hidden_size": shape.text.width,
        "intermediate_size": shape.text.inner_width,
        "num_hidden_layers": shape.text.layers,
        "num_attention_heads": shape.text.heads,
        "num_key_value_heads": shape.text.kv_heads,
    }
    if "2.5" in shape.name:
        vision = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16}
        config = Qwen2_5_VLConfig(
            text_config=text,
            vision_config={**vision, "out_hidden_size": shape.text.width},
            tie_word_embeddings=shape.text.tied,
        )
        return Qwen2_5_VLForConditionalGeneration(config)
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={"hidden_size": shape.text.width},
        tie_word_embeddings=shape.text.tied,
    )
    return Qwen2VLForConditionalGeneration(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_those_of_the_released_models(name):
    with torch.device("meta"):
        model = published(PUBLISHED[name])
    model.tie_weights()
    assert PUBLISHED[name].parameters == count(model)


def test_a_config_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    with pytest.raises(ValueError, match="qwen2_vl, qwen2_5_vl, qwen3_vl"):
        read_shape(tmp_path / "config.json")


def kept_values(run: Callable[[], object], *, but: Iterable[torch.Tensor]) -> float:
    """Bytes that autograd keeps of a forward pass, each storage once, in bfloat16 values."""
    known = {tensor.untyped_storage().data_ptr() for tensor in but}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values()) / 2


@pytest.mark.parametrize("family", MODELS)
def test_activations_are_those_that_autograd_keeps(family, tmp_path):
    config_class, model_class = MODELS[family]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
    text = {**TEXT, "hidden_size": 128, "intermediate_size": 352, "head_dim": 32}
    text["rope_parameters"] = rope
    config = config_class(text_config=text, vision_config=VISION[family])
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path / "config.json")
    model = model_class(config).to(torch.bfloat16)
    route_attention(model, backend="split")
    rows, sample = 512, 64
    samples = [[Segment(start, start + sample, Role.CONTEXT)] for start in range(0, rows, sample)]
    plan = compile_plan(samples, attention_rule("bidirectional"))

    language = model.model.language_model
    hidden = torch.randn(1, rows, 128, dtype=torch.bfloat16, requires_grad=True)
    places = torch.arange(rows).expand(3, 1, rows)
    turned = language.rotary_emb(hidden, places)
    text_kept = kept_values(
        lambda: language.layers[0](hidden, position_embeddings=turned, segment_plan=plan),
        but=[*model.parameters(), hidden, *turned],
    )
    assert text_kept / rows == pytest.approx(layer_values(shape.text), rel=0.15)

    visual = model.model.visual
    width = shape.vision.width
    patches = torch.randn(rows, width, dtype=torch.bfloat16, requires_grad=True)
    layout = VisionLayout(
        torch.zeros(rows, 2, dtype=torch.int64), plan, plan, torch.arange(rows // 4)
    )
    turned = visual.rotary_pos_emb(patches, layout.positions)
    vision_kept = kept_values(
        lambda: visual.blocks[0](
            patches, cu_seqlens=None, position_embeddings=turned, segment_layout=layout
        ),
        but=[*model.parameters(), patches, *turned],
    )
    assert vision_kept / rows == pytest.approx(block_values(shape.vision), rel=0.15)
